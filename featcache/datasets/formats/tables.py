"""Reading a Parquet, CSV, TSV or JSON lines table into columns of plain Python values.

A cell is a string, an integer, or None if empty. Floats become integers if they are whole (pandas turns a column of
years with one gap into floats), else strings. CSV and TSV have no types: there a column is of integers if every
non-empty cell is written as one (``007`` is a string). A column with other cells, such as lists, is left out, unless it
is asked for; its lists then become JSON strings.
"""

import contextlib
import csv
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from featcache.errors import DatasetError
from featcache.parameters import check_regular
from featcache.prompts.text_files import read_lines

Cell: TypeAlias = str | int | None
Table: TypeAlias = dict[str, list[Cell]]
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def read_table(path: Path, nested: Collection[str] = ()) -> Table:
    """Column name -> N cells of a table, read by its extension, one of `FORMATS`.

    Lists in the columns `nested` are kept, as JSON strings; other columns with nested cells are left out. DatasetError
    if the file cannot be read as its extension says; it names ``file:line`` where there are lines.
    """
    if path.suffix.lower() not in FORMATS:
        raise DatasetError(f"{path}: expected a table with one of the extensions {' '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()](path, nested)


def parse_delimited(lines: Sequence[str], source: str, delimiter: str = ",") -> Table:
    """Parse a CSV or TSV table with a header; errors name the `source`. A quoted cell may span several lines.

    DatasetError if the header is missing or names a column twice, a row has too many or too few cells, or quotes are
    wrong.

    >>> parse_delimited(["file,year", "'a.jpg',2016", "b.jpg,"], "t.csv")
    {'file': ["'a.jpg'", 'b.jpg'], 'year': [2016, None]}
    """
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    filled = (cells for cells in rows if cells)
    try:
        header = next(filled, [])
        _check_header(header, source)
        columns: dict[str, list[str]] = {name: [] for name in header}
        for cells in filled:
            if len(cells) != len(header):
                raise DatasetError(
                    f"{source}:{rows.line_num}: got {len(cells)} cells, the header has {len(header)} columns; "
                    "quote cells that hold the delimiter"
                )
            for name, cell in zip(header, cells, strict=True):
                columns[name].append(cell)
    except csv.Error as error:
        raise DatasetError(f"{source}:{rows.line_num}: {error}; check the quotes of the cells") from error
    return {name: _typed(cells) for name, cells in columns.items()}


def _check_header(header: Sequence[str], source: str) -> None:
    if not header:
        raise DatasetError(f"{source}: empty; expected a line of column names, then one line per sample")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or "" in header:
        shown = ", ".join(repr(name) for name in twice) or "''"
        raise DatasetError(f"{source}:1: column {shown} occurs twice or has no name; name each column once")


def _typed(cells: list[str]) -> list[Cell]:
    if any(cells) and all(not cell or INTEGER.fullmatch(cell) for cell in cells):
        return [int(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


def parse_json_lines(lines: Sequence[str], source: str, nested: Collection[str] = ()) -> Table:
    """Parse JSON lines; a missing key is an empty cell. DatasetError if a line is no object, or has a key twice.

    >>> parse_json_lines(['{"file": "a.jpg", "year": 2016}', '{"file": "b.jpg"}'], "t.jsonl")
    {'file': ['a.jpg', 'b.jpg'], 'year': [2016, None]}
    """
    columns: dict[str, list[object]] = {}
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        for name, value in _json_object(line, f"{source}:{number}").items():
            cells = columns.setdefault(name, [])
            cells += [None] * (count - len(cells))
            cells.append(value)
        count += 1
    if not count:
        raise DatasetError(f"{source}: empty; expected one JSON object per line")
    return _plain({name: cells + [None] * (count - len(cells)) for name, cells in columns.items()}, source, nested)


def _json_object(line: str, where: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f'{where}: not a JSON object ({error}); expected {{"path": ..., ...}}') from error
    if not isinstance(found, dict):
        raise DatasetError(f"{where}: got {type(found).__name__}; expected one JSON object per line")
    return found


def _plain(columns: dict[str, list[object]], source: str, nested: Collection[str] = ()) -> Table:
    table: Table = {}
    for name, cells in columns.items():
        kept = (json.dumps(cell) if name in nested and isinstance(cell, list) else cell for cell in cells)
        with contextlib.suppress(TypeError):  # a nested cell
            table[name] = [_cell(cell) for cell in kept]
    if not table:
        raise DatasetError(f"{source}: no column of texts or numbers; expected at least a path and a label")
    return table


def _cell(value: object) -> Cell:
    """A cell of a table; TypeError if it is neither string nor number."""
    match value:
        case None | "":
            return None
        case bool() | int():
            return int(value)
        case float():
            whole = value.is_integer() and abs(value) < 2**53
            return None if math.isnan(value) else int(value) if whole else repr(value)
        case str():
            return value
    raise TypeError


def metadata_column(cells: Sequence[object]) -> list[Any]:
    """A metadata column: integers if all cells are, else strings, ``""`` for an empty cell."""
    if all(isinstance(cell, int) for cell in cells):
        return list(cells)
    return ["" if cell is None else str(cell) for cell in cells]


def _read_parquet(path: Path, nested: Collection[str] = ()) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        check_regular(path)
        schema = parquet.read_schema(path)
        lists = [field.name for field in schema if field.name in nested and pa.types.is_list(field.type)]
        left_out = pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary
        flat = [field.name for field in schema if not any(check(field.type) for check in left_out)]
        table = parquet.read_table(path, columns=[*flat, *lists])
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path}: cannot be read as Parquet ({error}); check the path and the file") from error
    if len(set(table.column_names)) != len(table.column_names):
        raise DatasetError(f"{path}: a column name occurs twice; name each column once")
    columns = {name: _as_python(pa, table[name]) for name in flat} | {name: table[name].to_pylist() for name in lists}
    return _plain(columns, str(path), nested)


def _as_python(pa: Any, column: Any) -> list[object]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    simple = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not simple and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        column = column.cast(pa.string())  # dates and decimals as strings
    found: list[object] = column.to_pylist()
    return found


FORMATS: dict[str, Callable[[Path, Collection[str]], Table]] = {
    ".parquet": _read_parquet,
    ".csv": lambda path, nested: parse_delimited(read_lines(path), str(path)),
    ".tsv": lambda path, nested: parse_delimited(read_lines(path), str(path), "\t"),
    ".jsonl": lambda path, nested: parse_json_lines(read_lines(path), str(path), nested),
}
"""Extension -> reader."""
