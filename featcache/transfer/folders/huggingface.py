"""Hugging Face data sets on disk (``datasets.load_from_disk``): ``id``, ``label`` (a ClassLabel) and ``features``.

If class names are not unique (as in ImageNet), ``label`` is a number and ``class`` the name.
"""

import json
import os
from pathlib import Path

import numpy as np

from featcache.errors import DatasetError, needs
from featcache.store import ImageStore
from featcache.store.places.local import begin, give_up, sweep_partials_of, sync_files, sync_folder
from featcache.transfer.foreign import check_files, of_table
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import CLASSNAMES, table_of

EXTRA = "Hugging Face data sets need the package datasets: pip install 'featcache[hf]'"


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    with needs(EXTRA):
        import datasets
    table = table_of(store, dtype)
    found = datasets.Dataset(table.replace_schema_metadata(None))
    if not store.multilabel and len(set(store.classnames)) == len(store.classnames):  # ClassLabel requires unique names
        found = found.remove_columns("class").cast_column("label", datasets.ClassLabel(names=list(store.classnames)))
    found.info.description = json.dumps({CLASSNAMES.decode(): list(store.classnames)})
    path = Path(os.path.realpath(folder))
    sweep_partials_of(path)
    fresh = begin(path)  # datasets would write over the files of an earlier export, row by row
    try:
        found.save_to_disk(str(fresh))
        sync_files(fresh)
        path.mkdir(parents=True, exist_ok=True)
        for file in sorted(fresh.iterdir()):
            os.replace(file, path / file.name)
        sync_folder(path)
    finally:
        give_up(fresh)


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`; for a DatasetDict, the split."""
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return None
    check_files(folder.rglob("*"))
    with needs(f"{folder}: {EXTRA}"):
        import datasets
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DatasetError(f"{folder}: no split {split!r}; expected one of {', '.join(found)}; pass --split")
        found = found[split]
    result = of_table(found.with_format("arrow")[:], folder)
    label = found.features.get("label")
    if isinstance(label, datasets.ClassLabel):
        result.classnames = list(label.names)
    elif result.classnames is None and CLASSNAMES.decode() in (found.info.description or ""):
        result.classnames = json.loads(found.info.description)[CLASSNAMES.decode()]
    return result
