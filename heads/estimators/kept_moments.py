"""Moments of an image store by fold: computed in one streamed pass, and cached in a file beside the stores.

The file is ``<root>/moments/<encoder_key>/<dataset_key>/<key>.safetensors``. Its key is a hash of the number of folds
and the store's manifest, which holds checksums of features and labels: other rows or labels have another file. A
damaged file is replaced.
"""

from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from featcache.errors import HeadError
from featcache.processes import rank_and_size, sum_over_ranks
from featcache.store import ImageStore, content_key
from featcache.store.key import checksum
from featcache.store.places import local as atomic
from featcache.store.protocol import FeatureSource, FeatureTable
from heads.rows.device import device_rows
from heads.rows.samples import Float, Samples
from heads.solvers.folds import FOLDS, FoldAssigner, in_folds
from heads.solvers.parallel import Blocks
from heads.solvers.ridge.moments import Moments, fold_moments

Arrays = list[Float]
"""Gram matrices (K, D, D), class sums (K, C, D) and counts (K, C): the fields `NAMES` of K `Moments`."""
NAMES = ("xtx", "class_sums", "counts")
BLOCK_ROWS = 131_072
"""Rows read at a time: 128 MiB of float16 at D = 512."""
_FORMAT = 1


def store_moments(
    store: FeatureTable, folds: int = FOLDS, *, cache: bool = True, distributed: bool = False
) -> list[Moments]:
    """Moments of each fold of the valid rows of an image store; they add up to the moments of all rows.

    Parameters
    ----------
    store : image store
    folds : K; stratified folds: row r of a class is in fold r mod K (`heads.solvers.folds.FoldAssigner`)
    cache : whether to read the moments from their file, or write it if there is none (stores in local folders only)
    distributed
        In a process group, each process sums the blocks ``rank, rank + size, ...``, followed by one all-reduce.

    Returns
    -------
    K `Moments`, float64. Memory: one float64 piece per thread, one block, and a few times ``8 K (D² + C D)`` bytes.

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
    dim, n_classes = int(store.dim), len(store.classnames)
    found = None if path is None else _read(path, (folds, n_classes, dim))
    if found is None:
        rank, size = rank_and_size() if distributed else (0, 1)
        blocks = _blocks(store, folds, rank, size)
        parts = fold_moments(blocks, dim=dim, n_targets=n_classes, folds=folds)
        columns = zip(*((part.xtx, part.class_sums, part.counts) for part in parts), strict=True)
        found = [np.stack(column).astype(np.float64, copy=False) for column in columns]
        if distributed:
            sum_over_ranks(found)
        if path is not None and rank == 0:
            _write(path, found)
    gram, sums, counts = found
    if not counts.any():
        raise HeadError(f"{store.name}/{store.split} has no valid row; encode images that can be read")
    return [Moments.of_classes(gram[k], sums[k], counts[k].astype(np.int64)) for k in range(folds)]


def moments_by_fold(samples: Samples) -> list[Moments]:
    """Moments of labelled rows by stratified fold: from the cache for a large store, else from one pass."""
    if worth_keeping(samples.store):
        return store_moments(samples.store)
    n_classes = len(samples.classnames)
    blocks = in_folds(blocks_in_place(samples), n_classes)
    return fold_moments(blocks, dim=samples.dim, n_targets=n_classes, folds=FOLDS)


def blocks_in_place(samples: Samples) -> Blocks:
    """Blocks ``(X, y)``; rows on a GPU are a single block of tensors there."""
    resident = device_rows(samples)
    if resident is None:
        yield from samples.blocks()
    else:
        yield resident


def worth_keeping(store: FeatureSource | None, folds: int = FOLDS) -> TypeGuard[ImageStore]:
    """Whether a fit uses cached moments: for an image store, if they are smaller than its features.

    A sample of a store, stacked views and rows in memory have the keys of a store, but other moments.
    """
    if not isinstance(store, ImageStore):
        return False
    dim, n_classes = int(store.dim), len(store.classnames)
    return 2 * len(store) * dim > 8 * folds * (dim + n_classes) * dim


def moments_path(store: FeatureTable, folds: int = FOLDS) -> Path | None:
    """File for the moments of a store; None if the store is not in a local folder."""
    if not isinstance(store, ImageStore) or not isinstance(store.path, Path):
        return None
    path = store.path
    key = content_key({"manifest": checksum(store.manifest.to_bytes()), "folds": folds, "format": _FORMAT})
    return path.parents[2] / "moments" / path.parent.name / path.name / f"{key}.safetensors"


def _blocks(store: FeatureTable, folds: int, rank: int, size: int) -> Blocks:
    """Blocks of this process, with folds that are assigned over the rows of all processes."""
    n_classes = len(store.classnames)
    if size == 1:
        dtype = np.float16 if isinstance(store, ImageStore) else np.float32  # as stored: the faster Gram products
        yield from in_folds(store.blocks(BLOCK_ROWS, dtype), n_classes, folds)
        return
    labels, valid = store.labels, store.valid
    fold = np.full(len(labels), -1)
    fold[valid] = FoldAssigner(n_classes, folds)(labels[valid])
    for start in range(rank * BLOCK_ROWS, len(labels), size * BLOCK_ROWS):
        rows = start + np.flatnonzero(valid[start : start + BLOCK_ROWS])
        yield store.gather(rows), labels[rows], None, fold[rows]


def _read(path: Path, shape: tuple[int, int, int]) -> Arrays | None:
    """The arrays in a file; None if it is missing or damaged."""
    folds, n_classes, dim = shape
    try:
        tensors = from_bytes(path.read_bytes())
        found = [tensors[name] for name in NAMES]
        whole = str(tensors["digest"].tobytes().decode()) == _digest(found)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    shapes = [(folds, dim, dim), (folds, n_classes, dim), (folds, n_classes)]
    return found if whole and [array.shape for array in found] == shapes else None


def _write(path: Path, arrays: Arrays) -> None:
    """Write the file atomically; on a full or read-only disk nothing: the moments are computed again next time."""
    tensors = dict(zip(NAMES, arrays, strict=True)) | {"digest": np.frombuffer(_digest(arrays).encode(), np.uint8)}
    with suppress(OSError):
        atomic.put(path, to_bytes(tensors))


def _digest(arrays: Arrays) -> str:
    return checksum(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
