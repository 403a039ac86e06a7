"""``features.npy`` (N, D), ``labels.npy`` (N,), ``ids.txt``, ``classes.txt``; or pt files, as WiSE-FT caches them."""

from pathlib import Path

import numpy as np

from featcache.store import ImageStore
from featcache.store.places.targets import replacing_all
from featcache.transfer.foreign import classes_beside, entries_of, read_file
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import ids_of, row_blocks, text_lines


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    names = ("ids.txt", "classes.txt", "features.npy", "labels.npy")
    shape = (int(store.valid.sum()), *store.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing_all([folder / name for name in names]) as (ids, classes, values, labels):
        ids.write(text_lines(ids_of(store)))
        classes.write(text_lines(store.classnames))
        np.lib.format.write_array_header_1_0(values, header)
        for features, _, _ in row_blocks(store, dtype):
            values.write(np.ascontiguousarray(features).data)
        np.lib.format.write_array(labels, store.truth[store.valid])


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`."""
    for name in ("features.pt", "features.npy", f"features_{split}.npy"):
        if (folder / name).is_file():
            found = read_file(folder / name)
            ids = folder / "ids.txt"
            found.ids = entries_of(ids) if ids.is_file() else found.ids
            found.classnames = classes_beside(folder) or found.classnames
            return found
    return None
