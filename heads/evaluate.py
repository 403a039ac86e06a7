"""Judge many heads on many stores in one pass over each; choose one on a selection split, never on a reported one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.errors import HeadError
from heads.checks import same_split, split_id
from heads.judge import judge
from heads.logits import LogitHead, as_head
from heads.metrics import LOWER_IS_BETTER, METRICS
from heads.scoring import ClassSubset

__all__ = ["best_of", "choose", "evaluate"]


def evaluate(
    heads: Sequence[Any],
    stores: Sequence[Any],
    *,
    class_subset: ClassSubset = None,
    allow_chosen: bool = False,
    groups: Sequence[str] | None = None,
    reference: str | None = None,
    distributed: bool = False,
) -> list[dict[str, Any]]:
    """One row a head, with every metric on every store.

    Linear heads are judged together by `heads.kernels.linear_nll`, block by block, without an array of logits; heads of
    one interpolation share two products, since logits interpolate as weights do. Numbers of neighbours in one bank
    share its search. `heads.judge` also keeps single samples and confusion counts.

    Parameters
    ----------
    heads
        Fitted estimators, or the `LogitHead` of such: linear heads, and others that give logits. Every setting of one
        fit is ``fitted.path_heads()``.
    stores
        Image stores (their valid rows count), on a disk or, of `heads.resident`, in memory or on a GPU.
    class_subset
        Class indices of the heads to keep, for all stores or by store name: only these logits exist, and the
        softmax runs over them. The store's labels are then read by its class list: if it names the heads' full
        class list, labels are full indices (each must be in the subset); if it names the subset's classes in the
        subset's order, they are positions in the subset (ImageNet-R and -A, whose labels are 0..199). A `Projection`
        makes new classes, each the largest logit of some of the heads' (ObjectNet).
    allow_chosen
        Report even on a split that a head was chosen on: a leak, for reproducing papers.
    groups
        Metadata columns of the stores (``label`` is the class) by whose values, or combinations of values, accuracy
        and NLL are also reported.
    reference
        Name of the in-distribution store, which does not count as a shifted domain; None is the first.
    distributed
        The processes of torchrun's process group share the rows; every one must call this alike, and gets all rows.

    Returns
    -------
    Rows with ``head``, ``encoder``, ``params``, ``fitted_on``, ``chosen_on``, ``alpha`` (interpolations only) and
    ``"<store.name>:<metric>"``; the name is ``<name>/<split>`` where two of the stores share a name. With groups
    also ``"<name>:worst_group_top1"``, ``worst_group``, ``worst_group_nll`` and, by group, ``group_top1``,
    ``group_nll``, ``group_rows``. Of two or more stores also ``shifted_mean_<metric>``, ``shifted_worst_<metric>`` and
    ``shifted_worst_domain``.

    Raises
    ------
    MismatchError
        If a head and a store differ in encoder, text tower or class list.
    HeadError
        If a head was chosen on one of the stores, a group column is missing, or there is nothing to evaluate.
    """
    return judge(
        heads,
        stores,
        class_subset=class_subset,
        allow_chosen=allow_chosen,
        groups=groups,
        reference=reference,
        distributed=distributed,
    ).rows


def choose(
    heads: Sequence[Any],
    selection: Any,
    *,
    metric: str = "top1",
    class_subset: ClassSubset = None,
    distributed: bool = False,
) -> LogitHead:
    """The best head on a selection split; `evaluate` will refuse to report it on that split.

    Ties go to the lower NLL, then to the earlier head; ``tied`` in the record of the choice counts the heads of the
    best value where there are several. ``nll``, ``nll_capped``, ``brier`` and ``ece`` are minimised, the others
    maximised.

    Raises
    ------
    HeadError
        For an unknown metric, or a selection split that one of the heads was fitted on.
    """
    if metric not in METRICS:
        raise HeadError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    judged = [as_head(head) for head in heads]
    for head in judged:
        if any(same_split(entry, selection) for entry in head.provenance.get("fitted_on", [])):
            raise HeadError(
                f"{head.name} was fitted on {selection.name}/{selection.split}, where it looks better than it is; "
                "choose on a split that fitted none of the heads"
            )
    rows = evaluate(judged, [selection], class_subset=class_subset, allow_chosen=True, distributed=distributed)
    values = [row[f"{selection.name}:{metric}"] for row in rows]
    best, found = best_of(values, [row[f"{selection.name}:nll"] for row in rows], metric)
    entry = {**split_id(selection), **found}
    provenance = judged[best].provenance
    chosen_on = [*provenance.get("chosen_on", []), entry]
    return judged[best].with_provenance({**provenance, "chosen_on": chosen_on})


def best_of(values: Sequence[float], nll: Sequence[float], metric: str) -> tuple[int, dict[str, Any]]:
    """Place of the best value of a metric, ties going to the lower NLL, then to the earlier; and a record of it.

    Examples
    --------
    >>> best_of([0.9, 1.0, 1.0], [0.3, 0.2, 0.1], "top1")
    (2, {'metric': 'top1', 'value': 1.0, 'candidates': 3, 'tied': 2})
    """
    found = np.asarray(values, np.float64)
    best = int(np.lexsort((np.asarray(nll), found if metric in LOWER_IS_BETTER else -found))[0])
    entry: dict[str, Any] = {"metric": metric, "value": float(found[best]), "candidates": len(found)}
    tied = int((found == found[best]).sum())
    return best, {**entry, "tied": tied} if tied > 1 else entry
