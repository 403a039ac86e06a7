"""`row_stats` of a block of logits, and `Tally`: sums and counts, which add up over blocks of rows.

Every implementation in `heads.kernels.IMPLS` returns a `Tally`, and so does the evaluation of other heads.
`heads.evaluation.metrics` describes the metrics.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.kernels.calibration_bins import CALIBRATION_BINS, bins_of, calibration_errors
from heads.solvers.primitives import as_tensor

CAP = 1e-8
"""Added to a probability before its logarithm, as in Lipsum-FT's test NLL: at most 18.42 per row."""

_UNITS = 2.0**40
"""Units of a confidence; a float32 one of at least 2**-16 is a whole number of them."""


class RowStats(NamedTuple):
    """Statistics of n rows under one head (n,) or several (H, n).

    NLL in nats, rank of the label (0 is best), confidence (largest probability), Brier score, and the predicted class
    if it was asked for.
    """

    nll: torch.Tensor
    rank: torch.Tensor
    confidence: torch.Tensor
    brier: torch.Tensor
    predicted: torch.Tensor | None = None

    @classmethod
    def stack(cls, heads: Sequence[Self]) -> Self:
        """Statistics of H heads, (H, n)."""
        nll, rank, confidence, brier = (torch.stack(column) for column in zip(*(h[:4] for h in heads), strict=True))
        predicted = [h.predicted for h in heads if h.predicted is not None]
        return cls(nll, rank, confidence, brier, torch.stack(predicted) if predicted else None)


def row_stats(logits: torch.Tensor, labels: torch.Tensor, *, predicted: bool = False) -> RowStats:
    """Statistics of each row of logits (n, C), with one exponential per logit.

    Ties rank by class index, as in argmax. Half precision is widened first: at logit scale 100 its rounding changes
    the NLL noticeably. Minus infinity masks a class. A row with a NaN or +inf logit, or with all classes masked, has an
    NLL of NaN.

    >>> row_stats(torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([1])).rank.tolist()   # the tie goes to class 0
    [1]
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target, largest = logits.gather(1, labels[:, None]), logits.amax(1, keepdim=True)
    # Subnormal exponentials would add nothing to a sum of at least 1, and cost 15 times as much.
    lowest = math.log(torch.finfo(logits.dtype).tiny) + 1
    terms = (logits - largest).clamp_(min=lowest).exp_()
    total = terms.sum(1).double()
    nll = total.log() + (largest.double() - target)[:, 0]
    squares = torch.linalg.vecdot(terms, terms).double() / total.square()
    brier = (squares - 2 * (-nll).exp() + 1).clamp_(min=0)  # rounding may go below 0

    # Comparisons go into the floating-point buffer: torch writes and sums booleans several times more slowly.
    rank = torch.gt(logits, target, out=terms).sum(1).long()
    tied = (torch.eq(logits, target, out=terms).sum(1) > 1).nonzero()[:, 0]
    if len(tied):
        earlier = torch.arange(logits.shape[1], device=logits.device) < labels[tied, None]
        rank[tied] += ((logits[tied] == target[tied]) & earlier).sum(1)
    return RowStats(nll, rank, 1 / total, brier, logits.argmax(1) if predicted else None)


def stats_of_arrays(logits: NDArray[np.floating], labels: NDArray[np.integer], *, predicted: bool = False) -> RowStats:
    """`row_stats` of arrays; raises HeadError if a row has a NaN or +inf logit, or nothing but -inf."""
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    found = row_stats(torch.from_numpy(logits), targets, predicted=predicted)
    if bool(found.nll.isnan().any()):
        bad = found.nll.isnan().nonzero()[:10, 0].tolist()
        raise HeadError(f"logits of rows {bad} are NaN, +inf, or all masked; check the features and the class subset")
    return found


@dataclass(eq=False)
class Tally:
    """Sums and counts of H heads over n rows; ``a + b`` is the tally of both sets of rows.

    Attributes
    ----------
    nll, nll_capped, brier : (H,) float64 sums over rows; NLL in nats, Brier score ``sum_c (p_c - [c = y])**2``
    top5 : (H,) int64, rows whose label is among the top five; ties rank by class index
    class_rows : (C,) int64, rows of each class
    class_hits : (H, C) int64, rows of each class whose label ranks first
    bin_rows, bin_hits : (H, B) int64, rows and hits by confidence (largest probability)
    bin_confidence : (H, B) float64, sum of confidences
    confusion : (H, C, C) int64, [label, predicted class], or None
    row_nll, row_rank : (H, n), the latter int64, or None
    """

    nll: NDArray[np.float64]
    nll_capped: NDArray[np.float64]
    brier: NDArray[np.float64]
    top5: NDArray[np.int64]
    class_rows: NDArray[np.int64]
    class_hits: NDArray[np.int64]
    bin_rows: NDArray[np.int64]
    bin_hits: NDArray[np.int64]
    bin_confidence: NDArray[np.float64]
    confusion: NDArray[np.int64] | None = None
    row_nll: NDArray[np.floating] | None = None
    row_rank: NDArray[np.int64] | None = None

    @classmethod
    def zeros(cls, n_heads: int, n_classes: int, *, n_bins: int = CALIBRATION_BINS, confusion: bool = False) -> Self:
        """The tally of H heads over no rows."""
        none = torch.zeros(n_heads, 0)
        rows = RowStats(none, none.long(), none, none, none.long() if confusion else None)
        return cls.of_rows(rows, torch.zeros(0), n_classes, n_bins=n_bins)

    @classmethod
    def of_rows(
        cls,
        rows: RowStats,
        labels: torch.Tensor | NDArray[np.integer],
        n_classes: int,
        *,
        n_bins: int = CALIBRATION_BINS,
        per_sample: bool = False,
    ) -> Self:
        """The tally of statistics (H, n) of rows with labels (n,), on any device; with predictions also `confusion`.

        >>> logits, labels = torch.eye(2), torch.tensor([0, 1])
        >>> Tally.of_rows(RowStats.stack([row_stats(logits, labels)]), labels, 2).results()[0]["top1"]
        1.0
        """
        labels, nll = as_tensor(labels).long(), rows.nll.double()
        n_heads, hit = len(nll), (rows.rank == 0).long()
        cells = torch.arange(n_heads, device=labels.device)[:, None] * n_classes + labels
        # Confidences are summed as integers, so the result does not depend on the order in which a GPU adds.
        units = (rows.confidence.double() * _UNITS).round_().long()
        places = bins_of(rows.confidence, n_bins)
        places += torch.arange(n_heads, device=labels.device)[:, None] * n_bins
        bins, ones = (n_heads, n_bins), torch.ones_like(hit)
        sums = {
            "nll": nll.sum(1),
            "nll_capped": -torch.log(torch.exp(-nll) + CAP).sum(1),
            "brier": rows.brier.double().sum(1),
            "top5": (rows.rank < 5).sum(1),
            "class_rows": _sums(labels, ones[0], (n_classes,)),
            "class_hits": _sums(cells, hit, (n_heads, n_classes)),
            "bin_rows": _sums(places, ones, bins),
            "bin_hits": _sums(places, hit, bins),
            "bin_confidence": _sums(places, units, bins).double() / _UNITS,
        }
        if rows.predicted is not None:
            pairs = cells * n_classes + rows.predicted
            sums["confusion"] = _sums(pairs, ones, (n_heads, n_classes, n_classes))
        return cls(
            **_on_host(sums),
            row_nll=rows.nll.cpu().numpy() if per_sample else None,
            row_rank=rows.rank.long().cpu().numpy() if per_sample else None,
        )

    @classmethod
    def joined(cls, tallies: Iterable[Self]) -> Self:
        """The tally of many blocks, in order; per-row values are kept if every block has them, and copied once."""
        total: Self | None = None
        rows = []
        for tally in tallies:
            rows.append((tally.row_nll, tally.row_rank))
            total = replace(tally, row_nll=None, row_rank=None) if total is None else total._plus(tally)
        if total is None:
            raise HeadError("no rows were evaluated; give at least one block")
        nll, rank = ([values for values in column if values is not None] for column in zip(*rows, strict=True))
        if len(nll) == len(rank) == len(rows):
            total.row_nll, total.row_rank = np.concatenate(nll, axis=1), np.concatenate(rank, axis=1)
        return total

    def __add__(self, other: Self) -> Self:
        return self.joined([self, other])

    def _plus(self, other: Self) -> Self:
        """The sums and counts of both, without per-row values."""
        if self.class_hits.shape != other.class_hits.shape or self.bin_rows.shape != other.bin_rows.shape:
            raise HeadError(
                f"tallies of (H, C) {self.class_hits.shape} and {other.class_hits.shape} with "
                f"{self.bin_rows.shape[1]} and {other.bin_rows.shape[1]} bins do not add up; evaluate the same heads"
            )
        mine, theirs = self.sums, other.sums
        return type(self)(**{name: mine[name] + theirs[name] for name in mine.keys() & theirs.keys()})

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.class_rows.sum())

    @property
    def top1(self) -> NDArray[np.int64]:
        """(H,) rows whose label ranks first."""
        return np.asarray(self.class_hits.sum(axis=1))

    @property
    def sums(self) -> dict[str, NDArray[Any]]:
        """The arrays that add up over rows, by name."""
        per_row = ("row_nll", "row_rank")
        return {name: array for name, array in vars(self).items() if array is not None and name not in per_row}

    def results(self) -> list[dict[str, float]]:
        """The metrics of each head, in the order of `heads.evaluation.metrics.METRICS`; HeadError without rows."""
        if not self.n:
            raise HeadError("no rows were evaluated; the store has no valid row")
        present = self.class_rows > 0
        columns = {
            "top1": self.top1 / self.n,
            "top5": self.top5 / self.n,
            "mean_per_class_recall": (self.class_hits[:, present] / self.class_rows[present]).mean(axis=1),
            "nll": self.nll / self.n,
            "nll_capped": self.nll_capped / self.n,
            "brier": self.brier / self.n,
            "ece": calibration_errors(self.bin_hits, self.bin_confidence, self.n),
        }
        return [{key: float(values[h]) for key, values in columns.items()} for h in range(len(self.nll))]


def _sums(places: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Integer sums by cell of an array of this shape; on a GPU, without waiting for it."""
    found = values.new_zeros(math.prod(shape))
    return found.index_add_(0, places.flatten(), values.flatten()).view(shape)


def _on_host(sums: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as arrays; those on a GPU are copied together."""
    if not sums["nll"].is_cuda:
        return {name: values.numpy() for name, values in sums.items()}
    return _in_one_copy(sums)


def _in_one_copy(sums: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays of tensors on a device, copied as float64, which holds counts up to 2**53."""
    whole = torch.cat([values.double().flatten() for values in sums.values()]).cpu()
    parts = torch.split(whole, [values.numel() for values in sums.values()])
    return {
        name: part.to(values.dtype).view(values.shape).numpy()
        for part, (name, values) in zip(parts, sums.items(), strict=True)
    }
