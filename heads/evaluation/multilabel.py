"""Evaluation of multi-label heads: ranking metrics by class, and decisions at the thresholds of each head.

=================== ===========================================================================================
map_macro           mean over classes of the average precision (mAP)
map_micro           average precision over all entries
map_weighted        mean of the average precision, weighted by the positives of each class
auroc_macro         mean over classes of the area under the ROC curve
f1_macro            mean over classes of the F1 at the head's thresholds
f1_micro, ...       F1, precision and recall over all entries, at the thresholds
subset_accuracy     share of rows with correct decisions for all classes
..._at_half         macro F1, micro F1 and subset accuracy at probability 0.5 instead
binary_nll          mean binary cross entropy over entries, in nats
=================== ===========================================================================================

Entries with unknown targets are ignored. Classes without a positive are left out of means over classes, and listed in
``left_out``; ``ap_classes`` and ``auroc_classes`` are the numbers of classes in the means. ``class_ap``,
``class_auroc``, ``class_f1``, ``class_positives``, ``class_prevalence``, ``class_threshold`` hold values by class name;
with groups, ``group_map_macro``, ``group_f1_micro`` and ``group_rows`` hold values by group. The worst group has the
smallest mAP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.protocol import FeatureTable
from heads.evaluation.bootstrap import DRAWS, LEVEL, check_draws, draw_counts
from heads.evaluation.groups import Groups
from heads.evaluation.metrics import Row
from heads.fitted.base import LogitHead
from heads.fitted.multilabel import MultiLabelHead
from heads.kernels.ranking import Decisions, Ranked, binary_nll, by_class, mean_of_defined
from heads.rows.arrays import to_numpy
from heads.rows.multilabel import as_targets


@dataclass(frozen=True)
class ScoreTable:
    """Logits of H heads on the N' valid rows of a multi-label store."""

    rows: NDArray[np.int64]  # (N',) rows of the store
    targets: NDArray[np.int8]  # (N', L)
    logits: NDArray[np.float32]  # (H, N', L)
    cuts: NDArray[np.float64]  # (H, L) thresholds


class MultiLabelPass:
    """One pass of multi-label heads over a store; every process of a group evaluates all rows.

    HeadError for options of single-label heads, MismatchError for a head that does not match the store.
    """

    def __init__(
        self,
        heads: Sequence[LogitHead],
        store: FeatureTable,
        asked: Mapping[str, bool],
        groups: Groups | None = None,
        *,
        per_sample: bool,
    ) -> None:
        if wrong := [name for name, given in asked.items() if given]:
            raise HeadError(f"{', '.join(wrong)}: not for multi-label heads, such as {heads[0].name}; leave it out")
        for head in heads:
            head.check(store)
        self.heads = [head for head in heads if isinstance(head, MultiLabelHead)]
        self.store, self.classnames = store, heads[0].classnames
        self.scores: ScoreTable | None = None
        self._per_sample, self._groups, self._found = per_sample, groups, list[Row]()

    def run(self, rank: int, size: int) -> None:
        """Evaluate, with the logits of one head in memory at a time."""
        kept = []
        for head in self.heads:
            logits, targets = [], []
            for features, found in self.store.blocks():
                logits.append(head.logits(features))
                targets.append(found.copy())
            if not sum(map(len, targets)):
                raise HeadError(f"no rows were evaluated; {self.store.name!r} has no valid row")
            scores, truth = np.concatenate(logits), np.concatenate(targets).astype(np.int8, copy=False)
            if not np.isfinite(scores).all():
                raise HeadError(f"{head.name} gives NaN or infinite logits on {self.store.name!r}; encode it again")
            self._found.append(multilabel_metrics(scores, truth, self.classnames, head.cuts))
            if self._groups is not None:
                self._found[-1].update(_by_group(scores, truth, head.cuts, self._groups))
            kept += [scores] if self._per_sample else []
        if self._per_sample:
            cuts = np.stack([head.cuts for head in self.heads]).astype(np.float64)
            self.scores = ScoreTable(np.flatnonzero(self.store.valid), truth, np.stack(kept), cuts)

    def sums(self) -> list[NDArray[np.generic]]:
        """No arrays: every process has evaluated all rows."""
        return []

    def results(self) -> list[Row]:
        """Metrics of each head."""
        return self._found


def multilabel_metrics(
    scores: NDArray[np.floating],
    targets: NDArray[np.integer],
    classnames: Sequence[str],
    thresholds: NDArray[np.floating] | None = None,
) -> Row:
    """Every metric of logits and targets; see `heads.evaluation.multilabel`.

    Parameters
    ----------
    scores : (N, L) logits
    targets : (N, L) 1, 0, or -1 where unknown
    classnames : L names
    thresholds : (L,) logits from which a class is predicted; None for zeros

    Raises
    ------
    HeadError
        For shapes that do not match, NaN scores, or other targets.

    Examples
    --------
    >>> scores, targets = np.array([[2.0, -1.0], [1.0, -2.0], [-1.0, -3.0]]), np.array([[1, 0], [0, 0], [1, -1]])
    >>> found = multilabel_metrics(scores, targets, ("cat", "dog"))
    >>> round(found["map_macro"], 4), found["left_out"], found["class_positives"]
    (0.8333, ['dog'], {'cat': 2, 'dog': 0})
    """
    scores, (targets, _) = to_numpy(scores), as_targets(targets)
    if scores.shape != targets.shape or len(classnames) != scores.shape[1] or np.isnan(scores).any():
        raise HeadError(
            f"scores {scores.shape} with {int(np.isnan(scores).sum())} NaN, targets {targets.shape} and "
            f"{len(classnames)} class names do not match; expected (N, L) numbers twice, and L names"
        )
    cuts = np.zeros(scores.shape[1]) if thresholds is None else np.asarray(thresholds, np.float64)
    precision = by_class(scores, targets, Ranked.average_precision)
    auroc = by_class(scores, targets, Ranked.auroc)
    positives = (targets == 1).sum(axis=0)
    decisions = Decisions.of(scores, targets, cuts)
    f1 = np.where(positives > 0, decisions.f1, np.nan)
    micro = dict(zip(("precision_micro", "recall_micro", "f1_micro"), decisions.micro(), strict=True))
    together = Ranked.of(scores.reshape(-1), targets.reshape(-1))
    half, known = Decisions.of(scores, targets, np.zeros(scores.shape[1])), (targets >= 0).sum(axis=0)
    return {
        "map_macro": mean_of_defined(precision),
        "map_micro": together.average_precision(),
        "map_weighted": mean_of_defined(precision, positives.astype(np.float64)),
        "auroc_macro": mean_of_defined(auroc),
        "f1_macro": mean_of_defined(f1),
        **micro,
        "subset_accuracy": decisions.subset_accuracy,
        "f1_macro_at_half": mean_of_defined(np.where(positives > 0, half.f1, np.nan)),
        "f1_micro_at_half": half.micro()[2],
        "subset_accuracy_at_half": half.subset_accuracy,
        "binary_nll": binary_nll(scores, targets),
        "ap_classes": int((~np.isnan(precision)).sum()),
        "auroc_classes": int((~np.isnan(auroc)).sum()),
        "left_out": [name for name, count in zip(classnames, positives, strict=True) if not count],
        "class_ap": _named(classnames, precision),
        "class_auroc": _named(classnames, auroc),
        "class_f1": _named(classnames, f1),
        "class_positives": dict(zip(classnames, positives.tolist(), strict=True)),
        "class_prevalence": _named(classnames, np.where(known > 0, positives / np.maximum(known, 1), np.nan)),
        "class_threshold": _named(classnames, cuts),
    }


def _by_group(
    scores: NDArray[np.floating], targets: NDArray[np.integer], cuts: NDArray[np.float64], groups: Groups
) -> Row:
    """mAP, micro F1 and rows by group, and the worst of the groups without an empty cell."""
    precisions: dict[str, float | None] = {}
    f1: dict[str, float] = {}
    for code, name in enumerate(groups.names):
        mine = groups.codes == code
        precision = mean_of_defined(by_class(scores[mine], targets[mine], Ranked.average_precision))
        precisions[name] = float(precision) if np.isfinite(precision) else None
        f1[name] = Decisions.of(scores[mine], targets[mine], cuts).micro()[2]
    rows = np.bincount(groups.codes, minlength=len(groups.names)).tolist()
    record: Row = {"group_rows": dict(zip(groups.names, rows, strict=True))}
    record |= {"group_map_macro": precisions, "group_f1_micro": f1}
    values = {name: value for name, value in precisions.items() if value is not None}
    rated = {groups.names[code] for code in groups.known} & values.keys()
    if values:
        worst = min((name for name in values if name in rated or not rated), key=lambda name: values[name])
        record |= {"worst_group": worst, "worst_group_map_macro": values[worst]}
    return record


def multilabel_intervals(table: ScoreTable, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> list[Row]:
    """Percentile bootstrap intervals [low, high] over rows, for each head; options as in `DrawOptions`.

    Rows with ``map_macro_interval``, ``f1_macro_interval`` and ``f1_micro_interval``, without those that are undefined
    in every resample. A class without a positive in a resample is left out of its means over classes.
    """
    check_draws(draws, level, seed)
    found = []
    for logits, cuts in zip(table.logits, table.cuts, strict=True):
        rng = np.random.default_rng(seed)  # every head sees the same draws
        parts = [_drawn(logits, table.targets, cuts, counts) for counts in draw_counts(len(table.rows), draws, rng)]
        row: Row = {}
        for metric in ("map_macro", "f1_macro", "f1_micro"):
            values = np.concatenate([part[metric] for part in parts])
            if np.isfinite(values).any():
                row[f"{metric}_interval"] = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
        found.append(row)
    return found


def _drawn(
    scores: NDArray[np.floating], targets: NDArray[np.integer], cuts: NDArray[np.floating], counts: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Metrics (b,) of resampled rows, drawn `counts` (b, N) times."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.stack([_precision(*column, counts) for column in zip(scores.T, targets.T, strict=True)])
        said, known, true = scores >= cuts, targets >= 0, targets == 1
        hits, alarms, misses = (
            counts @ part.astype(np.float64) for part in (said & true, said & known & ~true, true & ~said)
        )
        f1 = np.where(hits + misses > 0, 2 * hits / (2 * hits + alarms + misses), np.nan)
        micro = 2 * hits.sum(axis=1) / (2 * hits + alarms + misses).sum(axis=1)
        return {"map_macro": _defined_mean(precision.T), "f1_macro": _defined_mean(f1), "f1_micro": micro}


def _precision(
    scores: NDArray[np.floating], targets: NDArray[np.integer], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision (b,) of one class, NaN where no positive was drawn; equal scores share a threshold."""
    known = np.flatnonzero(targets >= 0)
    if not len(known):
        return np.full(len(counts), np.nan)
    order = known[np.argsort(-scores[known], kind="stable")]
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    share = counts[:, order]
    rows, hits = np.cumsum(share, axis=1)[:, ends], np.cumsum(share * targets[order], axis=1)[:, ends]
    steps = np.diff(hits, axis=1, prepend=0.0)
    return np.asarray((steps * hits / np.maximum(rows, 1.0)).sum(axis=1) / hits[:, -1])


def _defined_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the defined values (b, L) over classes; NaN if none is."""
    known = np.isfinite(values)
    return np.asarray(np.where(known, values, 0.0).sum(axis=1) / known.sum(axis=1))


def _named(classnames: Sequence[str], values: NDArray[np.floating]) -> dict[str, float | None]:
    found = (float(value) if np.isfinite(value) else None for value in values)
    return dict(zip(classnames, found, strict=True))
