"""Evaluate many heads on many stores in one pass over each store, and choose a head on a selection split."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.datasets import Dataset
from featcache.errors import HeadError
from featcache.processes import rank_and_size, sum_over_ranks
from featcache.store.protocol import FeatureTable
from heads.evaluation.groups import groups_of, over_domains
from heads.evaluation.metrics import LOWER_IS_BETTER, Row, selection_metric
from heads.evaluation.multilabel import MultiLabelPass, ScoreTable
from heads.evaluation.passes import ClassSubset, SampleTable, StorePass, jobs_for
from heads.evaluation.projections import Projection
from heads.evaluation.seen import OPTIMISTIC, Seen, check_seen, excluded, refuse_seen, rows_in, unseen_by
from heads.fitted.base import LogitHead, as_head
from heads.fitted.provenance import ROLES
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
    allow_chosen : whether to report on rows that a head was chosen on: a leak, for reproducing papers
    seen
        What to do with rows that a head was fitted or chosen on, which are recognised by content, not by the name of
        the split. "refuse" (default) raises an error, unless the store is the recorded training split under its own
        name, in which case ``fitted_on`` shows that these are training rows. "exclude" leaves out the rows that any
        head has seen, so that all heads are evaluated on the same rows, and reports ``"<name>:n_excluded"``. "allow"
        evaluates all rows.
    groups : metadata columns (``label`` is the class) by whose values accuracy and NLL are also reported
    reference : name of the in-distribution store, which is not a shifted domain. Default: the first
    names : names of the stores in the keys of rows, in `class_subset` and in `reference`. Default: the stores' own
    distributed : whether torchrun's processes share the rows; all make the same call, and get all results
    """

    class_subset: ClassSubset
    allow_chosen: bool
    seen: Seen
    groups: Sequence[str] | None
    reference: str | None
    names: Sequence[str] | None
    distributed: bool


@dataclass(frozen=True)
class Judgement:
    """Results of `judge`.

    Attributes
    ----------
    rows : one per head, as `heads.evaluate` returns them
    samples : per-sample results by the name of the store in the rows; empty unless requested
    confusion : (H, C, C) counts [label, predicted class] by store; empty unless requested
    classnames : the C classes of labels and counts by store
    stores : the stores, without excluded rows
    scores : of multi-label stores, in place of `samples`
    """

    rows: list[Row]
    samples: dict[str, SampleTable] = field(default_factory=dict)
    confusion: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    classnames: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stores: dict[str, FeatureTable] = field(default_factory=dict, repr=False)
    scores: dict[str, ScoreTable] = field(default_factory=dict)


def evaluate(heads: Sequence[object], stores: Sequence[FeatureTable], **options: Unpack[EvaluateOptions]) -> list[Row]:
    """One row per head, with every metric on every store.

    Linear heads are evaluated together, block by block, without storing all logits. Interpolations of the same two
    heads share two matrix products, and kNN heads of different k share the search. `heads.judge` also returns
    per-sample results and confusion counts.

    Parameters
    ----------
    heads : fitted estimators or `LogitHead`; ``fitted.path_heads()`` gives every setting of a fit
    stores : image stores (valid rows are evaluated): on disk or, from `heads.resident`, in memory or on a GPU
    **options : see `EvaluateOptions`

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
    """`heads.evaluate`, with further results.

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
    passes: list[StorePass | MultiLabelPass] = []
    # Everything is checked before the first pass.
    rests = [reportable(fitted, store, options) for store in stores]
    for store, subset in zip(rests, subsets_of(stores, labels, options.get("class_subset")), strict=True):
        columns = options.get("groups")
        groups = None if columns is None else groups_of(store, columns)
        if is_multilabel(store):
            asked = {"class_subset": subset is not None, "confusion": confusion}
            passes.append(MultiLabelPass(fitted, store, asked, groups, per_sample=per_sample))
            continue
        jobs = jobs_for(fitted, store, subset)
        passes.append(StorePass(jobs, store, groups, per_sample=per_sample, confusion=confusion))
    distributed = options.get("distributed", False)
    for one in passes:
        one.run(*(rank_and_size() if distributed else (0, 1)))
    if distributed:
        sum_over_ranks([array for one in passes for array in one.sums()])
    judgement = Judgement(rows, stores=dict(zip(labels, rests, strict=True)))
    for label, store, rest, one in zip(labels, stores, rests, passes, strict=True):
        for row, result in zip(rows, one.results(), strict=True):
            row.update({f"{label}:{key}": value for key, value in result.items()})
        judgement.classnames[label] = one.classnames
        if isinstance(one, StorePass) and confusion:
            judgement.confusion[label] = one.confusion()
        if isinstance(one, StorePass) and one.samples is not None:
            judgement.samples[label] = replace(one.samples, rows=rows_in(store, rest, one.samples.rows))
        if isinstance(one, MultiLabelPass) and one.scores is not None:
            judgement.scores[label] = replace(one.scores, rows=rows_in(store, rest, one.scores.rows))
    exclude, named = options.get("seen") == "exclude", dict(zip(labels, stores, strict=True))
    for row, head in zip(rows, fitted, strict=True):
        own = [label for label, store in named.items() if not exclude and head.provenance.was_fitted_on(store)]
        row["splits"] = {label: f"{store.name}/{store.split}" for label, store in named.items()}
        row.update({"training_rows": own} if own else {})
        row.update(over_domains(row, labels, options.get("reference"), own))
        if exclude:
            row.update({f"{label}:n_excluded": excluded(named[label], judgement.stores[label]) for label in labels})
    return judgement


def store_labels(stores: Sequence[FeatureTable | Dataset], names: Sequence[str] | None = None) -> list[str]:
    """Name of each store or data set in the keys of rows; HeadError for a repeated name, or too few or many names."""
    if names is not None:
        if len(names) != len(stores) or len(set(names)) < len(names):
            raise HeadError(f"names {', '.join(names)}: expected {len(stores)} different names, one per split")
        return list(names)
    times = Counter(store.name for store in stores)
    labels = [store.name if times[store.name] == 1 else f"{store.name}/{store.split}" for store in stores]
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
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
    record, encoders = head.provenance, dict.fromkeys(store.encoder_name or "unnamed" for store in stores)
    row: Row = {"head": head.name, "encoder": ", ".join(encoders), "params": record.params}
    row |= {"fitted_on": record.fitted_on, "chosen_on": record.chosen_on}
    row |= {"protocol": record.params["protocol"]} if "protocol" in record.params else {}
    return row if head.alpha is None else {**row, "alpha": float(head.alpha)}


def reportable(heads: Sequence[LogitHead], store: FeatureTable, options: EvaluateOptions) -> FeatureTable:
    """The store, after refusing or excluding rows that heads have seen."""
    seen, allow_chosen = check_seen(options.get("seen", "refuse")), options.get("allow_chosen", False)
    if seen == "exclude":
        return unseen_by(store, heads)
    if seen == "allow":
        return store
    for head in heads:
        if not allow_chosen and head.provenance.was_chosen_on(store):
            raise HeadError(
                f"{head.name} was chosen on {store.name}/{store.split}, {OPTIMISTIC}; "
                "report on another split (to reproduce papers that do not: --allow-seen, in Python allow_chosen=True)"
            )
        refuse_seen(head, store, ROLES[:1] if allow_chosen else ROLES, named=False)
    return store


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
    for head in fitted if seen == "refuse" else ():
        if head.provenance.was_fitted_on(selection):
            raise HeadError(
                f"{head.name} was fitted on {selection.name}/{selection.split}, {OPTIMISTIC}; "
                "choose on a split that none of the heads was fitted on"
            )
        refuse_seen(head, selection, ROLES[:1])
    rows = evaluate(fitted, [selection], class_subset=class_subset, seen="allow", distributed=distributed)
    nll_key = "binary_nll" if multilabel else "nll"
    values, nll = ([row[f"{selection.name}:{key}"] for row in rows] for key in (metric, nll_key))
    best, found = best_of(values, nll, metric)
    return fitted[best].with_provenance(fitted[best].provenance.chosen(selection, **found))


def _in_memory(X: ArrayLike, y: ArrayLike, head: LogitHead) -> ResidentStore:
    """A store of the head's encoder from arrays, whose labels are as `predict` returns them."""
    ((features, labels),) = as_samples(X, y, classnames=head.classnames, classes=head.classes_).blocks()
    key, text = head.provenance.encoder_key, head.provenance.text_digest
    digests = () if text is None else (text,)
    return ResidentStore(torch.as_tensor(features), labels, head.classnames, encoder_key=key, text_digests=digests)


def best_of(values: Sequence[float], nll: Sequence[float], metric: str) -> tuple[int, Row]:
    """Position of the best value of a metric, and a record of it; ties go to the lower NLL, then to the earlier.

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
