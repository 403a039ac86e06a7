"""One pass over a store for many heads, with a tally per block of rows; the logits of all rows are never in memory.

Linear heads go through `heads.kernels` together, interpolations of the same two heads as these two and their alphas.
Other heads compute logits for a few thousand rows at a time; shared work (searching one bank for several k) is done
once.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import FeatureTable
from heads.evaluation.groups import Groups, GroupSums
from heads.evaluation.metrics import Row, macro_f1
from heads.evaluation.projections import Projection
from heads.fitted.base import LogitHead
from heads.fitted.linear import LinearHead, as_linear
from heads.fitted.provenance import check_classes, check_encoder, check_labelling
from heads.kernels import Tally, linear_nll
from heads.kernels.problem import Values
from heads.kernels.tally import RowStats, stats_of_arrays
from heads.rows.arrays import to_numpy
from heads.rows.few_shot import FewShotStore
from heads.rows.in_memory import ResidentStore
from heads.solvers.parallel import map_pieces

ANCHOR, ALSO = "anchor", "also"
"""Columns of a store of frames, space-separated: anchors of the sets that contain the frame; further labels."""

ClassSubset = Sequence[int] | Projection | Mapping[str, Sequence[int] | Projection] | None


@dataclass(frozen=True)
class Job:
    """A head restricted to the classes of one store."""

    head: LogitHead
    sharing: Hashable | None  # `LogitHead.sharing` before any restriction
    lookup: NDArray[np.int64] | None  # class of the head for each label of the store, -1 if masked; None: the same

    def positions(self, labels: NDArray[np.integer], store: FeatureTable) -> NDArray[np.integer]:
        """Columns of this head's logits for labels of the store."""
        if self.lookup is None:
            return labels
        found: NDArray[np.int64] = self.lookup[labels]
        if (found < 0).any():
            outside = sorted({store.classnames[i] for i in labels[found < 0].tolist()})[:5]
            raise MismatchError(
                f"{store.name!r} has rows of classes outside class_subset ({', '.join(outside)}); "
                "add these classes, or evaluate a store without them"
            )
        return found


def jobs_for(heads: Sequence[LogitHead], store: FeatureTable, subset: Sequence[int] | Projection | None) -> list[Job]:
    """One job per head; heads that do not match the store are refused, before any row is read."""
    jobs = [_job(head, store, subset) for head in heads]
    if len({None if job.lookup is None else job.lookup.tobytes() for job in jobs}) > 1:
        raise MismatchError(
            f"the labels of {store.name!r} are class indices for some heads and positions in the class subset for "
            "others; evaluate heads over all classes and heads over the subset separately"
        )
    return jobs


def _job(head: LogitHead, store: FeatureTable, subset: Sequence[int] | Projection | None) -> Job:
    head.check_tokens(store)
    check_encoder(head.provenance.head or head.name, head.provenance, head.dim, store)
    check_labelling(head.name, store, multilabel=head.multilabel)
    if subset is None:
        check_classes(head.classnames, store, head.name)
        return Job(head, head.sharing, None)
    full = tuple(store.classnames) == head.classnames  # labels in the full index space
    if isinstance(subset, Projection):
        kept = subset.of(head)
        lookup = subset.lookup(head.classnames) if full and kept is not head else None
    else:
        kept, lookup = head.restrict(subset), None
        if full:
            lookup = np.full(len(head.classnames), -1, np.int64)
            lookup[np.asarray(subset)] = np.arange(len(subset))
    if lookup is None:
        check_classes(kept.classnames, store, f"{head.name} over class_subset")
    return Job(kept, head.sharing, lookup)


@dataclass(frozen=True)
class Unit:
    """Consecutive jobs that one call computes: a path of interpolations, linear heads, or others by their logits."""

    jobs: tuple[Job, ...]
    kind: Literal["path", "linear", "logits"]

    def tally(self, X: Values, positions: NDArray[np.integer], *, per_sample: bool, confusion: bool) -> Tally:
        """Sums and counts of these heads over a block of rows (n, D) with labels (n,)."""
        heads, alphas = [job.head for job in self.jobs], None

        def of_logits(x: NDArray[np.floating], y: NDArray[np.integer]) -> Tally:
            rows = [stats_of_arrays(logits, y, predicted=confusion) for logits in all_logits(self.jobs, x)]
            return Tally.of_rows(RowStats.stack(rows), y, len(heads[0].classnames), per_sample=per_sample)

        if self.kind == "logits":  # a few thousand rows of one head at a time
            return Tally.joined(map_pieces([(to_numpy(X), np.asarray(positions))], of_logits))
        if self.kind == "path":
            alphas = [float(head.alpha or 0.0) for head in heads]
            heads = list(as_linear(heads[0]).parents or heads)
        linear = [as_linear(head) for head in heads]
        weights, bias = [head.weights for head in linear], [head.bias for head in linear]
        return linear_nll(X, weights, positions, bias=bias, alphas=alphas, per_sample=per_sample, confusion=confusion)


def units_of(jobs: Sequence[Job]) -> list[Unit]:
    """Group consecutive jobs into as few units as possible.

    >>> from heads.fitted.linear import LinearHead
    >>> head = LinearHead(np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> [(unit.kind, len(unit.jobs)) for unit in units_of([Job(head, None, None)] * 3)]
    [('linear', 3)]
    """
    units: list[Unit] = []
    for (kind, sharing), members in groupby(jobs, key=_kind):
        if kind == "logits" and sharing is None:
            units += [Unit((job,), kind) for job in members]
        else:
            units.append(Unit(tuple(members), kind))
    return units


def _kind(job: Job) -> tuple[Literal["path", "linear", "logits"], Hashable | None]:
    """Kind of the unit of a job, and what the jobs of that unit share."""
    if not isinstance(job.head, LinearHead):
        return "logits", job.sharing
    return ("linear", None) if job.sharing is None or job.head.parents is None else ("path", job.sharing)


def all_logits(jobs: Sequence[Job], x: NDArray[np.floating]) -> Iterator[NDArray[np.float32]]:
    """Logits of each job, in order; consecutive heads with the same `sharing` share one `prepare`."""
    sharing: Hashable | None = None
    prepared: object = None
    for job in jobs:
        if job.sharing is None:
            yield job.head.logits(x)
            continue
        if sharing != job.sharing:
            sharing, prepared = job.sharing, job.head.prepare(x)
        yield job.head.finish(prepared)


def rows_of_rank(store: FeatureTable, rank: int, size: int) -> tuple[FeatureTable, slice]:
    """Share of a store's valid rows for one process, as a store and as positions among the valid rows."""
    rows = np.flatnonzero(store.valid)
    if size == 1:
        return store, slice(0, len(rows))
    share = slice(len(rows) * rank // size, len(rows) * (rank + 1) // size)
    return FewShotStore(store, rows[share], {}), share


@dataclass(frozen=True)
class SampleTable:
    """Results of H heads on each of the N' valid rows of a store."""

    rows: NDArray[np.int64]  # (N',) rows of the store
    labels: NDArray[np.int64]  # (N',) indices among the heads' classes
    nll: NDArray[np.floating]  # (H, N') float32, nats
    rank: NDArray[np.int64]  # (H, N') rank of the label, 0 is best; ties by class index


class StorePass:
    """One pass of all heads over one store."""

    def __init__(
        self, jobs: Sequence[Job], store: FeatureTable, groups: Groups | None, *, per_sample: bool, confusion: bool
    ) -> None:
        self.jobs, self.store, self.units = jobs, store, units_of(jobs)
        self.classnames, self._confusion = jobs[0].head.classnames, confusion
        self.tallies = [Tally.zeros(len(unit.jobs), len(self.classnames), confusion=confusion) for unit in self.units]
        self.groups = None if groups is None else GroupSums(groups, len(jobs))
        self.samples: SampleTable | None = None
        if per_sample:
            rows = np.flatnonzero(store.valid)
            shape = (len(jobs), len(rows))
            labels = np.zeros(len(rows), np.int64)
            self.samples = SampleTable(rows, labels, np.zeros(shape, np.float32), np.zeros(shape, np.int64))

    def run(self, rank: int, size: int) -> None:
        """Evaluate this process's share of the rows; HeadError for labels outside the class list, or NaN logits."""
        share, places = rows_of_rank(self.store, rank, size)
        done = places.start
        blocks = share.tensor_blocks if isinstance(share, ResidentStore) else share.blocks  # resident features stay put
        per_sample = self.samples is not None or self.groups is not None
        for X, found in blocks():
            if not len(found):
                continue
            labels, last = self.jobs[0].positions(to_numpy(found), self.store), len(self.classnames) - 1
            if not 0 <= labels.min() <= labels.max() <= last:
                raise HeadError(
                    f"labels of {self.store.name!r} lie in [{labels.min()}, {labels.max()}], expected [0, {last}]; "
                    "encode the data again with its class list"
                )
            tallies = [unit.tally(X, labels, per_sample=per_sample, confusion=self._confusion) for unit in self.units]
            self.tallies = [a + b for a, b in zip(self.tallies, tallies, strict=True)]
            places = slice(done, done + len(labels))
            done = places.stop
            if not per_sample:
                continue
            nll = np.concatenate([tally.row_nll for tally in tallies if tally.row_nll is not None])
            ranks = np.concatenate([tally.row_rank for tally in tallies if tally.row_rank is not None])
            if self.groups is not None:
                self.groups.add(places, nll, ranks)
            if self.samples is not None:
                self.samples.labels[places] = labels
                self.samples.nll[:, places], self.samples.rank[:, places] = nll, ranks

    def sums(self) -> list[NDArray[np.generic]]:
        """Arrays that are summed over processes, in place."""
        found = [array for tally in self.tallies for array in tally.sums.values()]
        found += [] if self.groups is None else [self.groups.rows, self.groups.hits, self.groups.nll]
        return found + ([] if self.samples is None else [self.samples.labels, self.samples.nll, self.samples.rank])

    def results(self) -> list[Row]:
        """Metrics of each head, including those of groups."""
        if not self.tallies[0].n:
            raise HeadError(f"no rows were evaluated; {self.store.name!r} has no valid row")
        parts: list[Sequence[Mapping[str, object]]] = [[one for tally in self.tallies for one in tally.results()]]
        parts += [[{"macro_f1": macro_f1(counts)} for counts in self.confusion()]] if self._confusion else []
        parts += [_frame_results(self.jobs, self.store)] if {ANCHOR, ALSO} <= set(self.store.metadata) else []
        parts += [] if self.groups is None else [self.groups.results()]
        return [{key: value for part in of_head for key, value in part.items()} for of_head in zip(*parts, strict=True)]

    def confusion(self) -> NDArray[np.int64]:
        """Counts (H, C, C)."""
        return np.concatenate([tally.confusion for tally in self.tallies if tally.confusion is not None])


def _frame_results(jobs: Sequence[Job], store: FeatureTable) -> list[Row]:
    """pm-k accuracy of each head on video frames (Shankar et al., arXiv 1906.02168), for k of 0 and 10.

    pm-0 is the share of anchor frames that are predicted correctly, pm-10 the share of anchors for which all frames of
    the set are, from 10 before the anchor to 10 after it. A frame is correct if the predicted class is one of its
    labels. Unreadable frames are left out, as are sets with an unreadable anchor.
    """
    rows = np.flatnonzero(store.valid)
    right = _right(jobs, store, rows)
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for anchor in str(store.metadata[ANCHOR][row]).split():
            members.setdefault(anchor, []).append(place)
    place_of = {store.ids[row]: place for place, row in enumerate(rows.tolist())}
    anchors = [anchor for anchor in members if anchor in place_of]
    alone = right[:, [place_of[anchor] for anchor in anchors]].mean(axis=1)
    whole = np.stack([right[:, members[anchor]].all(axis=1) for anchor in anchors], axis=1).mean(axis=1)
    return [{"pm0": pm0, "pm10": pm10} for pm0, pm10 in zip(alone.tolist(), whole.tolist(), strict=True)]


def _right(jobs: Sequence[Job], store: FeatureTable, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(H, N'): whether the class that a head predicts for a valid row is one of its labels."""
    blocks = [[logits.argmax(1) for logits in all_logits(jobs, to_numpy(X))] for X, _ in store.blocks()]
    predicted = np.concatenate(blocks, axis=1)
    right: NDArray[np.bool_] = predicted == jobs[0].positions(np.asarray(store.labels)[rows], store)
    for place, row in enumerate(rows):
        further = [int(label) for label in str(store.metadata[ALSO][row]).split()]
        for label in jobs[0].positions(np.array(further, np.int64), store) if further else ():
            right[:, place] |= predicted[:, place] == label
    return right
