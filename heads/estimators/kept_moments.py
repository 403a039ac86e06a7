"""Moments of an image store by fold: one streamed pass, kept beside the stores, summed over processes.

The file lies at ``<root>/moments/<encoder_key>/<dataset_key>/<key>.safetensors``, its key a hash of the store's
manifest (which holds the checksums of features and labels) and the number of folds: whatever changes a row or a label
gives another file. A damaged or torn file is made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from featcache.errors import FeatcacheError, HeadError
from featcache.processes import rank_and_size, sum_over_ranks
from featcache.store import ImageStore, content_key
from featcache.store.key import checksum
from featcache.store.places import local as atomic
from featcache.store.protocol import FeatureSource, FeatureTable
from heads.solvers.parallel import map_pieces
from heads.solvers.ridge.moments import FOLDS, FoldAssigner, Moments

BLOCK_ROWS = 32_768
"""Rows read at a time, in float32: 64 MiB at D = 512."""
PIECE_ROWS = 8_192
"""Rows a thread takes at a time, in float64: 32 MiB at D = 512; its K Gram matrices cost little to add up beside it."""
_FORMAT = 1


def store_moments(
    store: FeatureTable, folds: int = FOLDS, *, cache: bool = True, distributed: bool = False
) -> list[Moments]:
    """Moments of each fold of the valid rows of an image store; their sum is the moments of all rows.

    Parameters
    ----------
    store : image store
    folds : K
        Folds are stratified as `heads.solvers.ridge.moments.FoldAssigner` deals them out: row r of a class is in
        fold r mod K.
    cache
        Read the moments from their file where there is one, and write it otherwise (stores on this machine alone).
    distributed
        Under a process group every process sums the blocks ``rank, rank + size, ...`` and one all-reduce adds them up.

    Returns
    -------
    K `Moments`, float64. Memory: two float64 pieces, one block, and ``8 K (D² + C D)`` bytes a few times.

    Raises
    ------
    HeadError
        For a number of folds below 1, or a store without valid rows.

    Examples
    --------
    >>> from heads import ResidentStore
    >>> store = ResidentStore(np.eye(3, dtype=np.float32), np.array([0, 1, 1]), ("ant", "bee"))
    >>> parts = store_moments(store, folds=2)
    >>> [part.counts.tolist() for part in parts]
    [[1, 1], [0, 1]]
    """
    if folds < 1:
        raise HeadError(f"folds is {folds}, expected at least 1")
    path = moments_path(store, folds) if cache else None
    shape = (folds, len(store.classnames), int(store.dim))
    found = None if path is None else _read(path, shape)
    if found is None:
        found = _summed(store, shape, rank_and_size() if distributed else (0, 1))
        if distributed:
            sum_over_ranks(found)
        if path is not None and (not distributed or rank_and_size()[0] == 0):
            _write(path, found)
    gram, sums, counts = found
    if not counts.any():
        raise HeadError(f"{store.name}/{store.split} has no valid row; encode images that can be read")
    return [Moments(gram[k], sums[k], counts[k].astype(np.int64)) for k in range(folds)]


def worth_keeping(store: FeatureSource | None, folds: int = FOLDS) -> TypeGuard[ImageStore]:
    """Whether a fit goes through kept moments: of a store's own rows, where they take less room than its features.

    Rows drawn from a store, views stacked and rows in memory carry a store's keys, too, and have other moments.
    """
    if not isinstance(store, ImageStore):
        return False
    dim, n_classes = int(store.dim), len(store.classnames)
    return 2 * len(store) * dim > 8 * folds * (dim + n_classes) * dim


def moments_path(store: FeatureTable, folds: int = FOLDS) -> Path | None:
    """The file of a store's moments; None for what does not lie in a folder of this machine."""
    if not isinstance(store, ImageStore) or not isinstance(store.path, Path):
        return None
    path = store.path
    key = content_key({"manifest": checksum(store.manifest.to_bytes()), "folds": folds, "format": _FORMAT})
    root = path.parent.parent.parent
    return root / "moments" / path.parent.name / path.name / f"{key}.safetensors"


Arrays = Sequence[NDArray[np.float64]]


def _summed(store: FeatureTable, shape: tuple[int, int, int], share: tuple[int, int]) -> Arrays:
    """Gram matrices (K, D, D), class sums (K, C, D) and counts (K, C) of this process's share of the rows."""
    folds, n_classes, dim = shape
    gram, sums, counts = np.zeros((folds, dim, dim)), np.zeros(shape), np.zeros((folds, n_classes))

    def of_piece(x: NDArray[np.floating], y: NDArray[np.integer], fold: NDArray[np.integer]) -> Arrays:
        order = np.argsort(fold, kind="stable")
        ends = np.searchsorted(fold[order], np.arange(folds + 1))
        wide, labels = x[order].astype(np.float64), y[order]
        parts = [Moments.of_wide(wide[a:b], labels[a:b], n_classes) for a, b in pairwise(ends.tolist())]
        return [np.stack([getattr(part, key) for part in parts]) for key in ("xtx", "class_sums", "counts")]

    for piece in map_pieces(_blocks(store, folds, share), of_piece, rows=PIECE_ROWS):
        for total, part in zip((gram, sums, counts), piece, strict=True):
            total += part
    return gram, sums, counts


def _blocks(store: FeatureTable, folds: int, share: tuple[int, int]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Features, labels and folds of the blocks of this process; folds count the rows of all."""
    assign = FoldAssigner(len(store.classnames), folds)
    rank, size = share
    if size == 1:
        for features, labels in store.blocks(BLOCK_ROWS):
            yield features, labels, assign(labels)
        return
    labels, valid = store.labels, store.valid
    fold = np.full(len(labels), -1)
    fold[valid] = assign(labels[valid])
    for start in range(rank * BLOCK_ROWS, len(labels), size * BLOCK_ROWS):
        rows = start + np.flatnonzero(valid[start : start + BLOCK_ROWS])
        yield store.gather(rows).astype(np.float32), labels[rows], fold[rows]


def _read(path: Path, shape: tuple[int, int, int]) -> Arrays | None:
    """The arrays in a file; None where there is none, or it is not whole."""
    folds, n_classes, dim = shape
    try:
        tensors = from_bytes(path.read_bytes())
        found = [tensors["xtx"], tensors["class_sums"], tensors["counts"]]
        whole = str(tensors["digest"].tobytes().decode()) == _digest(found)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    shapes = [(folds, dim, dim), (folds, n_classes, dim), (folds, n_classes)]
    return found if whole and [array.shape for array in found] == shapes else None


def _write(path: Path, arrays: Arrays) -> None:
    """Write the file, whole or not at all; where nobody may write, the moments are simply made again next time."""
    if not os.access(path.parent.parent.parent.parent, os.W_OK):
        return
    tensors = dict(zip(("xtx", "class_sums", "counts"), arrays, strict=True))
    digest = np.frombuffer(_digest(arrays).encode(), np.uint8)
    try:
        atomic.put(path, to_bytes({**tensors, "digest": digest}))
    except FeatcacheError:
        return


def _digest(arrays: Arrays) -> str:
    return checksum(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
