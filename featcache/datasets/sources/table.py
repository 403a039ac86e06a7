"""``table:FILE``: a table with one row per sample: path, label, and any other columns.

FILE is Parquet, CSV, TSV or JSON lines (``.parquet``, ``.csv``, ``.tsv``, ``.jsonl``); ``{split}`` in it is replaced by
the split's name. Columns with other than the usual names are given as options, ``table:FILE,path=image,label=breed``;
see `TableOptions`.

Multi-label data. ``labels=tags`` names a column with the classes that apply to a sample: ``cat|dog``, a JSON list of
names or class indices (in Parquet and JSON lines, a list), or nothing. ``separator=;`` (or ``space``, ``comma``) sets
the separator, and ``unknown=COLUMN`` names a column with the classes that may or may not apply. ``labels=cat+dog+bird``
names one column per class, with 1, 0, and -1 or nothing for unknown.

Class order. The names in the whole table, all splits included, sorted by code point, unless ``classes.txt`` beside it
gives another order; whole numbers index ``classes.txt``, or else "0", "1", ... up to the largest. Split ``all`` takes
every row. A metadata column of whole numbers with an empty cell becomes one of strings, ``""`` where empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, sizes_and_stamps
from featcache.datasets.formats.tables import Cell, Table, metadata_column, read_table
from featcache.datasets.labels import by_name, by_number
from featcache.datasets.options import PLACEHOLDER, WHOLE, SourceOptions, check_path, name_of_file
from featcache.datasets.targets import split_cell, targets_of_columns, targets_of_names
from featcache.errors import DatasetError
from featcache.parameters import OneOf
from featcache.progress import first_few
from featcache.prompts.text_files import CLASS_FILE, listed_names, read_class_file

USUAL = {
    "path": ("path", "file_name", "filename", "filepath", "file"),
    "label": ("label", "class", "target", "category"),
    "split": ("split",),
}


@dataclass(frozen=True)
class TableOptions(SourceOptions):
    """Options of ``table:``.

    Parameters
    ----------
    path : column of image paths, which are the ids (default: path, file_name, filename, filepath or file)
    label : column of class names, or indices if all are whole numbers (default: label, class, target or category)
    split : column of splits (default: split; without such a column all rows are taken)
    metadata : columns to store (default: all other columns of strings or numbers)
    root : folder that paths start from (default: that of the table)
    labels : multi-label data: the column that lists the classes of a sample, or one column per class
    unknown : multi-label data: columns that list classes which may or may not apply
    separator : what separates classes in a cell, also ``space`` or ``comma``
    unlabelled : leave out rows without a label (default: refuse them)
    """

    path: str | None = None
    label: str | None = None
    split: str | None = None
    metadata: Sequence[str] | None = None
    root: str | None = None
    labels: Sequence[str] = ()
    unknown: Sequence[str] = ()
    separator: str = "|"
    unlabelled: Annotated[str, OneOf("drop")] | None = None


def open_table(
    argument: str, split: str, options: TableOptions, *, labels: str = "names", name: str | None = None
) -> ImageFiles:
    """Open one split of a table; the default name is that of the file, or of its folder if it is named by the split."""
    file = local_path("table", argument.replace(PLACEHOLDER, split))
    several = [*options.labels, *options.unknown]
    table = read_table(file, nested=several)
    given = {"path": options.path, "split": options.split} | ({} if several else {"label": options.label})
    columns = {role: _column_of(role, table, name, file) for role, name in given.items()}
    rows = _rows_of(table, columns["split"], split, file)
    if several:
        if options.unlabelled:
            raise DatasetError(
                f"{file}: unlabelled= goes with one label per row; of labels=, an empty cell is no class"
            )
        targets, classnames = _targets(table, options, file)
    else:
        cells = table[str(columns["label"])]
        rows = _labelled(cells, rows, str(columns["label"]), options.unlabelled, file)
        targets, classnames = _classes(cells, file, str(columns["label"]), labels)
    paths = _paths(table[str(columns["path"])], rows, str(columns["path"]), file)
    root = local_path("table,root=", options.root) if options.root else file.parent
    files = sizes_and_stamps(root, paths, file, "give root=DIR")
    metadata = {}
    for column in _metadata_columns(table, {*columns.values(), *several}, options.metadata, file):
        values = metadata_column(table[column])  # typed by the whole table, so that its splits agree
        metadata[column] = [values[row] for row in rows]
    index = file_index(paths, files, np.asarray(targets)[rows], classnames, metadata)
    return files_below(name or name_of_file(argument, file.parent), split, index, root)


def _column_of(role: str, table: Table, given: str | None, file: Path) -> str | None:
    """The column with a role; None for a split column that neither exists nor was asked for."""
    names = (given,) if given else USUAL[role]
    for column in names:
        if column in table:
            return column
    if role == "split" and not given:
        return None
    in_parquet = role == "path" and file.suffix == ".parquet"
    nested = " (bytes of images in a Parquet file: hf:FILE,image=NAME)" if in_parquet else ""
    raise DatasetError(
        f"{file}: no column {' or '.join(names)} for {role}=; there are {first_few(table, 10)}: name one of them"
        f"{nested}"
    )


def _rows_of(table: Table, column: str | None, split: str, file: Path) -> list[int]:
    count = len(next(iter(table.values())))
    if column is None or split == WHOLE:
        rows = list(range(count))
    else:
        rows = [row for row, cell in enumerate(table[column]) if str(cell) == split]
    if not rows:
        there = first_few(sorted({str(cell) for cell in table[column]}), 10) if column else ""
        raise DatasetError(
            f"{file}: no row of split {split!r} among {count:,}; column {column} holds {there or 'nothing'}"
        )
    return rows


def _paths(cells: Sequence[Cell], rows: Sequence[int], column: str, file: Path) -> list[str]:
    paths: dict[str, int] = {}
    for row in rows:
        cell = cells[row]
        if cell is None:
            raise DatasetError(f"{file}: row {row + 1} has no {column}; expected a path")
        path = check_path(str(cell), f"{file}: row {row + 1}, {column}")
        if path in paths:
            raise DatasetError(
                f"{file}: row {row + 1}: {path!r} is already in row {paths[path] + 1}; list each image once"
            )
        paths[path] = row
    return list(paths)


def _labelled(cells: Sequence[Cell], rows: list[int], column: str, without: str | None, file: Path) -> list[int]:
    """The rows of a split; those without a label are refused, or left out (``unlabelled=drop``)."""
    kept = [row for row in rows if cells[row] is not None]
    if not kept:
        raise DatasetError(f"{file}: none of {len(rows):,} rows has a {column}; expected labels: name another label=")
    if len(kept) < len(rows) and without is None:
        first = next(row for row in rows if cells[row] is None)
        raise DatasetError(
            f"{file}: {len(rows) - len(kept):,} of {len(rows):,} rows have no {column}, the first is row {first + 1}; "
            "fill them in, or leave these rows out with unlabelled=drop behind the table's name"
        )
    return kept


def _classes(cells: Sequence[Cell], file: Path, column: str, labels: str) -> tuple[npt.ArrayLike, Sequence[str]]:
    """The class index of every row of the table, -1 without a label, and the class names."""
    path = file.parent / CLASS_FILE
    rows = [row for row, cell in enumerate(cells) if cell is not None]
    found = [cell for cell in cells if cell is not None]
    if all(isinstance(cell, int) for cell in found):
        names = listed_names(file.parent, unique=False)
        indices, classnames = by_number(found, lambda at: f"{file}: row {rows[at] + 1}, {column}", names)
    elif labels == "int":
        odd = next(cell for cell in found if not isinstance(cell, int))
        raise DatasetError(f"{file}: column {column} holds {odd!r}; expected whole numbers: leave out --labels int")
    else:
        listed = read_class_file(path) if path.is_file() else None
        texts = [str(cell) for cell in found]
        indices, classnames = by_name(texts, lambda at: f"{file}: row {rows[at] + 1}", listed, path)
    numbers = np.full(len(cells), -1)
    numbers[rows] = indices
    return numbers, classnames


def _targets(table: Table, options: TableOptions, file: Path) -> tuple[npt.ArrayLike, Sequence[str]]:
    """Targets of every row of the table, and the class names; see the module docstring."""
    columns = options.labels
    wanted = [*columns, *options.unknown]
    if not columns or options.label or (missing := [column for column in wanted if column not in table]):
        what = f"no column {', '.join(missing)}" if columns and not options.label else "labels= and label= differ"
        raise DatasetError(
            f"{file}: {what}; labels= names the column or columns of multi-label data, and there are "
            f"{first_few(table, 10)}"
        )

    def where(row: int) -> str:
        return f"{file}: row {row + 1}"

    if len(columns) > 1:
        return targets_of_columns({column: table[column] for column in columns}, where)
    names = listed_names(file.parent)
    lists, *unknown = (
        [split_cell(cell, where(row), options.separator) for row, cell in enumerate(table[column])] for column in wanted
    )
    return targets_of_names(lists, where, names, unknown[0] if unknown else None)


def _metadata_columns(table: Table, used: set[str | None], wanted: Sequence[str] | None, file: Path) -> Sequence[str]:
    if wanted is None:
        return [column for column in table if column not in used]
    missing = [column for column in wanted if column not in table]
    if missing:
        raise DatasetError(
            f"{file}: no column {', '.join(missing)} of texts or numbers; there are {first_few(table, 10)}"
        )
    return wanted
