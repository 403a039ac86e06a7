"""The hyper-parameter search of the CLIP paper's linear probes: coarse, then finer around the best.

Radford et al. 2021, appendix A.3: 96 logarithmically spaced strengths in [1e-6, 1e6]; seven of them first, two decades
apart, then the interval around the best is halved until neighbours on the grid have been tried. About 15 fits
instead of 96. Where the score has one peak along the grid, the result is that of the whole grid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRID", "search"]

GRID = np.logspace(-6, 6, 96)
"""Values of C; those of the penalty 1 / C are the same numbers, in the other order."""


def search(score: Callable[[float], float], grid: NDArray[np.float64] = GRID) -> dict[float, float]:
    """Scores (larger is better) of the values that the search came to, by value, in the order in which they came.

    The best of them is the result; on ties the smallest value.

    Examples
    --------
    >>> found = search(lambda C: -abs(np.log10(C) - 0.3))
    >>> round(max(found, key=found.get), 2), len(found)
    (2.07, 15)
    """
    decades = np.log10(grid)
    places = np.abs(decades[:, None] - np.linspace(decades[0], decades[-1], 7)).argmin(axis=0)
    found: dict[int, float] = {}

    def best() -> int:
        return max(found, key=lambda place: (found[place], -place))

    for place in places.tolist():
        found[place] = score(float(grid[place]))
    span = int(np.diff(places).max()) // 2
    while span:
        centre = best()
        for place in (centre - span, centre + span):
            if 0 <= place < len(grid) and place not in found:
                found[place] = score(float(grid[place]))
        span //= 2
    return {float(grid[place]): value for place, value in found.items()}
