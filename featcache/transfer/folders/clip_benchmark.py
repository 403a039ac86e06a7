"""CLIP_benchmark's feature folders: ``features_SPLIT.pt`` (N, D) and ``targets_SPLIT.pt`` (N,).

All splits go into one folder, as for CLIP_benchmark's linear probe (``train``, ``val`` and ``test``). Class names are
added in ``classes.txt``, which CLIP_benchmark does not read.
"""

from pathlib import Path

import numpy as np

from featcache.store import ImageStore
from featcache.store.places.targets import replacing, write_target
from featcache.transfer.foreign import classes_beside, read_file
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import text_lines


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    import torch

    write_target(folder / "classes.txt", text_lines(store.classnames))
    features, labels = store.numpy(dtype)
    for what, values in (("features", features), ("targets", labels)):
        with replacing(folder / f"{what}_{store.split}.pt") as file:
            torch.save(torch.from_numpy(np.ascontiguousarray(values)), file)


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`."""
    file = folder / f"features_{split}.pt"
    if not file.is_file():
        return None
    found = read_file(file)
    found.classnames = found.classnames or classes_beside(folder)
    return found
