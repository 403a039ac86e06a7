"""``list:FILE``: a text file that names one sample per line.

Lines. ``path<TAB>label``, or without a tab ``path label``, split at the last space: paths may hold spaces, and a label
with a space needs the tab. Blank lines and lines that start with ``#`` are skipped. UTF-8.

Paths start from ``root=DIR`` (``list:FILE,root=DIR``); by default from the list file's folder or the nearest folder
above it that has the files, since lists often name images relative to the folder where a training script runs. The
path as written is the sample's id, and the rows are in the file's order. Absolute paths are allowed (the id, and with
it the data set's key, then depends on where the data lie); ``..`` is refused.

Class order. Labels are class names, sorted by code point, unless ``classes.txt`` beside the list gives another order
(one name per line, or ``label<TAB>display name``; it must hold every label of the list). With ``labels="int"`` they are
indices 0 to C-1 into ``classes.txt``, or else into "0", "1", ... up to the largest in the list.

``{split}`` in FILE is replaced by the split's name; in a FILE without it the split is just a name.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, size_and_stamp
from featcache.datasets.labels import by_name, by_number
from featcache.datasets.options import PLACEHOLDER, SourceOptions, check_path, name_of_file
from featcache.errors import DatasetError
from featcache.prompts.text_files import CLASS_FILE, read_class_file, read_lines

EXPECTED = "expected 'path<TAB>label' or 'path label'"
PROBED = 20
"""Lines that are tried to find the folder that paths start from."""


class ListRow(NamedTuple):
    """One sample of a list: line number from 1, path and label as written, and whether a tab separates them."""

    line: int
    path: str
    label: str
    tab: bool


@dataclass(frozen=True)
class RootOptions(SourceOptions):
    """Options of ``list:`` and ``coop:``.

    Parameters
    ----------
    root : folder that paths start from (default: the file's, or one near it with the images)
    """

    root: str | None = None


def open_list_file(
    argument: str, split: str, options: RootOptions, *, labels: str = "names", name: str | None = None
) -> ImageFiles:
    """Open a list of samples; the default name is that of the file, or of its folder if it is named by the split."""
    path = local_path("list", argument.replace(PLACEHOLDER, split))
    rows = parse_list(read_lines(path), str(path))
    indices, classnames = _classes(rows, path, labels)
    root = local_path("list,root=", options.root) if options.root else _root(rows, path)
    files = [size_and_stamp(root / row.path) for row in rows]
    check_found(rows, files, path, root)
    index = file_index([row.path for row in rows], files, indices, classnames)
    return files_below(name or name_of_file(argument, path.parent), split, index, root)


def _root(rows: list[ListRow], path: Path) -> Path:
    """The list's folder, or the nearest above it that has one of the first images."""
    has_image = (folder for folder in path.parents[:-1] if any((folder / row.path).is_file() for row in rows[:PROBED]))
    return next(has_image, path.parent)


def parse_list(lines: list[str], source: str) -> list[ListRow]:
    """Parse the lines of a list file; errors name the `source`.

    DatasetError if a line has no path or no label, more than one tab, or a path that is refused or occurs twice; or if
    no line names a sample.

    >>> [(row.path, row.label) for row in parse_list(["my cat.jpg cat", f"a.jpg{chr(9)}tabby cat"], "pets.txt")]
    [('my cat.jpg', 'cat'), ('a.jpg', 'tabby cat')]
    """
    rows: list[ListRow] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        path, label = parse_line(line, f"{source}:{number}")
        if path in seen:
            raise DatasetError(f"{source}:{number}: {path!r} is already on line {seen[path]}; list each image once")
        seen[path] = number
        rows.append(ListRow(number, path, label, "\t" in line))
    if not rows:
        raise DatasetError(f"{source}: no sample in {len(lines):,} lines; {EXPECTED}, one sample per line")
    return rows


def parse_line(line: str, where: str) -> tuple[str, str]:
    """Split one line into (path, label); DatasetError if that fails.

    >>> parse_line("digits/a 7.png zero", "list.txt:1")
    ('digits/a 7.png', 'zero')
    """
    if line.count("\t") > 1:
        raise DatasetError(f"{where}: got {line.count(chr(9))} tabs in {line!r}; {EXPECTED} with one tab")
    if "\t" in line:
        path, label = (part.strip() for part in line.split("\t"))
    else:
        path, _, label = (part.strip() for part in line.strip().rpartition(" "))
    if not path or not label:
        raise DatasetError(f"{where}: got {line!r} without a {'label' if path else 'path or a label'}; {EXPECTED}")
    return check_path(path, where), label


def _classes(rows: list[ListRow], path: Path, labels: str) -> tuple[list[int], Sequence[str]]:
    """Class indices and class names: by the names in ``classes.txt`` or in the list, or by number."""
    file = path.parent / CLASS_FILE
    listed = read_class_file(file, unique=labels == "names") if file.is_file() else None
    written = [row.label for row in rows]

    def where(row: int) -> str:
        return f"{path}:{rows[row].line}"

    if labels == "names":
        return by_name(written, where, listed, file)
    names = None if listed is None else [display for _, display in listed]
    return by_number(written, where, names, "correct it, or leave out --labels int")


def check_found(rows: list[ListRow], files: list[tuple[int, int]], path: Path, root: Path) -> None:
    """Refuse a list none of whose images exist, and missing images of lines that may be split at the wrong space.

    Other missing images keep their row: encoding reports them and, with ``--max-bad``, goes on.
    """
    missing = [row for row, facts in zip(rows, files, strict=True) if facts == (0, 0)]
    if len(missing) == len(rows):
        examples = ", ".join(repr(os.path.join(root, row.path)) for row in missing[:5])
        raise DatasetError(
            f"{path}: none of its {len(rows):,} images exist: looked for {examples}; name the folder that paths start "
            f"from, list:{path.name},root=DIR; and a label with a space needs a tab before it"
        )
    for row in missing:
        if not row.tab and " " in row.path:
            raise DatasetError(
                f"{path}:{row.line}: no file {row.path!r} (label {row.label!r}); the line was split at its last "
                "space: put a tab before a label that holds spaces"
            )
