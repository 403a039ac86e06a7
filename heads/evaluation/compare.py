"""Compare two heads on the same rows: paired differences with intervals, and paired tests."""

from collections.abc import Sequence
from typing import Unpack, cast

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.protocol import FeatureTable
from heads.evaluation.bootstrap import LEVEL, DrawOptions, bootstrap, bootstrap_groups, sign_test
from heads.evaluation.evaluate import Judgement, judge
from heads.evaluation.groups import Groups, groups_of
from heads.evaluation.metrics import Row
from heads.evaluation.multilabel import multilabel_intervals
from heads.evaluation.passes import ClassSubset, SampleTable
from heads.evaluation.seen import Seen


class CompareOptions(DrawOptions, total=False):
    """Further keywords of `compare`."""

    seen: Seen


def compare(
    head_a: object,
    head_b: object,
    stores: Sequence[FeatureTable],
    *,
    class_subset: ClassSubset = None,
    allow_chosen: bool = False,
    groups: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
    **options: Unpack[CompareOptions],
) -> list[Row]:
    """Compare two heads on each store, row by row.

    Parameters
    ----------
    head_a, head_b : fitted heads
    stores, class_subset, allow_chosen, groups : as in `heads.evaluate`
    clusters
        Metadata columns; rows with equal values in all of them are resampled together (see `heads.bootstrap`).
    **options
        `draws`, `level`, `seed` of the percentile bootstrap; `seen` as in `heads.evaluate`.

    Returns
    -------
    One dict per store: ``store``, ``n``, ``level``, ``heads``; for ``top1`` and ``nll`` each ``a``, ``b`` and
    ``difference`` (b minus a), as ``[value, low, high]``; ``mcnemar``: rows that only a or only b predicts correctly,
    and the exact two-sided ``p``; ``sign_nll``: rows where a or b has the smaller NLL, and ``p``; with groups,
    ``groups``: rows and ``top1`` difference of each, and ``worst_group_top1`` of a and b; with ``seen="exclude"``,
    ``n_excluded``.

    Raises
    ------
    MismatchError, HeadError
        As `heads.evaluate`.
    """
    seen = options.pop("seen", "refuse")
    draws = cast(DrawOptions, options)
    judgement = judge(
        [head_a, head_b], stores, class_subset=class_subset, allow_chosen=allow_chosen, seen=seen, per_sample=True
    )
    names = [row["head"] + (f" ({row['protocol']})" if "protocol" in row else "") for row in judgement.rows]
    found = []
    for label, store in judgement.stores.items():
        table = judgement.samples[label]
        codes = None if clusters is None else groups_of(store, clusters).codes
        record = {"store": label, "n": len(table.rows), "level": options.get("level", LEVEL), "heads": names}
        if seen == "exclude":
            record["n_excluded"] = judgement.rows[0][f"{label}:n_excluded"]
        record |= _differences(table, codes, draws)
        if groups is not None:
            record |= _by_group(table, groups_of(store, groups), draws)
        found.append(record)
    return found


def add_intervals(judgement: Judgement, **options: Unpack[DrawOptions]) -> list[Row]:
    """Rows of `heads.judge` with ``"<store>:top1_interval"`` and ``"<store>:nll_interval"``, each [low, high].

    Of multi-label heads: ``map_macro_interval``, ``f1_macro_interval`` and ``f1_micro_interval``.

    Raises
    ------
    HeadError
        If the judgement has no per-sample results.
    """
    if not judgement.samples and not judgement.scores:
        raise HeadError("intervals need per-sample results; call heads.judge with per_sample=True")
    rows = [dict(row) for row in judgement.rows]
    for label, table in judgement.samples.items():
        for metric, values in (("top1", table.rank == 0), ("nll", table.nll)):
            for row, interval in zip(rows, bootstrap(values, **options), strict=True):
                row[f"{label}:{metric}_interval"] = [interval.low, interval.high]
    for label, scores in judgement.scores.items():
        for row, found in zip(rows, multilabel_intervals(scores, **options), strict=True):
            row.update({f"{label}:{key}": ends for key, ends in found.items()})
    return rows


def _differences(table: SampleTable, clusters: NDArray[np.int64] | None, options: DrawOptions) -> Row:
    hits, nll = (table.rank == 0).astype(np.float64), table.nll.astype(np.float64)
    found: Row = {}
    for metric, (a, b) in (("top1", hits), ("nll", nll)):
        intervals = bootstrap([a, b, b - a], clusters=clusters, **options)
        found[metric] = dict(zip(("a", "b", "difference"), map(list, intervals), strict=True))
    only_a, only_b, p = sign_test(hits[0], hits[1])
    found["mcnemar"] = {"only_a": only_a, "only_b": only_b, "p": p}
    worse, better, p = sign_test(nll[0], nll[1])
    found["sign_nll"] = {"a_smaller": better, "b_smaller": worse, "p": p}
    return found


def _by_group(table: SampleTable, groups: Groups, options: DrawOptions) -> Row:
    hits = (table.rank == 0).astype(np.float64)
    differences, _ = bootstrap_groups(hits[1] - hits[0], groups.codes, **options)
    rows = np.bincount(groups.codes)
    rated = np.isin(groups.codes, groups.known)
    _, codes = np.unique(groups.codes[rated], return_inverse=True)
    worst = {who: list(bootstrap_groups(hits[h][rated], codes, **options)[1]) for h, who in enumerate("ab")}
    return {
        "groups": {
            name: {"rows": int(count), "top1_difference": list(interval)}
            for name, count, interval in zip(groups.names, rows, differences, strict=True)
        },
        "worst_group_top1": worst,
    }
