"""Judge many heads on many stores in one pass over each; choose one on a selection split, never on a reported one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError, MismatchError
from heads.checks import check_classes, check_encoder, split_id
from heads.logits import LogitHead, as_head
from heads.metrics import METRICS, Metrics, RowStatistics
from heads.solvers.parallel import map_pieces

__all__ = ["choose", "evaluate"]

ClassSubset = Sequence[int] | Mapping[str, Sequence[int]] | None

_LOWER_IS_BETTER = {"nll", "nll_capped", "ece"}


def evaluate(
    heads: Sequence[Any],
    stores: Sequence[Any],
    *,
    class_subset: ClassSubset = None,
    allow_chosen: bool = False,
) -> list[dict[str, Any]]:
    """One row a head, with every metric on every store.

    Heads of one interpolation share two products per block of rows: logits interpolate as weights do. Numbers of
    neighbours in one bank share its search.

    Parameters
    ----------
    heads
        Fitted estimators, or the `LogitHead` of such: linear heads, and others that give logits.
    stores
        Image stores (their valid rows count).
    class_subset
        Class indices of the heads to keep, for all stores or by store name: only these logits exist, and the
        softmax runs over them. The store's labels are then read by its class list: if it names the heads' full
        class list, labels are full indices (each must be in the subset); if it names the subset's classes in the
        subset's order, they are positions in the subset (ImageNet-R and -A, whose labels are 0..199).
    allow_chosen
        Report even on a split that a head was chosen on: a leak, for reproducing papers.

    Returns
    -------
    Rows with ``head``, ``encoder``, ``params``, ``fitted_on``, ``chosen_on``, ``alpha`` (interpolations only) and
    ``"<store.name>:<metric>"``; the name is ``<name>/<split>`` where two of the stores share a name.

    Raises
    ------
    MismatchError
        If a head and a store differ in encoder, text tower or class list.
    HeadError
        If a head was chosen on one of the stores, or there is nothing to evaluate.
    """
    judged = [as_head(head) for head in heads]
    if not judged or not stores:
        raise HeadError(f"got {len(judged)} heads and {len(stores)} stores; give at least one of each")
    rows = [_describe(head, stores) for head in judged]
    for store, label in zip(stores, _labels(stores), strict=True):
        if not allow_chosen:
            _refuse_chosen(judged, store)
        for row, result in zip(rows, _on_store(judged, store, class_subset), strict=True):
            row.update({f"{label}:{metric}": value for metric, value in result.items()})
    return rows


def choose(
    heads: Sequence[Any], selection: Any, *, metric: str = "top1", class_subset: ClassSubset = None
) -> LogitHead:
    """The best head on a selection split; `evaluate` will refuse to report it on that split.

    Ties go to the earlier head. ``nll``, ``nll_capped`` and ``ece`` are minimised, the others maximised.

    Raises
    ------
    HeadError
        For an unknown metric, or a selection split that one of the heads was fitted on.
    """
    if metric not in METRICS:
        raise HeadError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    judged = [as_head(head) for head in heads]
    for head in judged:
        if any(_same_split(entry, selection) for entry in head.provenance.get("fitted_on", [])):
            raise HeadError(
                f"{head.name} was fitted on {selection.name}/{selection.split}, where it looks better than it is; "
                "choose on a split that fitted none of the heads"
            )
    rows = evaluate(judged, [selection], class_subset=class_subset, allow_chosen=True)
    values = np.array([row[f"{selection.name}:{metric}"] for row in rows])
    best = int(values.argmin() if metric in _LOWER_IS_BETTER else values.argmax())
    entry = {**split_id(selection), "metric": metric, "value": float(values[best]), "candidates": len(values)}
    provenance = judged[best].provenance
    chosen_on = [*provenance.get("chosen_on", []), entry]
    return judged[best].with_provenance({**provenance, "chosen_on": chosen_on})


def _on_store(heads: Sequence[LogitHead], store: Any, class_subset: ClassSubset) -> list[dict[str, float]]:
    """Metrics of every head on one store; logits exist for a few thousand rows of one head at a time."""
    subset = class_subset.get(store.name) if isinstance(class_subset, Mapping) else class_subset
    jobs = [_job(head, store, subset) for head in heads]
    metrics = [Metrics(len(job.head.classnames)) for job in jobs]

    def of_piece(x: NDArray[np.floating], y: NDArray[np.integer]) -> list[tuple[RowStatistics, NDArray[np.integer]]]:
        parts = []
        for metric, job, logits in zip(metrics, jobs, _all_logits(jobs, x), strict=True):
            positions = job.positions(y, store)
            parts.append((metric.measure(logits, positions), positions))
        return parts

    for parts in map_pieces(store.blocks(), of_piece):
        for metric, (statistics, positions) in zip(metrics, parts, strict=True):
            metric.add(statistics, positions)
    return [metric.result() for metric in metrics]


@dataclass(frozen=True)
class _Job:
    """A head as this store sees it: its classes, and where the store's labels lie among them."""

    head: LogitHead
    sharing: Hashable | None  # of the head before any restriction: whose work it shares
    lookup: NDArray[np.int64] | None  # position of each of the store's labels, -1 if masked; None is the identity

    def positions(self, labels: NDArray[np.integer], store: Any) -> NDArray[np.integer]:
        """Columns of this head that the labels mean."""
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


def _job(head: LogitHead, store: Any, subset: Sequence[int] | None) -> _Job:
    check_encoder({"head": head.name, **head.provenance}, head.dim, store)
    if subset is None:
        check_classes(head.classnames, store, head.name)
        return _Job(head, head.sharing, None)
    kept = head.restrict(subset)
    if tuple(store.classnames) == head.classnames:  # labels in the full index space
        lookup = np.full(len(head.classnames), -1, np.int64)
        lookup[np.asarray(subset)] = np.arange(len(subset))
        return _Job(kept, head.sharing, lookup)
    check_classes(kept.classnames, store, f"{head.name} over class_subset")
    return _Job(kept, head.sharing, None)


def _all_logits(jobs: Sequence[_Job], x: NDArray[np.floating]) -> Iterator[NDArray[np.float32]]:
    """Logits of each job, in order; consecutive heads of one `sharing` have its work done once."""
    sharing: Hashable | None = None
    prepared: Any = None
    for job in jobs:
        if job.sharing is None:
            yield job.head.logits(x)
            continue
        if sharing != job.sharing:
            sharing, prepared = job.sharing, job.head.prepare(x)
        yield job.head.finish(prepared)


def _labels(stores: Sequence[Any]) -> list[str]:
    """Name of each store in rows' keys."""
    times = Counter(store.name for store in stores)
    labels = [store.name if times[store.name] == 1 else f"{store.name}/{store.split}" for store in stores]
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise HeadError(f"stores {repeated} were given twice; give each split once")
    return labels


def _describe(head: LogitHead, stores: Sequence[Any]) -> dict[str, Any]:
    """The part of a row that does not depend on results."""
    row: dict[str, Any] = {
        "head": head.name,
        "encoder": ", ".join(dict.fromkeys(store.encoder_name for store in stores)),
        "params": head.provenance.get("params", {}),
        "fitted_on": head.provenance.get("fitted_on", []),
        "chosen_on": head.provenance.get("chosen_on", []),
    }
    if head.alpha is not None:
        row["alpha"] = float(head.alpha)
    return row


def _same_split(entry: Mapping[str, Any], store: Any) -> bool:
    identity = split_id(store)
    return all(entry.get(key) == identity[key] for key in ("name", "split", "dataset_key"))


def _refuse_chosen(heads: Sequence[LogitHead], store: Any) -> None:
    for head in heads:
        if any(_same_split(entry, store) for entry in head.provenance.get("chosen_on", [])):
            raise HeadError(
                f"{head.name} was chosen on {store.name}/{store.split}, so its numbers there are too good; "
                "report on another split (in Python, allow_chosen=True reproduces papers that do not)"
            )
