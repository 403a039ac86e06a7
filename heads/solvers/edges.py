"""Warning of a hyper-parameter chosen at the end of its path, where a better value may lie beyond."""

import inspect
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

_GAIN = 0.02


def warn_at_edge(
    name: str, values: Sequence[float] | NDArray[np.float64], losses: NDArray[np.float64], best: int
) -> None:
    """Warn if the best of three or more values is the first or the last, and clearly better than its neighbour.

    Parameters
    ----------
    name : of the hyper-parameter
    values : (A,), ascending or descending
    losses : (A,), minimised; a difference of less than two percent counts as flat
    best : index of the chosen value

    >>> with warnings.catch_warnings(record=True) as found:
    ...     warnings.simplefilter("always")
    ...     warn_at_edge("C", [1.0, 10.0, 100.0], np.array([3.0, 2.0, 1.0]), 2)
    ...     warn_at_edge("C", [1.0, 10.0, 100.0], np.array([3.0, 2.0, 2.0]), 2)
    >>> [str(one.message) for one in found]
    ['C = 100 is the end of its path, and the best may lie beyond it; try larger values']
    """
    if len(values) < 3 or best not in (0, len(values) - 1):
        return
    beside = losses[1] if best == 0 else losses[-2]
    if losses[best] < (1 - _GAIN) * beside:
        what = f"{name} = {float(values[best]):.6g} is the end of its path, and the best may lie beyond it"
        side = "larger" if values[best] == max(values) else "smaller"
        warnings.warn(f"{what}; try {side} values", UserWarning, stacklevel=callers_level())


def callers_level() -> int:
    """The `stacklevel` of the first caller outside the packages, whose line a warning should name."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("heads", "featcache", "ft"):
        level, frame = level + 1, frame.f_back
    return level - 1
