"""Tip-Adapter's cache: ``keys_16shots.pt`` (D, N), ``values_16shots.pt`` (N, C), one-hot; ``test_f.pt``, ``test_l.pt``.

The keys are the training split; if there are several, ``--split 16shots`` selects one.
"""

from pathlib import Path

import numpy as np

from featcache.errors import DatasetError
from featcache.store import ImageStore
from featcache.transfer.foreign import classes_beside, read_array, read_file
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import write_tensors


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    features, labels = store.numpy(dtype)
    files = {f"{store.split}_f.pt": features, f"{store.split}_l.pt": labels}
    if store.split == "train":
        shots, hot = int(np.bincount(labels).max()), np.eye(len(store.classnames), dtype=dtype)[labels]
        files = {f"keys_{shots}shots.pt": features.T, f"values_{shots}shots.pt": hot}
    write_tensors(store, folder, files)


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`."""
    if (folder / f"{split}_f.pt").is_file():
        found = read_file(folder / f"{split}_f.pt")
        if (folder / f"{split}_l.pt").is_file():
            found.labels = read_array(folder / f"{split}_l.pt")
        found.classnames = classes_beside(folder)
        return found
    keys = sorted(folder.glob("keys_*shots.pt" if split == "train" else f"keys_{split}.pt"))
    if not keys:
        return None
    if len(keys) > 1:
        names = ", ".join(file.stem.removeprefix("keys_") for file in keys)
        raise DatasetError(f"{folder}: keys of {names}; choose one with --split")
    found, hot = read_file(keys[0]), read_array(keys[0].with_name(keys[0].name.replace("keys", "values", 1)))
    if found.features.ndim != 2 or hot.ndim != 2 or len(hot) != found.features.shape[1]:
        raise DatasetError(
            f"{keys[0]}: keys are {found.features.shape} and values {hot.shape}; expected (D, N) and one-hot (N, C)"
        )
    if not ((hot == 0) | (hot == 1)).all() or not (hot.sum(axis=1) == 1).all():
        raise DatasetError(f"{keys[0]}: its values are not one-hot; expected one 1 in each row")
    found.features, found.labels = found.features.T, hot.argmax(axis=1)
    found.classnames = classes_beside(folder) or [f"class {label}" for label in range(hot.shape[1])]
    return found
