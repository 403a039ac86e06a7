"""Folders of features as other programs lay them out; one file and one line of `FOLDERS` each.

A module has ``write(store, folder, dtype)``, which fills a folder that is there, and ``read(folder, split)``, which
returns the features, or None for a folder of another kind.
"""

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
    """Features (N, D), with the labels (N,) or (N, L), ids and class names that were found beside them."""

    features: Array
    labels: Array | None = None
    ids: list[str] | None = None
    classnames: list[str] | None = None


class FolderFormat(Protocol):
    """What a module of `FOLDERS` has."""

    def write(self, store: "ImageStore", folder: Path, dtype: np.dtype) -> None:
        """Write the valid rows of a store."""

    def read(self, folder: Path, split: str) -> Foreign | None:
        """Features, with labels, ids and class names where there are any; None for a folder of another kind."""


def folder_format(name: str) -> FolderFormat:
    """The format of a name."""
    return cast(FolderFormat, import_module(FOLDERS[name]))
