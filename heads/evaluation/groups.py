"""Worst-group metrics within a store, and mean and worst over shifted domains.

Robustness benchmarks report the worst group (WILDS, Koh et al. 2021; Waterbirds: background x class), and the mean and
the worst over shifted domains. A group is a value of a metadata column, or a combination of values.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.protocol import FeatureTable
from heads.evaluation.metrics import LOWER_IS_BETTER, METRICS, MULTILABEL, Row

LABEL = "label"
"""A column that every store has: the class names of its rows."""


@dataclass(frozen=True)
class Groups:
    """The group of each valid row of a store."""

    codes: NDArray[np.int64]  # (N',) group indices
    names: tuple[str, ...]  # the value of each group, or ``column=value, ...`` for combinations
    unknown: frozenset[int] = frozenset()  # codes of groups with an empty cell

    @property
    def known(self) -> list[int]:
        """Codes of the groups that can be the worst: those without an empty cell, or all if each has one."""
        return [code for code in range(len(self.names)) if code not in self.unknown] or list(range(len(self.names)))


def groups_of(store: FeatureTable, columns: Sequence[str]) -> Groups:
    """Groups by the values of metadata columns; ``label`` is the class. HeadError for a column that is not there."""
    if not columns:
        raise HeadError(f"no group column was named; {_known(store)}")
    parts = [np.unique(_column(store, column)[store.valid], return_inverse=True) for column in columns]
    sizes = [len(seen) for seen, _ in parts]
    present, codes = np.unique(np.ravel_multi_index([of for _, of in parts], sizes), return_inverse=True)
    places = zip(parts, np.unravel_index(present, sizes), strict=True)
    cells = list(zip(*([_cell(seen[i]) for i in place] for (seen, _), place in places), strict=True))
    unknown = frozenset(code for code, values in enumerate(cells) if not all(values))
    names = [", ".join(f"{c}={v}" for c, v in zip(columns, values, strict=True)) for values in cells]
    if len(columns) == 1:
        names = [value for (value,) in cells]
    return Groups(codes.astype(np.int64), tuple(names), unknown)


def _cell(value: object) -> str:
    """A cell as text: empty if it is NaN, which columns of numbers have for a missing value."""
    return "" if value != value else str(value)


def _column(store: FeatureTable, column: str) -> NDArray[np.generic]:
    """A metadata column (N,) of all rows."""
    if column in store.metadata:
        return store.metadata[column]
    if column != LABEL:
        raise HeadError(f"{store.name!r} has no metadata column {column!r}; {_known(store)}")
    uses = Counter(store.classnames)  # classes with the same name are separate groups
    apart = [f"{name} ({place})" if uses[name] > 1 else name for place, name in enumerate(store.classnames)]
    names: NDArray[np.generic] = np.asarray([*apart, ""], object)  # an invalid row's label is -1
    return np.asarray(names[store.labels])


def _known(store: FeatureTable) -> str:
    columns = [*store.metadata, LABEL]
    return f"expected one of {', '.join(columns)} (metadata columns come with the data when it is encoded)"


class GroupSums:
    """Rows, hits and NLL of H heads by group, accumulated block by block.

    >>> sums = GroupSums(Groups(np.array([0, 0, 1]), ("day", "night")), n_heads=1)
    >>> sums.add(slice(0, 3), np.array([[0.1, 0.3, 2.0]]), np.array([[0, 0, 1]]))
    >>> found = sums.results()[0]
    >>> found["group_top1"], found["worst_group"]
    ({'day': 1.0, 'night': 0.0}, 'night')
    """

    def __init__(self, groups: Groups, n_heads: int) -> None:
        self.groups = groups
        self.rows = np.zeros(len(groups.names), np.int64)
        self.hits = np.zeros((n_heads, len(groups.names)), np.int64)
        self.nll = np.zeros((n_heads, len(groups.names)))

    def add(self, places: slice, nll: NDArray[np.floating], rank: NDArray[np.integer]) -> None:
        """Add a block: its positions among the valid rows, NLL (H, n) and rank (H, n)."""
        codes, size = self.groups.codes[places], len(self.rows)
        self.rows += np.bincount(codes, minlength=size)
        for head in range(len(nll)):
            self.hits[head] += np.bincount(codes[rank[head] == 0], minlength=size)
            self.nll[head] += np.bincount(codes, weights=nll[head], minlength=size)

    def results(self) -> list[Row]:
        """Accuracy, NLL and rows by group of each head, and its worst group (the first on ties).

        Rows with an empty cell are a group (``""``) that is never the worst, since their group is unknown (WILDS also
        leaves out the region of unknown countries).
        """
        top1, nll = self.hits / self.rows, self.nll / self.rows  # `groups_of` names no group without rows
        names, known = self.groups.names, self.groups.known
        return [
            {
                "worst_group_top1": float(top1[h, known].min()),
                "worst_group": names[known[int(top1[h, known].argmin())]],
                "worst_group_nll": float(nll[h, known].max()),
                "group_top1": dict(zip(names, top1[h].tolist(), strict=True)),
                "group_nll": dict(zip(names, nll[h].tolist(), strict=True)),
                "group_rows": dict(zip(names, self.rows.tolist(), strict=True)),
            }
            for h in range(len(nll))
        ]


def over_domains(row: Row, domains: Sequence[str], reference: str | None = None, fitted: Collection[str] = ()) -> Row:
    """Mean and worst of every metric over the shifted domains of a results row.

    These are all stores but the `reference` (default: the first; HeadError if it is none of the domains) and those that
    the head was `fitted` on, which are listed in ``shifted_left_out``. Returns ``shifted_mean_<metric>`` (unweighted),
    ``shifted_worst_<metric>`` and ``shifted_worst_domain`` (by top1 or mAP), or nothing without a shifted domain. Mean
    and worst are NaN if a metric is undefined on one domain (multi-label without positives).

    >>> row = {f"{d}:{m}": v for d, v in (("a", 0.9), ("b", 0.7), ("c", 0.5)) for m in METRICS}
    >>> found = over_domains(row, ["a", "b", "c"])
    >>> found["shifted_mean_top1"], found["shifted_worst_top1"], found["shifted_worst_domain"]
    (0.6, 0.5, 'c')
    """
    if reference is not None and reference not in domains:
        raise HeadError(f"reference {reference!r} is not one of the stores {', '.join(domains)}")
    first = domains[0] if reference is None else reference
    left_out = [domain for domain in domains if domain != first and domain in fitted]
    found: Row = {"shifted_left_out": left_out} if left_out else {}
    shifted = [domain for domain in domains if domain != first and domain not in left_out]
    if not shifted:
        return found
    main = "top1" if f"{shifted[0]}:top1" in row else "map_macro"
    for metric in METRICS if main == "top1" else MULTILABEL:
        values = [float(row[f"{domain}:{metric}"]) for domain in shifted]
        worst = max(values) if metric in LOWER_IS_BETTER else min(values)
        found[f"shifted_mean_{metric}"] = sum(values) / len(values)
        found[f"shifted_worst_{metric}"] = math.nan if any(map(math.isnan, values)) else worst
    rated = [domain for domain in shifted if not math.isnan(row[f"{domain}:{main}"])] or shifted
    return {**found, "shifted_worst_domain": min(rated, key=lambda domain: row[f"{domain}:{main}"])}
