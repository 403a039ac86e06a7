"""CLIP_benchmark's feature folders: ``features_SPLIT.pt`` (N, D) and ``targets_SPLIT.pt`` (N,).

Splits are written into one folder after each other, as its linear probe keeps ``train``, ``val`` and ``test``.
"""

from pathlib import Path

import numpy as np

from featcache.store import ImageStore
from featcache.store.places.targets import replacing
from featcache.transfer.foreign import read_file
from featcache.transfer.formats import Foreign


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FolderFormat`."""
    import torch

    features, labels = store.numpy(dtype)
    for what, values in (("features", features), ("targets", labels)):
        with replacing(folder / f"{what}_{store.split}.pt") as file:
            torch.save(torch.from_numpy(np.ascontiguousarray(values)), file)


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FolderFormat`."""
    file = folder / f"features_{split}.pt"
    return read_file(file) if file.is_file() else None
