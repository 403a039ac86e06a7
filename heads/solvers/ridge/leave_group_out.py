"""Exact leave-one-group-out of ridge for every alpha: no row is predicted by views of its own image.

Where several rows are views of one image (crops, flips, prompts), leaving out single rows lets the others give the
answer away. Leaving out the rows g of a group changes their residuals to the solution of

    (I - K W) e = r,     K = 1/n + X̃_g (S + alpha I)⁻¹ X̃_gᵀ,     r = Y_g - Ŷ_g,     W = diag(weights)

(1/n, the inverse of the weights' sum, only with an unpenalised intercept), so no group is ever refitted. A group of one
row is `heads.solvers.ridge.leave_one_out`. Groups of one size are solved together; rows wait in memory until their
group is complete, so a store streams if views of one image are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heads.solvers.parallel import Blocks
from heads.solvers.primitives import as_tensor, wide_targets
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

Float = NDArray[np.float64]
Array = NDArray[np.generic]
Batch = tuple[Array, Array, Float]
"""Features (G, m, D), targets (G, m, ...) and weights (G, m) of G groups of m rows."""

_NUMBERS = 2**22  # largest array of a batch


def leave_group_out_errors(spectrum: Spectrum, blocks: Blocks, groups: NDArray[np.integer], alphas: ArrayLike) -> Float:
    """Mean over rows of the leave-one-group-out squared error (summed over targets) for every alpha, (A,).

    Parameters
    ----------
    spectrum
        Decomposition of exactly these rows.
    blocks
        ``(X (n, D), y)`` or ``(X, y, weights (n,))``: labels y (n,), or numbers (n, K).
    groups
        Group of every row (N,), from 0.
    alphas
        A positive values.
    """
    values = check_alphas(alphas)
    total, weight = np.zeros(len(values)), 0.0
    for x, y, share, _ in complete_groups(blocks, groups):
        z, rest = rotated(spectrum, x, y)
        for k, alpha in enumerate(values):
            residual = left_out(spectrum, z, rest, share, float(alpha))
            total[k] += float((share * (residual**2).sum(axis=-1)).sum())
        weight += float(share.sum())
    return total / weight if weight else total


def rotated(spectrum: Spectrum, x: Array, y: Array) -> tuple[Float, Float]:
    """Rows (G, m, R) in the eigenbasis, and targets less means and base scores (G, m, K)."""
    centred = x.astype(np.float64) - spectrum.mean_x
    n_targets = len(spectrum.mean_y)
    flat = y.reshape(-1) if y.ndim == 2 else y.reshape(-1, n_targets)
    rest = wide_targets(as_tensor(flat), n_targets).numpy().reshape(*x.shape[:2], n_targets) - spectrum.mean_y
    if spectrum.base is not None:
        rest -= centred @ spectrum.base.T
    return centred @ spectrum.vectors, rest


def left_out(spectrum: Spectrum, z: Float, rest: Float, share: Float, alpha: float) -> Float:
    """Residuals (G, m, K) of each group under the fit without it."""
    shrunk = z / (spectrum.eigenvalues + alpha)
    residual = rest - shrunk @ spectrum.projected
    system = -(shrunk @ np.swapaxes(z, 1, 2) + spectrum.intercept_leverage) * share[:, None, :]
    system += np.eye(z.shape[1])
    return np.asarray(np.linalg.solve(system, residual), np.float64)


def complete_groups(
    blocks: Blocks, groups: NDArray[np.integer]
) -> Iterator[tuple[Array, Array, Float, NDArray[np.int64]]]:
    """`Batch`es of whole groups of one size m, with the number of each group (G,)."""
    sizes = np.bincount(groups)
    seen, done = np.zeros_like(sizes), 0
    waiting: list[tuple[Array, ...]] = []
    for block in blocks:
        features, y = block[0], block[1]
        weights = np.ones(len(features)) if len(block) < 3 or block[2] is None else block[2]
        mine = groups[done : done + len(features)]
        done += len(features)
        seen += np.bincount(mine, minlength=len(sizes))
        waiting.append((features.copy(), y.copy(), np.asarray(weights, np.float64), mine))
        columns = [np.concatenate(column) for column in zip(*waiting, strict=True)]
        ready = seen[columns[3]] == sizes[columns[3]]
        yield from _batches([column[ready] for column in columns], sizes)
        waiting = [tuple(column[~ready] for column in columns)]


def _batches(
    columns: list[Array], sizes: NDArray[np.integer]
) -> Iterator[tuple[Array, Array, Float, NDArray[np.int64]]]:
    """Whole groups, sorted by size and cut so that a batch stays small."""
    x, y, weights, groups = columns
    order = np.lexsort((groups, sizes[groups]))
    size_of = sizes[groups[order]]
    for size in np.unique(size_of).tolist():
        rows = order[size_of == size].reshape(-1, size)
        step = max(1, _NUMBERS // (size * max(x.shape[1], size)))
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            yield x[piece], y[piece], weights[piece], groups[piece[:, 0]]
