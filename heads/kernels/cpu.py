"""Products by BLAS into tiles that stay in the cache, and one fused pass over each (`heads.kernels.cpu_rows`).

Pieces of rows run side by side, one BLAS thread and one tile each. Half-precision inputs are widened piece by piece:
their products are then exact in float32, where torch's own half-precision product on a CPU rounds its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError, MissingExtraError
from heads.kernels.problem import Problem
from heads.kernels.tally import Tally
from heads.solvers.parallel import one_blas_thread

__all__ = ["require", "run"]

_TILE = 2**20
"""Logits of a tile: 4 MiB. Larger ones gain nothing; smaller ones pay for BLAS packing the weights each time."""

_FEWEST, _MOST = 256, 2048
"""Rows of a tile. At C = 21,843 a tile of 48 rows would cost twice the bare product, one of 256 costs 1.2 times that;
only from 32,768 classes on are there fewer, so that no tile exceeds 32 MiB (and 16 rows)."""

Matrix = NDArray[np.float32]


def require(problem: Problem) -> None:
    """It takes float32 and half precision on the CPU."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the CPU kernel needs numba; install it: pip install numba") from error
    if problem.features.device.type != "cpu" or problem.dtype != torch.float32:
        raise HeadError(
            f"features are {problem.dtype} on {problem.features.device}; impl='cpu' takes float32, float16 and "
            "bfloat16 on the CPU; use impl='chunked' or 'auto'"
        )
    if problem.mean_probabilities:
        raise HeadError("impl='cpu' has no mean of probabilities; use impl='chunked' or 'auto'")


def run(problem: Problem) -> Tally:
    """The tally, piece by piece."""
    return _Run(problem).tally()


class _Run:
    """One problem, its tiles, and its counts so far."""

    def __init__(self, problem: Problem) -> None:
        from heads.kernels.cpu_rows import LANES

        self.problem = problem
        self.labels = np.ascontiguousarray(problem.labels.numpy())
        n, n_classes = len(self.labels), problem.n_classes
        rows = min(max(_TILE // n_classes, _FEWEST), max(8 * _TILE // n_classes, 16), _MOST)
        turns = -(
            -n // (8 * rows)
        )  # pieces of one size, a multiple of 8 of them, keep 2, 4 or 8 threads busy to the end
        self.rows = max(min(128, rows), -(-n // (8 * turns)))
        padded = -(-n_classes // int(LANES)) * int(LANES)
        self.width = padded
        self.shape = (self.rows, padded + 16)  # rows a power of two of bytes apart fight for cache sets
        self.tiles: list[Matrix] = []
        zero = np.zeros(n_classes, np.float32)
        self.biases = [zero if b is None else np.ascontiguousarray(b.numpy()) for b in problem.biases]
        self.factors, self.mixed = self._path()

    def _path(self) -> tuple[Matrix, Matrix]:
        """Factors (K, 2) of the two products and biases (K, C) of each interpolation."""
        alphas = np.array(self.problem.alphas or (), np.float64)
        ends = np.stack([1 - alphas, alphas], axis=1)
        if not len(alphas):
            return ends.astype(np.float32), np.empty((0, 0), np.float32)
        biases = ends @ np.stack(self.biases).astype(np.float64)
        return (ends * self.problem.scales).astype(np.float32), biases.astype(np.float32)

    def tally(self) -> Tally:
        """Sums over pieces in their order, whatever thread took them."""
        problem = self.problem
        total, parts = self._counts(0), []
        confusion = np.zeros((problem.n_heads, problem.n_classes**2), np.int64) if problem.confusion else None
        for first, part in self._parts():
            for mine, other in zip(total[:6], part[:6], strict=True):
                mine += other
            if problem.per_sample:
                parts.append(part)
            if confusion is not None:
                pairs = self.labels[first : first + self.rows] * problem.n_classes + part.predicted
                for counts, pair in zip(confusion, pairs, strict=True):
                    counts += np.bincount(pair, minlength=counts.size)
        return Tally(
            n=len(self.labels),
            nll=total.sums[:, 0],
            nll_capped=total.sums[:, 1],
            brier=total.sums[:, 2],
            top1=total.class_hits.sum(axis=1),
            top5=total.top5,
            class_rows=np.bincount(self.labels, minlength=problem.n_classes),
            class_hits=total.class_hits,
            bin_rows=total.bin_rows,
            bin_hits=total.bin_hits,
            bin_confidence=total.bin_confidence,
            confusion=None if confusion is None else confusion.reshape(-1, problem.n_classes, problem.n_classes),
            row_nll=np.concatenate([part.row_nll for part in parts], axis=1) if parts else None,
            row_rank=np.concatenate([part.row_rank for part in parts], axis=1) if parts else None,
        )

    def _parts(self) -> Iterator[tuple[int, Any]]:
        """First row and counts of each piece, in order; as many pieces at once as BLAS was allowed threads."""
        starts = range(0, len(self.labels), self.rows)
        with one_blas_thread() as threads, ThreadPoolExecutor(threads) as executor:
            yield from zip(starts, executor.map(self._piece, starts), strict=True)

    def _piece(self, first: int) -> Any:
        """Counts of one piece; its tiles go back to the pool."""
        from heads.kernels.cpu_rows import tally_path, tally_tile

        labels = self.labels[first : first + self.rows]
        out = self._counts(len(labels))
        x = self.problem.features[first : first + self.rows].float().numpy()
        if self.problem.alphas is not None:
            one, two = (self._product(x, weights) for weights in self.problem.weights)
            tally_path(one, two, self.width, self.factors, self.mixed, labels, out)
            self.tiles += [one, two]
            return out
        for head, weights in enumerate(self.problem.weights):
            tile = self._product(x, weights)
            tally_tile(tile, self.width, np.float32(self.problem.scales[head]), self.biases[head], labels, head, out)
            self.tiles.append(tile)
        return out

    def _product(self, x: Matrix, weights: torch.Tensor) -> Matrix:
        """``x @ weights.T`` in a tile whose last columns are -inf."""
        try:
            tile = self.tiles.pop()
        except IndexError:
            tile = np.full(self.shape, -np.inf, np.float32)
        np.matmul(x, weights.float().numpy().T, out=tile[: len(x), : len(weights)])
        return tile

    def _counts(self, rows: int) -> Any:
        """Zeros, and room for what is asked of each row."""
        from heads.kernels.cpu_rows import Counts

        problem, heads = self.problem, self.problem.n_heads
        bins = (heads, problem.n_bins)
        kept = (heads, rows if problem.per_sample else 0)
        return Counts(
            np.zeros((heads, 3)),
            np.zeros(heads, np.int64),
            np.zeros((heads, problem.n_classes), np.int64),
            np.zeros(bins, np.int64),
            np.zeros(bins, np.int64),
            np.zeros(bins),
            np.empty(kept),
            np.empty(kept, np.int64),
            np.empty((heads, rows if problem.confusion else 0), np.int64),
        )
