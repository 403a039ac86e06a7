"""Folder formats of other programs: one module and one line of `FOLDERS` each, see `FolderFormat`."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from featcache.store.layout import Array

if TYPE_CHECKING:
    from featcache.store import ImageStore

FOLDERS: dict[str, str] = {
    "clip-benchmark": "featcache.transfer.folders.clip_benchmark",
    "npy": "featcache.transfer.folders.npy",
    "tip-adapter": "featcache.transfer.folders.tip_adapter",
    "clip-retrieval": "featcache.transfer.folders.clip_retrieval",
    "lance": "featcache.transfer.folders.lance",
    "huggingface": "featcache.transfer.folders.huggingface",
}
"""Name of a format -> its module."""


@dataclass
class Foreign:
    """Features (N, D), with labels (N,) or (N, L), ids and class names if present."""

    features: Array
    labels: Array | None = None
    ids: list[str] | None = None
    classnames: list[str] | None = None


class FolderFormat(Protocol):
    """Protocol of the modules in `FOLDERS`."""

    def write(self, store: "ImageStore", folder: Path, dtype: np.dtype) -> None:
        """Write the valid rows of a store to an existing folder."""

    def read(self, folder: Path, split: str) -> Foreign | None:
        """Features, and labels, ids and class names if present; None if the folder has another format."""


def folder_format(name: str) -> FolderFormat:
    """The format with this name."""
    return cast(FolderFormat, import_module(FOLDERS[name]))
