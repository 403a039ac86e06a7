"""Checks of the evaluated splits against the heads, before anything is merged or written."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from featcache.datasets import dataset_key
from featcache.datasets.base import Dataset
from featcache.encoding.pipeline import NO_CONTENT, default_workers
from featcache.store import resolve_root
from heads import LinearHead, ResidentStore
from heads.evaluation.evaluate import EvaluateOptions, reportable, subsets_of
from heads.evaluation.passes import ClassSubset, jobs_for
from heads.fitted.provenance import ROLES, rows_of


def check_splits(
    heads: Sequence[LinearHead],
    datasets: Sequence[Dataset],
    options: EvaluateOptions,
    *,
    labels: Sequence[str] = (),
    class_subset: ClassSubset = None,
    root: str | Path | None = None,
) -> None:
    """Raise the errors of `heads.evaluate` early: other classes, and rows that the heads were fitted or chosen on.

    Samples are read and hashed only if a head keeps hashes of its rows. Raises MismatchError if the classes differ, or
    their order; HeadError if the split holds rows that a head was fitted or chosen on, or no others.

    Parameters
    ----------
    labels : names of the splits in `class_subset`
    options : ``seen`` and ``allow_chosen``, see `heads.evaluation.evaluate.EvaluateOptions`
    """
    known = [entry for head in heads for role in ROLES for entry in head.provenance.get(role) or ()]
    hashed = options.get("seen") != "allow" and any(rows_of(entry) is not None for entry in known)
    bare = [LinearHead(head.weights, head.bias, head.classnames, head.name) for head in heads]  # of any encoder
    for dataset, label in zip(datasets, labels or [dataset.name for dataset in datasets], strict=True):
        if dataset.index.targets is not None:
            continue
        index = dataset.index
        split = ResidentStore(
            torch.zeros(1).expand(len(index), heads[0].dim),  # no features
            index.labels,
            index.classnames,
            name=dataset.name,
            split=dataset.split,
            dataset_key=dataset_key(index, resolve_root(root)),
            metadata=index.metadata,
            row_hashes=row_hashes(dataset) if hashed else None,
        )
        jobs_for(bare, split, subsets_of([split], [label], class_subset)[0])
        reportable(heads, split, options)


def row_hashes(dataset: Dataset) -> NDArray[np.uint64]:
    """Hash (N,) of each sample's content, as stores keep it; 0 for samples that cannot be read."""

    def digest(row: int) -> bytes:
        try:
            return xxhash.xxh3_128_digest(dataset.read(row))
        except OSError:
            return NO_CONTENT

    content = dataset.index.content
    if content is not None:
        found = content.hashes()
    else:
        with ThreadPoolExecutor(default_workers()) as pool:
            found = b"".join(pool.map(digest, range(len(dataset.index))))
    return np.frombuffer(found, "<u8")[::2].astype(np.uint64)
