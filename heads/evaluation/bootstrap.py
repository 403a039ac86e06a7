"""Percentile bootstrap of means over rows, and exact paired tests (Efron 1979; McNemar 1947).

A resample of N rows is a vector of N counts, so the means of many series under many resamples are one matrix product.
All series share the same resamples, which makes differences of two heads paired.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError

DRAWS = 2000
"""Default number of resamples, with which the ends of a 95% interval are accurate to about a tenth of its width."""

MOST_DRAWS = 10**7
LEVEL = 0.95
"""Default level of intervals."""

_CELLS = 1 << 22  # counts in memory at a time: 32 MiB


class DrawOptions(TypedDict, total=False):
    """Optional keywords of the percentile bootstrap."""

    draws: int  # number of resamples, by default `DRAWS`
    level: float  # share of the resamples within the interval, by default `LEVEL`
    seed: int  # of `numpy.random.default_rng`, by default 0


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: ArrayLike, *, clusters: ArrayLike | None = None, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> list[Interval]:
    """Confidence intervals of the means of H series over the same rows.

    Parameters
    ----------
    values : (H, N), or (N,) for one series
    clusters : (N,) integers
        Rows of one cluster (views of one image, patches of one slide) are resampled together, so that their dependence
        does not narrow the interval. None resamples single rows. The mean is over rows either way.
    draws, level, seed : as in `DrawOptions`

    Returns
    -------
    One `Interval` per series: its mean, and the ``(1 -+ level) / 2`` quantiles of its resampled means, as
    ``scipy.stats.bootstrap(method="percentile")``.

    Raises
    ------
    HeadError
        For wrong shapes, no rows, values that are not finite, fewer than 2 draws, or a level outside (0, 1).

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
    """Confidence intervals of one series by group, and of its smallest group mean (worst-group accuracy).

    Resampling is within groups, so that groups keep their sizes. The smallest of several noisy means is biased
    downwards, which the interval shows: with small groups it may lie below the value.

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
    means, drawn = [], []
    for group in range(int(groups.max()) + 1):
        rows = series[groups == group]
        means.append(rows.mean())
        drawn.append(np.concatenate([counts @ rows / len(rows) for counts in draw_counts(len(rows), draws, rng)]))
    (worst,) = intervals_of(np.array([min(means)]), np.min(drawn, axis=0)[:, None], level)
    return intervals_of(np.array(means), np.stack(drawn, axis=1), level), worst


def sign_test(a: ArrayLike, b: ArrayLike) -> tuple[int, int, float]:
    """Exact two-sided sign test of paired values; for hits and misses this is McNemar's exact test.

    Parameters
    ----------
    a, b : (N,)

    Returns
    -------
    Number of rows with a > b, number of rows with b > a, and the p-value (1 if no row differs). Ties are ignored.

    >>> sign_test([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
    (6, 0, 0.03125)
    """
    from scipy.stats import binomtest

    from heads.rows.arrays import to_numpy  # loads torch, which `--help` does without

    first, second = to_numpy(a), to_numpy(b)
    if first.shape != second.shape or first.ndim != 1:
        raise HeadError(f"paired values are {first.shape} and {second.shape}, expected (N,) twice")
    if np.isnan(first).any() or np.isnan(second).any():
        raise HeadError("paired values hold NaN, which is neither larger nor smaller; leave these rows out")
    above, below = int((first > second).sum()), int((second > first).sum())
    return above, below, float(binomtest(above, above + below).pvalue) if above + below else 1.0


def _series(values: ArrayLike, draws: int, level: float, seed: int) -> NDArray[np.float64]:
    from heads.rows.arrays import to_numpy  # loads torch, which `--help` does without

    series = np.atleast_2d(to_numpy(values).astype(np.float64))
    if series.ndim != 2 or not series.size:
        raise HeadError(f"values are {np.shape(values)}, expected (N,) or (H, N) with at least one row")
    if not np.isfinite(series).all():
        raise HeadError("values are not all finite (a masked class has infinite NLL); leave these rows out")
    check_draws(draws, level, seed)
    return series


def check_draws(draws: int, level: float, seed: int) -> None:
    """Raise a HeadError for a number of draws, level or seed out of range."""
    if not 2 <= draws <= MOST_DRAWS or not 0 < level < 1:
        raise HeadError(
            f"got {draws} draws and level {level}; expected 2 to {MOST_DRAWS:,} draws, and a level between 0 and 1"
        )
    if seed < 0:
        raise HeadError(f"got seed {seed}, expected a whole number >= 0")


def draw_counts(n: int, draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Counts (b, n) of how often each of n rows is drawn, for b resamples at a time."""
    size = max(1, _CELLS // n)
    for start in range(0, draws, size):
        some = min(size, draws - start)
        places = rng.integers(0, n, (some, n)) + n * np.arange(some)[:, None]
        yield np.bincount(places.ravel(), minlength=some * n).reshape(some, n).astype(np.float64)


def _by_cluster(
    series: NDArray[np.float64], clusters: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums (H, G) and number of rows (G,) of each cluster."""
    if clusters.shape != series.shape[1:]:
        raise HeadError(f"clusters are {clusters.shape}, expected {series.shape[1:]}: one per row")
    seen, codes = np.unique(clusters, return_inverse=True)
    if len(seen) < 2:
        raise HeadError("all rows are one cluster; an interval needs at least two")
    sums = np.stack([np.bincount(codes, weights=row, minlength=len(seen)) for row in series])
    return sums.astype(np.float64), np.bincount(codes).astype(np.float64)


def intervals_of(values: NDArray[np.float64], means: NDArray[np.float64], level: float) -> list[Interval]:
    """Intervals from values (H,) and resampled means (draws, H)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, ends)) for ends in zip(values, low, high, strict=True)]
