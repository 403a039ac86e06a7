"""``wilds:fmow:DIR`` and ``wilds:iwildcam:DIR``: data sets of WILDS (Koh et al., arXiv 2012.07421) in its own layout.

======== ============================================================= ===============================================
name     files                                                         metadata columns
======== ============================================================= ===============================================
fmow     ``rgb_metadata.csv``, ``country_code_mapping.csv``,           region (empty for unknown countries), year
         ``images/rgb_img_<row>.png``
iwildcam ``metadata.csv``, ``train/<filename>``                        location, sequence
======== ============================================================= ===============================================

DIR has these files, or the folder that WILDS makes for them (``fmow_v1.1``, ``iwildcam_v2.0``).

Splits. ``train``, ``id_val``, ``id_test``, ``val``, ``test``: the official ones. In fmow, images from 2013 on are out
of distribution, and those from 2016 on are ``test``; sequestered images are left out.

Class order. That of WILDS: the lists ``fmow`` and ``iwildcam`` of `featcache.prompts.class_lists`.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, sizes_and_stamps
from featcache.errors import DatasetError
from featcache.prompts.class_lists import load_class_list
from featcache.prompts.text_files import read_lines

Record = dict[str, str]
SPLITS = ("train", "id_val", "id_test", "val", "test")
WISE_FT = {
    ("fmow", "id_test"): "FMOWID",
    ("fmow", "test"): "FMOWOOD",
    ("iwildcam", "id_test"): "IWildCamID",
    ("iwildcam", "test"): "IWildCamOOD",
}
"""(data set, split) -> default name, as in WiSE-FT's results; other splits have the data set's name."""
VAL_YEAR, TEST_YEAR = 2013, 2016


Rows = tuple[list[str], list[int], dict[str, list[str] | list[int]]]
"""The samples of a split: ids, class indices, metadata columns."""


def open_wilds(argument: str, split: str, *, name: str | None = None) -> ImageFiles:
    """Open one split of a WILDS data set; the default name is one of `WISE_FT`, or that of the data set."""
    kind, colon, place = argument.partition(":")
    if kind not in KINDS or not colon:
        raise DatasetError(f"wilds:{argument}: expected wilds:NAME:DIR with one of the names {', '.join(KINDS)}")
    if split not in SPLITS:
        raise DatasetError(f"wilds:{kind}: no split {split!r}; expected one of {', '.join(SPLITS)}")
    table, rows_of = KINDS[kind]
    base = local_path(f"wilds:{kind}", place)
    folder = next(
        (inner for inner in (base, *sorted(base.glob(f"{kind}_v*"))[::-1]) if (inner / table).is_file()), None
    )
    if folder is None:
        raise DatasetError(f"{base}: no {table} in it, nor in {kind}_v*; check the path")
    ids, labels, metadata = rows_of(folder, split)
    if not ids:
        raise DatasetError(f"{folder / table}: no row of split {split!r}; restore the file")
    files = sizes_and_stamps(folder, ids, folder, "restore them")
    index = file_index(ids, files, labels, load_class_list(kind).names, metadata)
    return files_below(name or WISE_FT.get((kind, split), kind), split, index, folder)


def _read(file: Path, columns: Sequence[str]) -> list[Record]:
    """The rows of a CSV file; DatasetError where it lacks a column."""
    try:
        rows = list(csv.DictReader(read_lines(file), strict=True))
    except csv.Error as error:
        raise DatasetError(f"{file}: not a CSV file ({error}); restore it") from error
    missing = [column for column in columns if not rows or rows[0].get(column) is None]
    if missing:
        raise DatasetError(f"{file}: no column {', '.join(missing)}; expected the file of WILDS: restore it")
    return rows


def _whole(text: str | None, file: Path, row: int) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise DatasetError(f"{file}: row {row + 1} holds {text!r}; expected a whole number: restore it") from None


def _fmow(folder: Path, split: str) -> Rows:
    file = folder / "rgb_metadata.csv"
    rows = _read(file, ("split", "timestamp", "category", "country_code"))
    countries = _read(folder / "country_code_mapping.csv", ("alpha-3", "region"))
    region = {row["alpha-3"]: row["region"] for row in countries}
    years = [_whole(row["timestamp"][:4], file, number) for number, row in enumerate(rows)]
    part = split.removeprefix("id_")
    earliest, latest = {"val": (VAL_YEAR, TEST_YEAR), "test": (TEST_YEAR, 9999)}.get(split, (0, VAL_YEAR))
    kept = [n for n, row in enumerate(rows) if row["split"] == part and earliest <= years[n] < latest]
    place = {key: number for number, key in enumerate(load_class_list("fmow").keys)}
    if odd := next((rows[n]["category"] for n in kept if rows[n]["category"] not in place), None):
        raise DatasetError(f"{file}: category {odd!r} is not one of the {len(place)}; restore the file")
    return (
        [f"images/rgb_img_{n}.png" for n in kept],
        [place[rows[n]["category"]] for n in kept],
        {"region": [region.get(rows[n]["country_code"], "") for n in kept], "year": [years[n] for n in kept]},
    )


def _iwildcam(folder: Path, split: str) -> Rows:
    file = folder / "metadata.csv"
    rows = _read(file, ("split", "location_remapped", "sequence_remapped", "filename", "y"))
    kept = [n for n, row in enumerate(rows) if row["split"] == split]
    columns = {name: [_whole(rows[n][f"{name}_remapped"], file, n) for n in kept] for name in ("location", "sequence")}
    labels = [_whole(rows[n]["y"], file, n) for n in kept]
    return [f"train/{rows[n]['filename']}" for n in kept], labels, {**columns}


KINDS: dict[str, tuple[str, Callable[[Path, str], Rows]]] = {
    "fmow": ("rgb_metadata.csv", _fmow),
    "iwildcam": ("metadata.csv", _iwildcam),
}
"""Name -> the table of its images, and a function that reads one split of it."""
