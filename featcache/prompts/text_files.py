"""Text files that users write: lists of lines, and lists of class names."""

from __future__ import annotations

from pathlib import Path

from featcache.errors import DatasetError
from featcache.parameters import check_regular

CLASS_FILE = "classes.txt"
MAX_BYTES = 1 << 28
"""Largest text file that is read."""


def read_class_file(path: Path, *, unique: bool = True) -> list[tuple[str, str]]:
    """Read a class file: one class per line, in order, ``name`` or ``folder<TAB>display name``.

    Blank lines and lines that start with ``#`` are skipped.

    Parameters
    ----------
    path : Path
    unique : bool
        Whether the first column is looked up, and so must not hold a name twice. (Display names may
        repeat, and so may plain names where labels are integers: ImageNet has two missiles.)

    Raises
    ------
    DatasetError
        Where it cannot be read, holds no class, or names one twice.
    """
    classes: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        folder, tab, display = (part.strip() for part in line.partition("\t"))
        if not folder or "\t" in display or (tab and not display):
            raise DatasetError(
                f"{path}:{number}: got {line!r}; expected one class name, or a folder, one tab and a display name"
            )
        if unique and folder in classes:
            raise DatasetError(
                f"{path}:{number}: {folder!r} is already on line {classes[folder]}; name each class once"
            )
        classes[folder] = number
        pairs.append((folder, display or folder))
    if not pairs:
        raise DatasetError(f"{path}: no class name in it; write one per line, or remove the file")
    return pairs


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, without their ends; only LF and CR LF end a line.

    Raises
    ------
    DatasetError
        Where the file cannot be read or is not UTF-8.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:  # what the shell has opened may have no end
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        problem = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DatasetError(f"{path}: cannot be read as UTF-8 text ({problem}); check the path and encoding") from error
    return [line.removesuffix("\r") for line in text.split("\n")]
