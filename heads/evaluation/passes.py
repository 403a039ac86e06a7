"""One pass over a store for many heads, with one tally per block of rows; not all logits are in memory at once.

Linear heads go through `heads.kernels`, all heads of a block at once, and interpolations of the same two heads as these
two and their alphas. Other heads compute logits for a few thousand rows at a time; shared work (the search of one bank
for several k) is done once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import FeatureTable
from heads.evaluation.projections import Projection
from heads.fitted.base import LogitHead
from heads.fitted.linear import LinearHead, as_linear
from heads.fitted.provenance import check_classes, check_encoder, check_labelling
from heads.kernels import Tally, linear_nll
from heads.kernels.problem import Values
from heads.kernels.tally import RowStats, stats_of_arrays
from heads.rows.few_shot import FewShotStore
from heads.rows.in_memory import ResidentStore
from heads.rows.samples import to_numpy
from heads.solvers.parallel import map_pieces

ClassSubset = Sequence[int] | Projection | Mapping[str, Sequence[int] | Projection] | None

Scored = tuple[list[Tally], NDArray[np.integer]]


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
    """Consecutive jobs that are computed by one call.

    Attributes
    ----------
    jobs : the jobs
    first : position of the first one among all jobs
    kind : "path" (interpolations of the same two heads), "linear", or "logits" (anything else)
    """

    jobs: tuple[Job, ...]
    first: int
    kind: str

    @property
    def places(self) -> slice:
        """Positions of the jobs among all jobs."""
        return slice(self.first, self.first + len(self.jobs))

    def tally(self, X: Values, positions: NDArray[np.integer], *, per_sample: bool, confusion: bool) -> Tally:
        """Sums and counts of these heads over a block of rows (n, D) with labels (n,)."""
        heads = [job.head for job in self.jobs]
        if self.kind == "logits":
            return self._of_logits(X, positions, per_sample=per_sample, confusion=confusion)
        alphas = None
        if self.kind == "path":
            alphas = [float(head.alpha or 0.0) for head in heads]
            heads = list(as_linear(heads[0]).parents or heads)
        linear = [as_linear(head) for head in heads]
        weights, bias = [head.weights for head in linear], [head.bias for head in linear]
        return linear_nll(X, weights, positions, bias=bias, alphas=alphas, per_sample=per_sample, confusion=confusion)

    def _of_logits(self, X: Values, positions: NDArray[np.integer], *, per_sample: bool, confusion: bool) -> Tally:
        """`tally` from logits, a few thousand rows of one head at a time."""
        n_classes = len(self.jobs[0].head.classnames)

        def of_piece(x: NDArray[np.floating], y: NDArray[np.integer]) -> Tally:
            rows = [stats_of_arrays(logits, y, predicted=confusion) for logits in all_logits(self.jobs, x)]
            return Tally.of_rows(RowStats.stack(rows), y, n_classes, per_sample=per_sample)

        return Tally.joined(map_pieces([(to_numpy(X), np.asarray(positions))], of_piece))


def units_of(jobs: Sequence[Job]) -> list[Unit]:
    """Group consecutive jobs into as few units as possible.

    Examples
    --------
    >>> from heads.fitted.linear import LinearHead
    >>> head = LinearHead(np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> [(unit.kind, len(unit.jobs)) for unit in units_of([Job(head, None, None)] * 3)]
    [('linear', 3)]
    """
    grouped = groupby(jobs, key=lambda job: (_kind(job), job.sharing if _kind(job) != "linear" else None))
    units: list[Unit] = []
    for (kind, sharing), members in grouped:
        found = tuple(members)
        first = units[-1].places.stop if units else 0
        if kind == "logits" and sharing is None:
            units += [Unit((job,), first + place, kind) for place, job in enumerate(found)]
        else:
            units.append(Unit(found, first, kind))
    return units


def _kind(job: Job) -> str:
    if not isinstance(job.head, LinearHead):
        return "logits"
    return "linear" if job.sharing is None or job.head.parents is None else "path"


def score(
    units: Sequence[Unit], store: FeatureTable, rows: FeatureTable, *, per_sample: bool = False, confusion: bool = False
) -> Iterator[Scored]:
    """For each block of a store, the tally of each unit, and the labels of the block as columns of the heads.

    Parameters
    ----------
    units : from `units_of`
    store : image store
    rows : the store, or some of its rows (`rows_of_rank`)
    per_sample, confusion : as in `linear_nll`

    Raises
    ------
    HeadError
        If logits are not finite, or labels are outside the class list.
    """
    n_classes = len(units[0].jobs[0].head.classnames)
    blocks = rows.tensor_blocks if isinstance(rows, ResidentStore) else rows.blocks  # resident features stay in place
    for X, labels in blocks():
        if not len(labels):
            continue
        positions = units[0].jobs[0].positions(to_numpy(labels), store)
        if not 0 <= positions.min() <= positions.max() < n_classes:
            raise HeadError(
                f"labels of {store.name!r} lie in [{positions.min()}, {positions.max()}], expected "
                f"[0, {n_classes - 1}]; encode the data again with its class list"
            )
        yield [unit.tally(X, positions, per_sample=per_sample, confusion=confusion) for unit in units], positions


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


def valid_rows(store: FeatureTable) -> NDArray[np.int64]:
    """Rows of a store with a readable image, in the order of its blocks."""
    return np.flatnonzero(store.valid)


def rows_of_rank(store: FeatureTable, rank: int, size: int) -> tuple[FeatureTable, slice]:
    """Share of a store's valid rows for one process, as a store and as positions among the valid rows."""
    rows = valid_rows(store)
    share = slice(len(rows) * rank // size, len(rows) * (rank + 1) // size)
    return FewShotStore(store, rows[share], {}), share
