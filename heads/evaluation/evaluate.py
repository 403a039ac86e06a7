"""Evaluate many heads on many stores in one pass over each store, and choose a head on a selection split.

`judge` computes metrics and groups, and on request per-sample results and confusion counts; `evaluate` returns its
rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.processes import rank_and_size, sum_over_ranks
from featcache.store.protocol import FeatureTable
from heads.evaluation.frames import frame_results, has_frames
from heads.evaluation.groups import Groups, GroupSums, groups_of, over_domains
from heads.evaluation.metrics import LOWER_IS_BETTER, Row, macro_f1, selection_metric
from heads.evaluation.multilabel import MultiLabelPass, ScoreTable
from heads.evaluation.passes import ClassSubset, Job, jobs_for, rows_of_rank, score, units_of, valid_rows
from heads.evaluation.projections import Projection
from heads.evaluation.seen import OPTIMISTIC, Seen, check_seen, excluded, refuse_seen, rows_in, unseen_by
from heads.fitted.base import LogitHead, as_head
from heads.fitted.provenance import ROLES
from heads.kernels import Tally
from heads.rows.in_memory import ResidentStore
from heads.rows.samples import as_samples, is_multilabel, is_store


class EvaluateOptions(TypedDict, total=False):
    """Optional keywords of `heads.evaluate` and `heads.judge`.

    Attributes
    ----------
    class_subset
        Indices of the heads' classes to keep, for all stores or by store name; the softmax is over these classes only.
        If a store has the heads' full class list, its labels are full indices (and must all be in the subset); if its
        class list is the subset in order, labels are positions in the subset (ImageNet-R and -A, labels 0..199). A
        `Projection` defines new classes, each with the largest logit of some of the heads' classes (ObjectNet).
    allow_chosen : bool
        Whether to report on rows that a head was chosen on: a leak, for reproducing papers.
    seen : {"refuse", "exclude", "allow"}
        What to do with rows that a head was fitted or chosen on, which are recognised by content, not by the name of
        the split. "refuse" (default) raises an error, unless the store is the recorded training split under its own
        name, in which case ``fitted_on`` shows that these are training rows. "exclude" leaves out the rows that any
        head has seen, so that all heads are evaluated on the same rows, and reports ``"<name>:n_excluded"``. "allow"
        evaluates all rows.
    groups : sequence of str
        Metadata columns of the stores (``label`` is the class); accuracy and NLL are also reported for each value, or
        combination of values.
    reference : str
        Name of the in-distribution store, which is not a shifted domain. Default: the first.
    names : sequence of str
        Names of the stores in the keys of rows, in `class_subset` and in `reference`. Default: the stores' own.
    distributed : bool
        Whether the processes of torchrun's process group share the rows. Every process must make the same call, and
        gets the results of all rows.
    """

    class_subset: ClassSubset
    allow_chosen: bool
    seen: Seen
    groups: Sequence[str] | None
    reference: str | None
    names: Sequence[str] | None
    distributed: bool


@dataclass(frozen=True)
class SampleTable:
    """Results of H heads on each of the N' valid rows of a store.

    Attributes
    ----------
    rows : (N',) rows of the store
    labels : (N',) indices among the heads' classes
    nll : (H, N') float32, nats
    rank : (H, N') int64 rank of the label, 0 is best; ties by class index
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    nll: NDArray[np.floating]
    rank: NDArray[np.int64]


@dataclass(frozen=True)
class Judgement:
    """Results of `judge`.

    Attributes
    ----------
    rows : one results row per head, as `heads.evaluate` returns them
    samples : per-sample results, by the name of the store in the rows; empty unless requested
    confusion : (H, C, C) counts [label, predicted class] by store; empty unless requested
    classnames : the C classes of labels and counts, by store
    stores : the stores, without excluded rows
    scores : for multi-label stores, in place of `samples`: logits of every head on every sample
    """

    rows: list[Row]
    samples: dict[str, SampleTable] = field(default_factory=dict)
    confusion: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    classnames: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stores: dict[str, FeatureTable] = field(default_factory=dict, repr=False)
    scores: dict[str, ScoreTable] = field(default_factory=dict)


def evaluate(heads: Sequence[object], stores: Sequence[FeatureTable], **options: Unpack[EvaluateOptions]) -> list[Row]:
    """One row per head, with every metric on every store.

    Linear heads are evaluated together by `linear_nll`, block by block, without storing all logits. Interpolations of
    the same two heads share two matrix products, and kNN heads of different k share the search. `heads.judge` also
    returns per-sample results and confusion counts.

    Parameters
    ----------
    heads : fitted estimators or `LogitHead`; ``fitted.path_heads()`` gives every setting of a fit
    stores : image stores (valid rows are evaluated): on disk or, from `heads.resident`, in memory or on a GPU
    **options
        `class_subset`, `allow_chosen`, `seen`, `groups`, `reference`, `names`, `distributed`: see `EvaluateOptions`.

    Returns
    -------
    Rows with ``head``, ``encoder``, ``params``, ``fitted_on``, ``chosen_on``, ``alpha`` (interpolations only) and
    ``"<store.name>:<metric>"``; if two stores share a name, it is ``<name>/<split>``. ``splits`` maps names to splits,
    ``training_rows`` lists those that the head was fitted on. With groups also ``"<name>:worst_group_top1"``,
    ``worst_group``, ``worst_group_nll`` and, by group, ``group_top1``, ``group_nll``, ``group_rows``. For two or more
    stores also ``shifted_mean_<metric>``, ``shifted_worst_<metric>`` and ``shifted_worst_domain``, without the stores
    that the head was fitted on (``shifted_left_out``).

    Raises
    ------
    MismatchError
        If a head and a store differ in encoder, text tower or class list.
    HeadError
        If a head was chosen on one of the stores, or fitted or chosen on some of its rows under another name; if a
        group column is missing, or there is nothing to evaluate.
    """
    return judge(heads, stores, **options).rows


def judge(
    heads: Sequence[object],
    stores: Sequence[FeatureTable],
    *,
    per_sample: bool = False,
    confusion: bool = False,
    **options: Unpack[EvaluateOptions],
) -> Judgement:
    """Evaluate heads on stores, with further results; other parameters, and errors, are those of `heads.evaluate`.

    Parameters
    ----------
    per_sample : whether to return NLL and rank of every head on every sample
    confusion : whether to count (label, predicted class) pairs (H C² numbers per store), and report
        ``"<name>:macro_f1"``
    """
    known = EvaluateOptions.__annotations__
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(f"unexpected keyword arguments {unknown}; expected {', '.join(known)}")
    fitted = [as_head(head) for head in heads]
    if not fitted or not stores:
        raise HeadError(f"got {len(fitted)} heads and {len(stores)} stores; give at least one of each")
    if arrays := [type(store).__name__ for store in stores if not is_store(store)]:
        raise HeadError(
            f"got {arrays[0]}, expected a store: name one of `featcache encode`, or make one from arrays, "
            "heads.ResidentStore(X, y, classnames)"
        )
    labels = store_labels(stores, options.get("names"))
    rows = [_describe(head, stores) for head in fitted]
    passes: list[_Pass | MultiLabelPass] = []
    # check everything before the first pass
    rests = [reportable(fitted, store, options) for store in stores]
    for store, subset in zip(rests, subsets_of(stores, labels, options.get("class_subset")), strict=True):
        columns = options.get("groups")
        groups = None if columns is None else groups_of(store, columns)
        if is_multilabel(store):
            asked = {"class_subset": subset is not None, "confusion": confusion}
            passes.append(MultiLabelPass(fitted, store, asked, groups, per_sample=per_sample))
            continue
        jobs = jobs_for(fitted, store, subset)
        passes.append(_Pass(jobs, store, groups, per_sample=per_sample, confusion=confusion))
    distributed = options.get("distributed", False)
    for one in passes:
        one.run(*(rank_and_size() if distributed else (0, 1)))
    if distributed:
        sum_over_ranks([array for one in passes for array in one.sums()])
    for label, one in zip(labels, passes, strict=True):
        for row, result in zip(rows, one.results(), strict=True):
            row.update({f"{label}:{key}": value for key, value in result.items()})
    exclude, before = options.get("seen") == "exclude", dict(zip(labels, stores, strict=True))
    after = dict(zip(labels, rests, strict=True))
    for row, head in zip(rows, fitted, strict=True):
        own = [label for label, store in before.items() if not exclude and head.provenance.was_fitted_on(store)]
        row["splits"] = {label: f"{store.name}/{store.split}" for label, store in before.items()}
        row.update({"training_rows": own} if own else {})
        row.update(over_domains(row, labels, options.get("reference"), own))
        if exclude:
            row.update({f"{label}:n_excluded": excluded(before[label], after[label]) for label in labels})
    named = dict(zip(labels, passes, strict=True))
    return Judgement(
        rows,
        {
            label: replace(one.samples, rows=rows_in(before[label], after[label], one.samples.rows))
            for label, one in named.items()
            if one.samples is not None
        },
        {label: one.confusion() for label, one in named.items() if confusion and isinstance(one, _Pass)},
        {label: one.classnames for label, one in named.items()},
        after,
        {
            label: replace(one.scores, rows=rows_in(before[label], after[label], one.scores.rows))
            for label, one in named.items()
            if isinstance(one, MultiLabelPass) and one.scores is not None
        },
    )


class _Pass:
    """One pass of all heads over one store."""

    def __init__(
        self, jobs: Sequence[Job], store: FeatureTable, groups: Groups | None, *, per_sample: bool, confusion: bool
    ) -> None:
        self.jobs, self.store, self.units = jobs, store, units_of(jobs)
        self._confusion = confusion
        n_classes = len(jobs[0].head.classnames)
        self.tallies = [Tally.zeros(len(unit.jobs), n_classes, confusion=confusion) for unit in self.units]
        self.groups = None if groups is None else GroupSums(groups, len(jobs))
        self.samples: SampleTable | None = None
        if per_sample:
            rows = valid_rows(store)
            shape = (len(jobs), len(rows))
            labels = np.zeros(len(rows), np.int64)
            self.samples = SampleTable(rows, labels, np.zeros(shape, np.float32), np.zeros(shape, np.int64))

    @property
    def classnames(self) -> tuple[str, ...]:
        """Classes of the heads."""
        return self.jobs[0].head.classnames

    def run(self, rank: int, size: int) -> None:
        """Evaluate this process's share of the rows."""
        done, share = 0, self.store
        if size > 1:
            share, places = rows_of_rank(self.store, rank, size)
            done = places.start
        per_sample = self.samples is not None or self.groups is not None
        for tallies, labels in score(self.units, self.store, share, per_sample=per_sample, confusion=self._confusion):
            self._add(tallies, labels, slice(done, done + len(labels)))
            done += len(labels)

    def _add(self, tallies: Sequence[Tally], labels: NDArray[np.integer], places: slice) -> None:
        self.tallies = [a + b for a, b in zip(self.tallies, tallies, strict=True)]
        if self.samples is None and self.groups is None:
            return
        nll = np.concatenate([tally.row_nll for tally in tallies if tally.row_nll is not None])
        rank = np.concatenate([tally.row_rank for tally in tallies if tally.row_rank is not None])
        if self.groups is not None:
            self.groups.add(places, nll, rank)
        if self.samples is not None:
            self.samples.labels[places] = labels
            self.samples.nll[:, places], self.samples.rank[:, places] = nll, rank

    def sums(self) -> list[NDArray[np.generic]]:
        """Arrays to be summed over processes, in place."""
        found = [array for tally in self.tallies for array in tally.sums.values()]
        found += self.groups.sums if self.groups is not None else []
        return found + ([] if self.samples is None else [self.samples.labels, self.samples.nll, self.samples.rank])

    def results(self) -> list[Row]:
        """Metrics of each head, including those of groups."""
        if not self.tallies[0].n:
            raise HeadError(f"no rows were evaluated; {self.store.name!r} has no valid row")
        found: list[Row] = [{**result} for tally in self.tallies for result in tally.results()]
        if self._confusion:
            found = [{**one, "macro_f1": macro_f1(counts)} for one, counts in zip(found, self.confusion(), strict=True)]
        if has_frames(self.store):
            found = [{**one, **other} for one, other in zip(found, frame_results(self.jobs, self.store), strict=True)]
        if self.groups is not None:
            found = [{**one, **other} for one, other in zip(found, self.groups.results(), strict=True)]
        return found

    def confusion(self) -> NDArray[np.int64]:
        """Counts (H, C, C)."""
        return np.concatenate([tally.confusion for tally in self.tallies if tally.confusion is not None])


class Named(Protocol):
    """A split: a store or a data set."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def split(self) -> str:
        """Name of the split."""


def store_labels(stores: Sequence[Named], names: Sequence[str] | None = None) -> list[str]:
    """Name of each store in the keys of rows.

    Raises
    ------
    HeadError
        For a repeated name, or the wrong number of names.
    """
    if names is not None:
        if len(names) != len(stores) or len(set(names)) < len(names):
            raise HeadError(f"names {', '.join(names)}: expected {len(stores)} different names, one per split")
        return list(names)
    times = Counter(store.name for store in stores)
    labels = [store.name if times[store.name] == 1 else f"{store.name}/{store.split}" for store in stores]
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise HeadError(f"{', '.join(repeated)}: given twice; give each split once")
    return labels


def subsets_of(
    stores: Sequence[FeatureTable], labels: Sequence[str], subset: ClassSubset
) -> list[Sequence[int] | Projection | None]:
    """The class subset of each store: the same for all, or looked up by label or name."""
    if not isinstance(subset, Mapping):
        return [subset] * len(stores)
    return [subset.get(label, subset.get(store.name)) for store, label in zip(stores, labels, strict=True)]


def _describe(head: LogitHead, stores: Sequence[FeatureTable]) -> Row:
    """The part of a row that does not depend on results."""
    row: Row = {
        "head": head.name,
        "encoder": ", ".join(dict.fromkeys(store.encoder_name or "unnamed" for store in stores)),
        "params": head.provenance.params,
        "fitted_on": head.provenance.fitted_on,
        "chosen_on": head.provenance.chosen_on,
    }
    if "protocol" in head.provenance.params:
        row["protocol"] = head.provenance.params["protocol"]
    if head.alpha is not None:
        row["alpha"] = float(head.alpha)
    return row


def reportable(heads: Sequence[LogitHead], store: FeatureTable, options: EvaluateOptions) -> FeatureTable:
    """The store, after refusing or excluding rows that heads have seen."""
    seen = check_seen(options.get("seen", "refuse"))
    if seen == "exclude":
        return unseen_by(store, heads)
    if seen == "allow":
        return store
    allow_chosen = options.get("allow_chosen", False)
    if not allow_chosen:
        refuse_chosen(heads, store)
    for head in heads:
        refuse_seen(head, store, ROLES[:1] if allow_chosen else ROLES, named=False)
    return store


def refuse_chosen(heads: Sequence[LogitHead], store: FeatureTable) -> None:
    """Raise a HeadError if one of the heads was chosen on the store, where its results are optimistic."""
    for head in heads:
        if head.provenance.was_chosen_on(store):
            raise HeadError(
                f"{head.name} was chosen on {store.name}/{store.split}, {OPTIMISTIC}; "
                "report on another split (--allow-seen, in Python allow_chosen=True, reproduces papers that do not)"
            )


def choose(
    heads: Sequence[object],
    selection: FeatureTable | tuple[ArrayLike, ArrayLike],
    *,
    metric: str | None = None,
    class_subset: ClassSubset = None,
    distributed: bool = False,
    seen: Seen = "refuse",
) -> LogitHead:
    """The best head on a selection split, a store or ``(X, y)``; `evaluate` then refuses to report it on that split.

    Rows of the split that one of the heads was fitted on are refused, or left out with ``seen="exclude"``. The default
    metric is ``top1``, for multi-label heads ``map`` (short for ``map_macro``). ``nll``, ``nll_capped``, ``brier`` and
    ``ece`` are minimised, the others maximised. Ties go to the lower NLL, then to the earlier head; ``tied`` in the
    record of the choice counts the heads that share the best value, if there are several.

    Raises
    ------
    HeadError
        For an unknown metric, or a selection split that one of the heads was fitted on.
    """
    fitted = [as_head(head) for head in heads]
    if isinstance(selection, tuple):
        selection = _in_memory(*selection, fitted[0])
    multilabel = any(head.multilabel for head in fitted)
    metric = selection_metric(metric, multilabel=multilabel)
    if check_seen(seen) == "exclude":
        selection = unseen_by(selection, fitted, ROLES[:1])
    elif seen == "refuse":
        refuse_fitted(fitted, selection)
    rows = evaluate(fitted, [selection], class_subset=class_subset, seen="allow", distributed=distributed)
    values, nll = (
        [row[f"{selection.name}:{key}"] for row in rows] for key in (metric, "binary_nll" if multilabel else "nll")
    )
    best, found = best_of(values, nll, metric)
    return fitted[best].with_provenance(fitted[best].provenance.chosen(selection, **found))


def _in_memory(X: ArrayLike, y: ArrayLike, head: LogitHead) -> ResidentStore:
    """A store of the head's encoder from arrays, whose labels are as `predict` returns them."""
    classes = np.arange(len(head.classnames)) if head.classes is None else head.classes
    samples = as_samples(X, y, classnames=head.classnames, classes=classes)
    ((features, labels),) = samples.blocks()
    record = head.provenance
    return ResidentStore(
        torch.as_tensor(features),
        labels,
        head.classnames,
        encoder_key=record.encoder_key,
        text_digests=() if record.text_digest is None else (record.text_digest,),
    )


def refuse_fitted(heads: Sequence[LogitHead], selection: FeatureTable) -> None:
    """Raise a HeadError if one of the heads was fitted on the selection split, or on rows of it."""
    for head in heads:
        if head.provenance.was_fitted_on(selection):
            raise HeadError(
                f"{head.name} was fitted on {selection.name}/{selection.split}, where its results are optimistic; "
                "choose on a split that none of the heads was fitted on"
            )
        refuse_seen(head, selection, ROLES[:1])


def best_of(values: Sequence[float], nll: Sequence[float], metric: str) -> tuple[int, Row]:
    """Position of the best value of a metric, and a record of it; ties go to the lower NLL, then to the earlier.

    Examples
    --------
    >>> best_of([0.9, 1.0, 1.0], [0.3, 0.2, 0.1], "top1")
    (2, {'metric': 'top1', 'value': 1.0, 'candidates': 3, 'tied': 2})
    """
    found = np.asarray(values, np.float64)
    if np.isnan(found).all():
        raise HeadError(f"{metric} is not defined for any head: no class has a row to choose by; use another split")
    best = int(np.lexsort((np.asarray(nll), found if metric in LOWER_IS_BETTER else -found))[0])
    entry: Row = {"metric": metric, "value": float(found[best]), "candidates": len(found)}
    tied = int((found == found[best]).sum())
    return best, {**entry, "tied": tied} if tied > 1 else entry
