"""Percentile bootstrap of means over rows, and exact paired tests (Efron 1979; McNemar 1947).

Accuracy, NLL, Brier score and their paired differences are means over rows. A draw of N rows with replacement is a
vector of N counts, so that the means of many series under many draws are one matrix product; every series sees the same
draws, and a difference of two heads is drawn pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError

DRAWS = 2000
"""Default number of draws: the ends of a 95% interval are then known to about a tenth of its width."""

MOST_DRAWS = 10**7
LEVEL = 0.95
"""Default share of the draws between the ends of an interval."""

_CELLS = 1 << 22  # counts held at a time: 32 MiB


class DrawOptions(TypedDict, total=False):
    """Keywords of every percentile bootstrap; all are optional.

    Attributes
    ----------
    draws : number of draws. Default: `DRAWS`
    level : share of the draws between the ends. Default: `LEVEL`
    seed : of `numpy.random.default_rng`. Default: 0
    """

    draws: int
    level: float
    seed: int


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of the means of H series over the same rows.

    Parameters
    ----------
    values : (H, N), or (N,) for one series
    clusters : (N,) integers
        Rows of one cluster (views of one image, patches of one slide) are drawn together, so that their dependence
        does not narrow the interval. Default: rows are drawn one by one. The mean is over rows either way.
    draws, level, seed : as in `DrawOptions`

    Returns
    -------
    One `Interval` per series: its mean, and the ``(1 -+ level) / 2`` quantiles of its means under the draws; close to
    ``scipy.stats.bootstrap(method="percentile")``.

    Raises
    ------
    HeadError
        For shapes that do not fit, no rows, values that are not finite, fewer than 2 draws or a level outside (0, 1).

    Examples
    --------
    >>> hits = np.arange(1000) % 4 > 0
    >>> [interval] = bootstrap(hits)
    >>> interval.value, round(interval.low, 2), round(interval.high, 2)
    (0.75, 0.72, 0.78)
    """
    series = _series(values, draws, level, seed)
    sums, sizes = (series, np.ones(series.shape[1])) if clusters is None else _by_cluster(series, np.asarray(clusters))
    rng = np.random.default_rng(seed)
    means = [(counts @ sums.T) / (counts @ sizes)[:, None] for counts in draw_counts(len(sizes), draws, rng)]
    return intervals_of(series.mean(axis=1), np.concatenate(means), level)


def bootstrap_groups(
    values: ArrayLike, codes: ArrayLike, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> tuple[list[Interval], Interval]:
    """Intervals of one series by group, and of its smallest group mean (worst-group accuracy).

    Every draw draws within each group, so that groups keep their sizes. The smallest of several noisy means is biased
    downwards, and the interval shows it: with groups of few rows it may be below the value.

    Parameters
    ----------
    values : (N,)
    codes : (N,) group indices 0 to G-1, each with at least one row
    draws, level, seed : as in `DrawOptions`

    Returns
    -------
    G intervals, and that of the worst group.
    """
    (series,) = _series(values, draws, level, seed)
    groups = np.asarray(codes)
    if groups.shape != series.shape or groups.min() < 0 or (np.bincount(groups) == 0).any():
        raise HeadError(f"group codes are {groups.shape}, expected {series.shape} with 0 to G-1, each at least once")
    rng = np.random.default_rng(seed)
    members = [series[groups == group] for group in range(int(groups.max()) + 1)]
    drawn = np.stack(
        [
            np.concatenate([counts @ rows / len(rows) for counts in draw_counts(len(rows), draws, rng)])
            for rows in members
        ],
        axis=1,
    )
    means = np.array([rows.mean() for rows in members])
    (worst,) = intervals_of(means.min(keepdims=True), drawn.min(axis=1, keepdims=True), level)
    return intervals_of(means, drawn, level), worst


def sign_test(a: ArrayLike, b: ArrayLike) -> tuple[int, int, float]:
    """Exact two-sided sign test of paired values; of hits and misses it is McNemar's exact test.

    Parameters
    ----------
    a, b : (N,)

    Returns
    -------
    Rows with a > b, rows with b > a, and the probability of a split at least as uneven if both were as likely: 1 where
    no row differs. Rows that tie do not count.

    Examples
    --------
    >>> sign_test([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
    (6, 0, 0.03125)
    """
    from scipy.stats import binomtest

    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape or first.ndim != 1:
        raise HeadError(f"paired values are {first.shape} and {second.shape}, expected (N,) twice")
    above, below = int((first > second).sum()), int((second > first).sum())
    return above, below, float(binomtest(above, above + below).pvalue) if above + below else 1.0


def _series(values: ArrayLike, draws: int, level: float, seed: int) -> NDArray[np.float64]:
    series = np.atleast_2d(np.asarray(values, np.float64))
    if series.ndim != 2 or not series.size:
        raise HeadError(f"values are {np.shape(values)}, expected (N,) or (H, N) with at least one row")
    if not np.isfinite(series).all():
        raise HeadError("values are not all finite (a masked class has infinite NLL); leave these rows out")
    check_draws(draws, level, seed)
    return series


def check_draws(draws: int, level: float, seed: int) -> None:
    """HeadError for numbers of draws, levels or seeds out of range."""
    if not 2 <= draws <= MOST_DRAWS or not 0 < level < 1:
        raise HeadError(
            f"got {draws} draws and level {level}; expected 2 to {MOST_DRAWS:,} draws, and a level between 0 and 1"
        )
    if seed < 0:
        raise HeadError(f"got seed {seed}, expected a whole number from 0")


def draw_counts(n: int, draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """How often each of n rows is drawn, (b, n) for some of the draws at a time."""
    size = max(1, _CELLS // n)
    for start in range(0, draws, size):
        some = min(size, draws - start)
        places = rng.integers(0, n, (some, n)) + n * np.arange(some)[:, None]
        yield np.bincount(places.ravel(), minlength=some * n).reshape(some, n).astype(np.float64)


def _by_cluster(
    series: NDArray[np.float64], clusters: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums (H, G) and rows (G,) of each cluster."""
    if clusters.shape != series.shape[1:]:
        raise HeadError(f"clusters are {clusters.shape}, expected {series.shape[1:]}: one for each row")
    seen, codes = np.unique(clusters, return_inverse=True)
    if len(seen) < 2:
        raise HeadError("all rows are one cluster; an interval needs at least two")
    sums = np.stack([np.bincount(codes, weights=row, minlength=len(seen)) for row in series])
    return sums.astype(np.float64), np.bincount(codes).astype(np.float64)


def intervals_of(values: NDArray[np.float64], means: NDArray[np.float64], level: float) -> list[Interval]:
    """Of values (H,) and means under draws (draws, H)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, ends)) for ends in zip(values, low, high, strict=True)]
