"""Normalises rows to unit length without overflow or underflow."""

import numpy as np
from numpy.typing import NDArray

SAFE_LENGTHS = (1e-15, 1e18)
"""Between these the square of a length, and of values somewhat below it, is a normal float32 number."""


def unit_rows(X: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows (n, D) scaled to length 1, float32; rows of zeros are kept, rows with NaN or infinity become NaN.

    >>> unit_rows(np.array([[3e30, 4e30], [3e-200, 4e-200], [0.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rows = X.astype(np.float32, copy=False)
        lengths = np.linalg.norm(rows, axis=1)
        unit = rows / np.where(lengths == 0, 1.0, lengths)[:, None]
        extreme = np.flatnonzero(~((lengths > SAFE_LENGTHS[0]) & (lengths < SAFE_LENGTHS[1])))
        scaled = X[extreme].astype(np.float64)
        peaks = np.abs(scaled).max(axis=1, keepdims=True, initial=0.0)
        scaled /= np.where(peaks > 0, peaks, 1.0)
        longest = np.linalg.norm(scaled, axis=1, keepdims=True)
        unit[extreme] = scaled / np.where(longest > 0, longest, 1.0)
    return np.asarray(unit, np.float32)
