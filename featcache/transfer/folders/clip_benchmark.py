"""CLIP_benchmark's feature folders: ``features_SPLIT.pt`` (N, D) and ``targets_SPLIT.pt`` (N,).

All splits go into one folder, as for CLIP_benchmark's linear probe (``train``, ``val`` and ``test``). Class names are
added in ``classes.txt``, which CLIP_benchmark does not read.
"""

from pathlib import Path

import numpy as np

from featcache.store import ImageStore
from featcache.transfer.foreign import classes_beside, read_file
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import write_tensors


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    features, labels = store.numpy(dtype)
    write_tensors(store, folder, {f"features_{store.split}.pt": features, f"targets_{store.split}.pt": labels})


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`."""
    file = folder / f"features_{split}.pt"
    if not file.is_file():
        return None
    found = read_file(file)
    found.classnames = found.classnames or classes_beside(folder)
    return found
