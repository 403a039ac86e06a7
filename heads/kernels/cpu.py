"""Products by BLAS into tiles that stay in the cache, and one fused pass over each tile, compiled by numba.

Pieces of rows run in parallel, with one BLAS thread and one tile each. Half-precision inputs are widened piece by
piece: their products are then exact in float32, where torch's own half-precision product on a CPU rounds its result.

The fused pass reads each row of logits twice while it is in the first-level cache: for its maximum and the rank of its
label, then for the sums of ``exp(z - maximum)`` and of its square. The exponential is a polynomial (Cody and Waite
1980: ``exp(x) = 2**n * exp(r)``, n the nearest integer to x / ln 2, and a minimax exp(r)), which LLVM vectorises: 2.5
times as fast as libm's. Sums may be reordered, but NaN and infinity keep their meaning: a row with a NaN or +inf logit,
or with nothing but -inf, has NaN sums. (Comparisons for the maximum may ignore NaN, since the sums do not.)
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.kernels.problem import Problem
from heads.kernels.tally import CAP, Tally
from heads.solvers.parallel import one_blas_thread

Matrix = NDArray[np.float32]
Labels = NDArray[np.int64]
Numba: TypeAlias = Any
"""Objects of numba and llvmlite, which have no types, and numbers in compiled code, of the width given there."""

LANES = np.uint64(64)
_CHUNK = np.uint64(1024)
"""Logits whose exponentials are summed in float32; the sums of chunks are added in float64."""


class Counts(NamedTuple):
    """Sums of one piece of rows, (H, ...) as in `heads.kernels.tally.Tally`, in a form that numba takes.

    `sums` (H, 3) holds NLL, capped NLL and Brier score. The last three are per row, and empty unless asked for.
    """

    sums: NDArray[np.float64]
    top5: NDArray[np.int64]
    class_hits: NDArray[np.int64]
    bin_rows: NDArray[np.int64]
    bin_hits: NDArray[np.int64]
    bin_confidence: NDArray[np.float64]
    row_nll: NDArray[np.float64]
    row_rank: NDArray[np.int64]
    predicted: NDArray[np.int64]


def _bitcast(name: str, source: Numba, result: Numba, to: Numba) -> Numba:
    """A numba function that reinterprets the bits of a number: one LLVM instruction."""

    def typed(context: Numba, x: Numba) -> Numba:
        return result(source), lambda _context, builder, _signature, args: builder.bitcast(args[0], to)

    typed.__name__ = name
    return intrinsic(typed)


def _maxnum(context: Numba, x: Numba, y: Numba) -> Numba:
    def code(_context: Numba, builder: Numba, _signature: Numba, args: Numba) -> Numba:
        kind = ir.FloatType()
        maxnum = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(maxnum, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), code


_bits = _bitcast("bits", types.float32, types.int32, ir.IntType(32))
_from_bits = _bitcast("from_bits", types.int32, types.float32, ir.FloatType())
_larger: Numba = intrinsic(_maxnum)  # LLVM does not vectorise the maximum of a row as a comparison and a choice


@njit(fastmath={"contract"}, cache=True)
def _exp(x: Numba) -> Numba:
    """exp(x) in float32 for x <= 0, within 2 units in the last place; NaN stays NaN, x below -87 counts as -87."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)  # 1.5 * 2**23: the nearest integer, in the low bits
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    power = _from_bits(np.int32((_bits(shifted) << np.int32(23)) + np.int32(0x3F800000)))
    return p * power


@njit(fastmath={"nnan", "nsz", "reassoc", "contract"}, cache=True)
def _largest_and_rank(z: Matrix, y: Numba) -> tuple[Numba, Numba]:
    """Maximum of a row (C,), and the number of logits that rank before class y; ties rank by class index."""
    target = z[y]
    largest = np.float32(-np.inf)
    ahead = np.int32(0)
    y, end = np.uint64(y), np.uint64(z.size)
    first = y - y % LANES
    for c in range(np.uint64(0), first):
        v = z[c]
        largest = _larger(largest, v)
        ahead += np.int32(v >= target)
    for c in range(first, first + LANES):
        v = z[c]
        largest = _larger(largest, v)
        ahead += np.int32(v > target) + np.int32((v == target) & (c < y))
    for c in range(first + LANES, end):
        v = z[c]
        largest = _larger(largest, v)
        ahead += np.int32(v > target)
    return largest, ahead


@njit(fastmath={"nsz", "reassoc", "contract"}, cache=True)
def _sums(z: Matrix, largest: Numba) -> tuple[Numba, Numba]:
    """Sum of ``exp(z - largest)``, and of its square."""
    total, squares = 0.0, 0.0
    end = np.uint64(z.size)
    for start in range(np.uint64(0), end, _CHUNK):
        part, square = np.float32(0.0), np.float32(0.0)
        for c in range(start, min(start + _CHUNK, end)):
            e = _exp(z[c] - largest)
            part += e
            square += e * e
        total += np.float64(part)
        squares += np.float64(square)
    return total, squares


@njit(cache=True)
def _add_row(z: Matrix, y: Numba, n_classes: int, head: int, row: int, out: Counts) -> None:
    """Add a row of logits, padded with -inf, to the sums and counts of a head."""
    largest, ahead = _largest_and_rank(z, y)
    total, squares = _sums(z, largest)
    nll = math.log(total) + (np.float64(largest) - np.float64(z[y]))
    own, confidence = math.exp(-nll), 1.0 / total
    out.sums[head, 0] += nll
    out.sums[head, 1] -= math.log(own + CAP)
    out.sums[head, 2] += squares * confidence * confidence - 2.0 * own + 1.0
    hit = ahead == 0
    n_bins = out.bin_rows.shape[1]
    place = min(max(math.ceil(confidence * n_bins) - 1, 0), n_bins - 1) if confidence > 0.0 else 0
    out.bin_rows[head, place] += 1
    out.bin_confidence[head, place] += confidence
    if hit:
        out.class_hits[head, y] += 1
        out.bin_hits[head, place] += 1
    if ahead < 5:
        out.top5[head] += 1
    if out.row_nll.size:
        out.row_nll[head, row] = nll
        out.row_rank[head, row] = ahead
    if out.predicted.size:
        best = 0
        while best < n_classes - 1 and z[best] != largest:
            best += 1
        out.predicted[head, row] = best


@njit(cache=True, nogil=True)
def tally_tile(tile: Matrix, width: int, scale: Numba, bias: Matrix, labels: Labels, head: int, out: Counts) -> None:
    """Add the rows of a tile of products (n, >= width) of one head; logits are ``scale * tile + bias``, in place.

    Columns from C = bias.size to `width` are -inf. `width` is a multiple of `LANES`, so that no loop has a remainder.
    """
    for row in range(labels.size):
        z = tile[row][:width]
        for c in range(bias.size):
            z[c] = z[c] * scale + bias[c]
        _add_row(z, labels[row], bias.size, head, row, out)


@njit(cache=True, nogil=True)
def tally_path(
    first: Matrix, second: Matrix, width: int, factors: Matrix, biases: Matrix, labels: Labels, out: Counts
) -> None:
    """Add the rows of K interpolations of two tiles, row by row.

    Logits of head k are ``factors[k, 0] * first + factors[k, 1] * second + biases[k]``; each has its own maximum.
    """
    z = np.full(width, -np.inf, np.float32)
    for row in range(labels.size):
        one, two = first[row], second[row]
        for head in range(factors.shape[0]):
            a, b, bias = factors[head, 0], factors[head, 1], biases[head]
            for c in range(bias.size):
                z[c] = a * one[c] + b * two[c] + bias[c]
            _add_row(z, labels[row], bias.size, head, row, out)


_TILE = 2**20
"""Logits of a tile: 4 MiB. Larger ones gain nothing; with smaller ones BLAS packs the weights too often."""

_FEWEST, _MOST = 256, 2048
"""Rows of a tile. At C = 21,843, a tile of 48 rows would cost twice as much as the product alone, one of 256 costs
1.2 times as much. From 32,768 classes on there are fewer, so that no tile exceeds 32 MiB (but at least 16 rows)."""


def require(problem: Problem) -> None:
    """Raise HeadError unless features are float32 or half precision on the CPU, and heads are linear."""
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
    """One problem, and a pool of tiles for its products."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.labels = np.ascontiguousarray(problem.labels.numpy())
        n, n_classes = len(self.labels), problem.n_classes
        rows = min(max(_TILE // n_classes, _FEWEST), max(8 * _TILE // n_classes, 16), _MOST)
        # Pieces of equal size, in a multiple of 8, keep 2, 4 or 8 threads busy to the end.
        turns = -(-n // (8 * rows))
        self.rows = max(min(128, rows), -(-n // (8 * turns)))
        self.width = -(-n_classes // int(LANES)) * int(LANES)
        self.shape = (self.rows, self.width + 16)  # rows a power of two of bytes apart compete for cache sets
        self.tiles: list[Matrix] = []
        zero = np.zeros(n_classes, np.float32)
        self.biases = [zero if b is None else np.ascontiguousarray(b.numpy()) for b in problem.biases]
        if problem.alphas is not None:  # factors (K, 2) of the two products, and biases (K, C), of the interpolations
            ends = np.stack([1 - np.array(problem.alphas), problem.alphas], axis=1)
            self.factors = (ends * problem.scales).astype(np.float32)
            self.mixed = (ends @ np.stack(self.biases).astype(np.float64)).astype(np.float32)

    def tally(self) -> Tally:
        """Sums over pieces in order, so that the number of threads changes nothing."""
        problem, n_classes = self.problem, self.problem.n_classes
        total, parts, starts = self._counts(0), [], range(0, len(self.labels), self.rows)
        confusion = np.zeros((problem.n_heads, n_classes**2), np.int64) if problem.confusion else None
        with one_blas_thread() as threads, ThreadPoolExecutor(threads) as executor:
            for first, part in zip(starts, executor.map(self._piece, starts), strict=True):
                for mine, other in zip(total[:6], part[:6], strict=True):
                    np.add(mine, other, out=mine)
                if problem.per_sample:
                    parts.append(part)
                if confusion is not None:
                    pairs = self.labels[first : first + self.rows] * n_classes + part.predicted
                    for counts, pair in zip(confusion, pairs, strict=True):
                        counts += np.bincount(pair, minlength=counts.size)
        return Tally(
            nll=total.sums[:, 0],
            nll_capped=total.sums[:, 1],
            brier=total.sums[:, 2],
            top5=total.top5,
            class_rows=np.bincount(self.labels, minlength=n_classes),
            class_hits=total.class_hits,
            bin_rows=total.bin_rows,
            bin_hits=total.bin_hits,
            bin_confidence=total.bin_confidence,
            confusion=None if confusion is None else confusion.reshape(-1, n_classes, n_classes),
            row_nll=np.concatenate([part.row_nll for part in parts], axis=1) if parts else None,
            row_rank=np.concatenate([part.row_rank for part in parts], axis=1) if parts else None,
        )

    def _piece(self, first: int) -> Counts:
        """Counts of one piece; its tiles return to the pool."""
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

    def _counts(self, rows: int) -> Counts:
        """Zero sums, and space for the per-row statistics that are asked for."""
        problem, heads = self.problem, self.problem.n_heads
        bins, kept = (heads, problem.n_bins), (heads, rows if problem.per_sample else 0)
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
