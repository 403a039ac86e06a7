"""Folder formats of other programs: one module and one line of `FOLDERS` each."""

from dataclasses import dataclass

from featcache.store.layout import Array

FOLDERS: dict[str, str] = {
    "clip-benchmark": "featcache.transfer.folders.clip_benchmark",
    "npy": "featcache.transfer.folders.npy",
    "tip-adapter": "featcache.transfer.folders.tip_adapter",
    "clip-retrieval": "featcache.transfer.folders.clip_retrieval",
    "lance": "featcache.transfer.folders.lance",
    "huggingface": "featcache.transfer.folders.huggingface",
}
"""Name of a format -> its module, which has two functions.

``write(store, folder, dtype)`` writes the valid rows of a store to an existing folder.
``read(folder, split) -> Foreign | None`` returns None if the folder has another format.
"""


@dataclass
class Foreign:
    """Features (N, D), with labels (N,) or (N, L), ids and class names if present."""

    features: Array
    labels: Array | None = None
    ids: list[str] | None = None
    classnames: list[str] | None = None
