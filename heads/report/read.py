"""Read results files of featcache and WiSE-FT.

WiSE-FT's rows have the fields of its command line, a float ``alpha`` for the models of a sweep, and metrics such as
``"ImageNet:top1"``; rows whose ``alpha`` is a list were written after each epoch of training.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import check_regular
from heads.evaluation.metrics import Row
from heads.report.rows import alpha_of, name_of

NO_IDENTITY = ("current_epoch", "fit_seconds", "splits", "training_rows")
LISTS = {"shifted_left_out", "training_rows"}  # fields with names of data sets
LONGEST = 60  # characters of the text that distinguishes heads of the same name


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """All rows of results files, in order; HeadError for a file that cannot be read or has no results.

    An unfinished last line, left by a killed process, is skipped with a FeatcacheWarning.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            check_regular(path)
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HeadError(f"{path}: cannot be read as results ({error}); expected a file of JSON lines") from error
        lines = text.splitlines()
        found = [row for number, line in enumerate(lines, 1) if (row := _row(line, path, number, len(lines)))]
        if not any(":" in key for row in found for key in row):
            raise HeadError(
                f"{path}: no row with a key '<data set>:<metric>'; expected what `featcache evaluate` appends"
            )
        rows += found
    return rows


def _row(line: str, path: str | Path, number: int, last: int) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if number < last and line.strip():
            raise HeadError(f"{path}:{number}: not JSON ({error}); repair or remove that line") from None
        if line.strip():
            said = f"{path}:{number}: the last line is incomplete and is skipped; run the command that wrote it again"
            warnings.warn(said, FeatcacheWarning, stacklevel=3)
        return None
    if not isinstance(row, dict):
        raise HeadError(f"{path}:{number}: {line[:40]!r} is not a JSON object; expected one results row per line")
    return row


def is_epoch(row: Row) -> bool:
    """Whether this is a row that WiSE-FT wrote after an epoch of training."""
    return isinstance(row.get("alpha"), list) and "current_epoch" in row


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row per head; values of later rows of the same head replace those of earlier ones, or are added.

    Rows are of the same head if name, model, alpha, parameters and splits are equal. If different heads share a name,
    what distinguishes them is appended to it.

    >>> first, second = {"head": "ridge", "a:top1": 0.5}, {"head": "ridge", "a:top1": 0.6, "b:top1": 0.4}
    >>> latest([first, second])
    [{'head': 'ridge', 'a:top1': 0.6, 'b:top1': 0.4}]
    >>> [row["head"] for row in latest([{**first, "encoder": "tiny"}, {**second, "encoder": "ViT-B-32"}])]
    ['ridge (tiny)', 'ridge (ViT-B-32)']
    """
    merged: dict[str, Row] = {}
    for row in rows:
        key = json.dumps(_identity(row), sort_keys=True, default=str)
        before = merged.get(key, {})
        both = {field: [*before.get(field, ()), *row.get(field, ())] for field in LISTS & (before.keys() | row.keys())}
        merged[key] = {**before, **row, **{field: list(dict.fromkeys(names)) for field, names in both.items()}}
    return _distinct(list(merged.values()))


def by_split(rows: Sequence[Row]) -> list[Row]:
    """Rows in which different splits of a data set have different names: ``pets/val:top1``, ``pets/test:top1``.

    Rows without a record of their splits are left as they are.

    >>> val = {"head": "ridge", "pets:top1": 0.9, "splits": {"pets": "pets/val"}}
    >>> test = {"head": "ridge", "pets:top1": 0.8, "splits": {"pets": "pets/test"}}
    >>> [key for row in by_split([val, test]) for key in row if ":" in key]
    ['pets/val:top1', 'pets/test:top1']
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, split in row.get("splits", {}).items():
            found.setdefault(name, set()).add(split)
    shared = {name for name, splits in found.items() if len(splits) > 1 or splits & (found.keys() - {name})}
    renamed = []
    for row in rows:
        own = {name: split for name, split in row.get("splits", {}).items() if name in shared}
        full = {name: name if name == split else f"{name}/{split.rpartition('/')[2]}" for name, split in own.items()}
        renamed.append(_renamed(row, full))
    return renamed


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """A row with data sets renamed."""
    if not names:
        return row
    renamed: Row = {}
    for key, value in row.items():
        name, colon, metric = key.rpartition(":")
        renamed[f"{names.get(name, name)}{colon}{metric}"] = value
    for field in LISTS & row.keys():
        renamed[field] = [names.get(name, name) for name in row[field]]
    if "shifted_worst_domain" in row:
        renamed["shifted_worst_domain"] = names.get(row["shifted_worst_domain"], row["shifted_worst_domain"])
    renamed["splits"] = {names.get(name, name): split for name, split in row["splits"].items()}
    return renamed


def _identity(row: Row) -> dict[str, object]:
    """The fields of a row that identify the head."""
    return {
        key: value
        for key, value in row.items()
        if ":" not in key and not key.startswith("shifted_") and key not in NO_IDENTITY
    }


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows, with heads renamed so that their names are distinct."""
    uses = Counter((name_of(row), alpha_of(row)) for row in rows)
    clashing = {name for (name, _), count in uses.items() if count > 1}
    alike = {name: [row for row in rows if name_of(row) == name] for name in clashing}
    shown: list[Row] = []
    for row in rows:
        name = name_of(row)
        suffix = f" ({_difference(row, alike[name])})" if name in clashing else ""
        shown.append({**row, "head": f"{name}{suffix}"})
    return shown


def _difference(row: Row, others: Sequence[Row]) -> str:
    """Short text of the fields in which heads of the same name differ, or the row's position among them."""
    flat = [_flat(_identity(other)) for other in others]
    own = _flat(_identity(row))
    fields = [key for key in own if key != "alpha" and len({one.get(key) for one in flat}) > 1]
    texts = [own[key] if key in ("encoder", "model") else f"{key.rpartition('.')[2]} {own[key]}" for key in fields]
    text = ", ".join(dict.fromkeys(texts))
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…") or f"{others.index(row) + 1}"


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested fields as text by dotted name; splits as their names."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= _flat(item, f"{prefix}{key}.")
        elif key in ("fitted_on", "chosen_on") and isinstance(item, list):
            found[key] = "+".join(str(split.get("name")) for split in item if isinstance(split, Mapping))
        else:
            found[f"{prefix}{key}"] = str(item)
    return found
