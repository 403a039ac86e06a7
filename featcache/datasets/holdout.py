"""Splitting data that come without splits: some samples are held out, the others are for training.

``,holdout=0.2`` behind any source holds out a fifth. The splits are then ``train`` and, for the held-out samples,
``val`` or ``test``. Options: ``holdout_seed=`` (0); ``holdout_group=COLUMN``, a metadata column whose samples stay
together (patients, videos); ``holdout_of=SPLIT``, the split of the source that is divided (``all``).

The split is stratified: each class gives its share, rounded, and at least one sample if it has two. A multi-label
sample counts for the rarest of its classes, a group for the most frequent class of its samples. A digest of the seed
and the sample's id (or group) decides which samples are held out: the split is the same on every machine, and most
samples keep their side when the data set grows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.datasets.base import Dataset, Picture, SampleIndex, WrappedDataset
from featcache.datasets.options import WHOLE, SourceOptions
from featcache.errors import DatasetError
from featcache.parameters import Range

TRAIN, HELD_OUT = "train", ("val", "test")
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Holdout(SourceOptions):
    """How data without splits are divided into ``train`` and, for what is held out, ``val`` or ``test``.

    Parameters
    ----------
    holdout : share of each class to hold out
    holdout_seed : seed of the choice
    holdout_group : metadata column; samples with equal values stay together
    holdout_of : split of the source that is divided
    """

    holdout: Annotated[float, Range(0, 1, open=True, below=True)]
    holdout_seed: int = 0
    holdout_group: str | None = None
    holdout_of: str = WHOLE

    @classmethod
    def of_options(cls, found: Mapping[str, str]) -> "Holdout | None":
        """From the options behind a source; None without any.

        >>> Holdout.of_options({"holdout": "0.2", "holdout_seed": "1"})
        Holdout(holdout=0.2, holdout_seed=1, holdout_group=None, holdout_of='all')
        """
        if not found:
            return None
        if "holdout" not in found:
            raise DatasetError(f"{', '.join(found)}: needs holdout=, the share to hold out, such as holdout=0.2")
        return cls(**found)  # type: ignore[arg-type]  # texts


class Subset(WrappedDataset):
    """The samples of some rows (n,) of a data set, in that order."""

    def __init__(self, base: Dataset, rows: Rows, split: str) -> None:
        super().__init__(base)
        self.rows, self.split, self.index = rows, split, of_rows(base.index, rows)

    def read(self, row: int) -> bytes | memoryview:
        """The undecoded content of one sample."""
        return self.base.read(int(self.rows[row]))

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """The image in that content."""
        return self.base.decode(content, int(self.rows[row]))


def holdout_options(share: float | None, seed: int = 0, group: str | None = None) -> str:
    """The options as written behind a source.

    >>> holdout_options(0.2, 0, "patient")
    ',holdout=0.2,holdout_group=patient'
    """
    if share is None:
        return ""
    Holdout(share, seed, group)
    behind = f",holdout_seed={seed}" if seed else ""
    return f",holdout={float(share)!r}{behind}{f',holdout_group={group}' if group else ''}"


def divided(whole: Dataset, split: str, holdout: Holdout) -> Subset:
    """One side of a data set; DatasetError if it is empty, or neither ``train`` nor ``val`` or ``test``."""
    if split != TRAIN and split not in HELD_OUT:
        raise DatasetError(
            f"{whole.name}: split {split!r} with holdout={holdout.holdout:g}; expected train, or "
            f"{' or '.join(HELD_OUT)} for what is held out"
        )
    held = held_out(whole.index, holdout)
    rows = np.flatnonzero(held != (split == TRAIN)).astype(np.int64)
    if not len(rows):
        raise DatasetError(
            f"{whole.name}: nothing is left for {split} with holdout={holdout.holdout:g} of {len(held):,} samples; "
            "give another share, or more samples"
        )
    return Subset(whole, rows, split)


def held_out(index: SampleIndex, holdout: Holdout) -> npt.NDArray[np.bool_]:
    """Whether each sample (N,) is held out."""
    unit, names = _units(index, holdout.holdout_group)
    counts = np.bincount(unit, minlength=len(names))
    label = _strata(index)
    if holdout.holdout_group is not None:
        votes = np.zeros((len(names), len(index.classnames) + 1), np.int64)
        np.add.at(votes, (unit, label), 1)
        label = votes.argmax(axis=1)
    digests = [xxhash.xxh3_128_digest(f"{holdout.holdout_seed}\n{name}".encode()) for name in names]
    order = sorted(range(len(names)), key=lambda one: (label[one], digests[one]))
    chosen = np.zeros(len(names), bool)
    for _, units in groupby(order, key=lambda one: label[one]):
        stratum = list(units)
        wanted, taken = holdout.holdout * int(counts[stratum].sum()), 0
        for place, one in enumerate(stratum[:-1]):  # one stays for training
            if taken + counts[one] / 2 > wanted and place:
                break
            chosen[one] = True
            taken += int(counts[one])
    return chosen[unit]


def _strata(index: SampleIndex) -> Rows:
    """The stratum of each sample (N,): its class; for multi-label data the rarest that applies, C for none."""
    if index.targets is None:
        return index.labels
    applies = index.targets == 1
    rarity = np.where(applies, applies.sum(axis=0), len(index) + 1)
    return np.where(applies.any(axis=1), rarity.argmin(axis=1), len(index.classnames))


def _units(index: SampleIndex, group: str | None) -> tuple[Rows, list[str]]:
    """The samples that stay together: each sample's unit (N,), and the names of the units."""
    if group is None:
        return np.arange(len(index), dtype=np.int64), list(index.ids)
    if group not in index.metadata:
        there = ", ".join(sorted(index.metadata)) or "none"
        raise DatasetError(f"holdout_group={group}: no such metadata column; there are {there}")
    values = list(map(str, index.metadata[group]))
    number = {name: place for place, name in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], np.int64), list(number)


def of_rows(index: SampleIndex, rows: Rows) -> SampleIndex:
    """The index of some rows (n,)."""
    return replace(
        index,
        ids=[index.ids[row] for row in rows],
        sizes=index.sizes[rows],
        stamps=index.stamps[rows],
        labels=index.labels[rows],
        targets=None if index.targets is None else index.targets[rows],
        metadata={name: values[rows] for name, values in index.metadata.items()},
        content=None if index.content is None else index.content.of_rows(rows),
    )
