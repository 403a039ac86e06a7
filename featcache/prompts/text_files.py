"""Text and JSON files of users, class lists among them; and the JSON files of this package."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from featcache.errors import DatasetError
from featcache.parameters import check_regular

T = TypeVar("T")

CLASS_FILE = "classes.txt"
MAX_BYTES = 1 << 28
"""Largest text file that is read."""


def read_class_file(path: Path, *, unique: bool = True) -> list[tuple[str, str]]:
    """Read a class file: one class per line, in order, ``name`` or ``folder<TAB>display name``.

    Blank lines and lines that start with ``#`` are skipped. With `unique`, a name that occurs twice in the first
    column, where labels are looked up, is refused. Display names may repeat, and so may plain names where labels are
    integers: ImageNet has two missiles. DatasetError if the file cannot be read or holds no class.
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


def read_json(file: Path, remedy: str = "restore it") -> object:
    """The content of a JSON file; DatasetError, with a remedy, if it cannot be read."""
    try:
        check_regular(file)
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read as JSON ({error}); {remedy}") from error


def json_object(file: Path, kind: type[T], remedy: str = "restore it") -> dict[str, T]:
    """A file's JSON object, whose values all have type `kind`; DatasetError for anything else."""
    found = read_json(file, remedy)
    if not isinstance(found, dict) or not found:
        raise DatasetError(f"{file}: got {found!r:.60}; expected a JSON object: {remedy}")
    if odd := [value for value in found.values() if not isinstance(value, kind)]:
        expected = {"str": "strings", "list": "lists"}[kind.__name__]
        raise DatasetError(f"{file}: got {odd[0]!r:.60}; expected a JSON object of {expected}: {remedy}")
    return found


@cache
def packaged_json(name: str) -> dict[str, Any]:
    """A JSON object in a file of this package."""
    found: dict[str, Any] = json.loads(files("featcache.prompts").joinpath(name).read_text(encoding="utf-8"))
    return found


def listed_names(folder: Path, *, unique: bool = True) -> list[str] | None:
    """The display names in a folder's ``classes.txt``; None without that file. See `read_class_file`."""
    file = folder / CLASS_FILE
    return [display for _, display in read_class_file(file, unique=unique)] if file.is_file() else None


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, without line ends (LF or CR LF); DatasetError for anything else."""
    try:
        check_regular(path)
        with path.open("rb") as file:  # a pipe of the shell may be endless
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
