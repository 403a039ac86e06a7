"""Where things go in a plot: logit scales, ticks, and labels that keep out of each other's way. No drawing here."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Box: TypeAlias = tuple[float, float, float, float]
"""Left, bottom, right, top."""

EDGE = 1e-3
"""The logit scale has no 0 and no 1: points are drawn within [EDGE, 1 - EDGE]."""
TICKS = (0.1, 0.5, 1, 2, 5, *range(10, 91, 5), 92, 94, 95, 96, 97, 98, 99, 99.5, 99.9)
BESIDE = [(9 * side, 0, side) for side in (1, -1)]
OFF = [
    (x * side, y * up, side * (x > 0)) for y in (12, 26, 40, 54) for x in (9, 0) for up in (1, -1) for side in (1, -1)
]
PLACES: list[tuple[int, int, int]] = list(dict.fromkeys([*BESIDE, *OFF]))
"""Where a label may stand beside its point, best first: offset in points, and the side that it extends to
(1 right, -1 left, 0 both)."""


def logit(p: npt.ArrayLike) -> Floats:
    """log(p / (1 - p)), with p kept off 0 and 1.

    >>> logit([0.5, 0.9]).round(3).tolist()
    [0.0, 2.197]
    """
    kept = np.clip(np.asarray(p, np.float64), 1e-9, 1 - 1e-9)
    return np.asarray(np.log(kept / (1 - kept)))


def expit(z: npt.ArrayLike) -> Floats:
    """1 / (1 + exp(-z)), the inverse of `logit`."""
    return np.asarray(1 / (1 + np.exp(-np.asarray(z, np.float64))))


def drawable(x: float, y: float) -> tuple[float, float]:
    """A point moved off 0 and 1, where a logit-scaled plot can show it.

    >>> drawable(0.5, 1.0)
    (0.5, 0.999)
    """
    return min(max(x, EDGE), 1 - EDGE), min(max(y, EDGE), 1 - EDGE)


def percent_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Round percentages between two fractions, as fractions.

    >>> percent_ticks(0.88, 0.975)
    [0.9, 0.92, 0.94, 0.95, 0.96, 0.97]
    """
    inside = [t / 100 for t in TICKS if low <= t / 100 <= high]
    return inside[:: max(1, math.ceil(len(inside) / most))]


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move heights as little as needed so that any two differ by `gap`, none above `top` if they were not.

    >>> [round(h, 2) for h in spread([0.5, 0.52, 0.1], 0.1, 1.0)]
    [0.5, 0.6, 0.1]
    """
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    placed = [heights[k] for k in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    ceiling = max(top, *heights)
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], ceiling - gap * (len(placed) - 1 - k))
    result = [0.0] * len(placed)
    for k, height in zip(order, placed, strict=True):
        result[k] = height
    return result


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    frame: Box,
    scale: float,
) -> list[int]:
    """Choose a place for each label, in turn: the first that is free and inside the frame, else the least crowded.

    Parameters
    ----------
    anchors : (x, y) of each label's point, in pixels
    sizes : (width, height) of each label, in pixels
    taken : boxes of what is already drawn
    frame : box of the axes
    scale : float
        Pixels a point.

    Returns
    -------
    list of int
        Indices into `PLACES`.
    """
    boxes = list(taken)
    chosen: list[int] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        candidates = [_box(anchor, size, place, scale) for place in PLACES]
        costs = [sum(_overlap(box, other) for other in boxes) + _outside(box, frame) for box in candidates]
        # A free place beats all others; a little overlap near the point beats none far away only by order.
        best = min(range(len(PLACES)), key=lambda k: (round(costs[k], 3), k))
        chosen.append(best)
        boxes.append(candidates[best])
    return chosen


def _box(anchor: tuple[float, float], size: tuple[float, float], place: tuple[int, int, int], scale: float) -> Box:
    (width, height), (dx, dy, side) = size, place
    left = anchor[0] + dx * scale + {1: 0.0, 0: -width / 2, -1: -width}[side]
    bottom = anchor[1] + dy * scale - height / 2
    return left, bottom, left + width, bottom + height


def _overlap(one: Box, other: Box) -> float:
    """Shared area as a part of the first box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0) / ((one[2] - one[0]) * (one[3] - one[1]))


def _outside(box: Box, frame: Box) -> float:
    return 100.0 * (box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3])
