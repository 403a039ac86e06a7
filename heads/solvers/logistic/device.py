"""The logistic objective on rows that stay where they are, in half precision if that is what they are.

A GPU makes logits faster than it reads them back, so none are kept (`heads.solvers.logistic.streamed`): memory is the
rows and one piece of logits. float16 features are never widened or centred. Centring goes into the other factor,

    V (x - m) + b = V x + (b - V m),        Rᵀ (X - 1 mᵀ) = Rᵀ X - (Rᵀ 1) mᵀ,

and a float32 factor becomes the sum of two float16 ones (22 bits), so that all products run on the tensor cores with
float32 sums: twice the operations of a half-precision product at the accuracy of a float32 one, which is a tenth as
fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.solvers.logistic.streamed import SAMPLE_ROWS, StreamedMultinomial
from heads.solvers.primitives import wide_product

_CELLS = 2**26
"""Logits of a piece of rows: 256 MiB."""
_UNIT = 2.0**14  # residuals lie in [-1, 1]; this moves them to the upper end of float16's range
_PADDING = 6  # columns of zeros, so that rows are multiples of 16 bytes


class DeviceRows:
    """Resident rows on any device, as `heads.solvers.logistic.path.fit_path` takes them; they are never written to.

    Parameters
    ----------
    X
        Features (N, D), float16 (the tensor cores' way), bfloat16 or float32.
    y
        Class indices (N,) int64, on the same device.
    n_classes
        C.
    fit_intercept
        Whether intercepts are fitted.

    Raises
    ------
    HeadError
        If shapes or devices do not fit, or features are not finite.
    """

    dtype = torch.float32

    def __init__(self, X: Tensor, y: Tensor, n_classes: int, *, fit_intercept: bool = True) -> None:
        if X.ndim != 2 or y.shape != X.shape[:1] or y.device != X.device or not len(X):
            raise HeadError(f"features are {tuple(X.shape)} on {X.device}, labels {tuple(y.shape)} on {y.device}")
        self.X, self.labels, self.n_classes, self.fit_intercept = X, y, n_classes, fit_intercept
        self.y: NDArray[np.int64] = y.cpu().numpy().astype(np.int64)
        mean = X.mean(dim=0, dtype=torch.float32).double()
        if not bool(torch.isfinite(mean).all()):
            bad = (~torch.isfinite(X).all(dim=1)).nonzero()[:10, 0].tolist()
            raise HeadError(f"features hold NaN or infinity in rows {bad}; drop these rows or encode the images again")
        self.mean: NDArray[np.float64] = mean.cpu().numpy() if fit_intercept else np.zeros(X.shape[1])

    def problem(
        self, places: NDArray[np.int64], n_classes: int, keep: NDArray[np.bool_] | None, offset: Tensor | None
    ) -> DeviceMultinomial:
        """The objective over `n_classes` classes; `places` (C,) says which of them a class is."""
        device = self.X.device
        labels = torch.from_numpy(places).to(device)[self.labels]
        weights = None if keep is None else torch.from_numpy(keep).to(device, self.dtype)
        mean = torch.from_numpy(self.mean).to(device, self.dtype)
        offset = None if offset is None else offset.to(device)
        return DeviceMultinomial(
            self.X, labels, n_classes, mean, fit_intercept=self.fit_intercept, row_weights=weights, offset=offset
        )

    def centred(self, where: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.floating], NDArray[np.integer]]]:
        """Centred float64 rows where a mask (N,) says so, with labels, block by block."""
        rows = np.flatnonzero(where)
        for first in range(0, len(rows), 8192):
            chosen = rows[first : first + 8192]
            X = self.X[torch.from_numpy(chosen).to(self.X.device)]
            yield X.double().cpu().numpy() - self.mean, self.y[chosen]


class DeviceMultinomial(StreamedMultinomial):
    """The objective on resident rows, without kept logits.

    Parameters are those of `Multinomial`, and `mean` (D,), which is subtracted from every row. Row weights are 0 or 1.

    Examples
    --------
    >>> X = torch.tensor([[1.0], [-1.0]], dtype=torch.float16)
    >>> f = DeviceMultinomial(X, torch.tensor([0, 1]), 2, torch.zeros(1), fit_intercept=False)
    >>> value, gradient = f.start(torch.zeros(2, 2), lam=1.0)
    >>> round(value, 6), gradient[:, 0].tolist()       # 2 ln 2
    (1.386294, [-1.0, 1.0])
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        n_classes: int,
        mean: Tensor,
        *,
        fit_intercept: bool = True,
        row_weights: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        rows = torch.arange(len(X)) if row_weights is None else row_weights.nonzero()[:, 0].cpu()
        some = _some(rows).to(X.device)
        super().__init__(
            lambda: iter(()),
            rows=len(rows),
            dim=X.shape[1],
            n_classes=n_classes,
            sample=(X[some].float() - mean, y[some]),
            fit_intercept=fit_intercept,
            offset=offset,
        )
        self._features, self._mean = X, mean
        self.y, self.row_weights = y, row_weights

    def value(self, step: float) -> float:
        """Value after another step along the direction; a pass with one product."""
        theta = self._theta + step * self._direction
        factor = self._factor(theta)
        self.products += 1
        losses = (self._loss(rows, self._logits(rows, factor))[0] for rows in self._pieces())
        return sum(losses) + self._penalty(theta)

    def _at(self, theta: Tensor) -> tuple[float, Tensor]:
        """Value and gradient at a point: one pass, two products."""
        factor = self._factor(theta)
        loss, gradient, sums = 0.0, torch.zeros_like(theta[:, :-1]), torch.zeros_like(theta[:, -1])
        for rows in self._pieces():
            part, residual = self._loss(rows, self._logits(rows, factor))
            if self.row_weights is not None:
                residual *= self.row_weights[rows, None]
            loss, sums = loss + part, sums + residual.sum(dim=0)
            gradient += _gradient(residual, self._features[rows])
        self.products += 2
        return self._finish([(loss, gradient - torch.outer(sums, self._mean), sums)], theta)

    def _pieces(self) -> Iterator[slice]:
        step = max(_CELLS // self.n_classes, 256)
        return (slice(first, min(first + step, len(self._features))) for first in range(0, len(self._features), step))

    def _factor(self, theta: Tensor) -> Tensor:
        """What rows ``[x, x, 1, 1]`` of half precision, or ``[x, 1]``, are multiplied with to give logits."""
        weights, intercepts = self._whole(theta)
        shift = (intercepts - weights @ self._mean)[:, None]
        if self._features.dtype != torch.float16:
            return torch.cat([weights, shift], dim=1)
        parts = [*_halves(weights), *_halves(shift), shift.new_zeros(len(shift), _PADDING, dtype=torch.float16)]
        return torch.cat(parts, dim=1)

    def _logits(self, rows: slice, factor: Tensor) -> Tensor:
        x = self._features[rows]
        out = torch.empty(len(x), len(factor), dtype=torch.float32, device=x.device)
        if factor.dtype != torch.float16:
            return torch.addmm(factor[:, -1], x.float(), factor[:, :-1].T, out=out)
        ones = x.new_zeros(len(x), 2 + _PADDING)
        ones[:, :2] = 1.0
        return wide_product(torch.cat([x, x, ones], dim=1), factor, out)


def _gradient(residual: Tensor, x: Tensor) -> Tensor:
    """``residual.T @ x`` (C, D) in float32; the residuals (n, C), overwritten, go in as two halves."""
    n_classes = residual.shape[1]
    if x.dtype != torch.float16:
        return residual.T @ x.float()
    halves = torch.empty(len(x), 2 * n_classes, dtype=torch.float16, device=x.device)
    halves[:, :n_classes].copy_(residual.mul_(_UNIT))
    halves[:, n_classes:].copy_(residual.sub_(halves[:, :n_classes]))
    out = torch.empty(2 * n_classes, x.shape[1], dtype=torch.float32, device=x.device)
    wide_product(halves.T, x.T, out)
    return (out[:n_classes] + out[n_classes:]) / _UNIT


def _halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Two float16 tensors whose sum has 22 bits of a float32 one (of numbers between 2^-14 and 65504)."""
    first = wide.half()
    return first, (wide - first).half()


def _some(rows: Tensor) -> Tensor:
    """Up to `SAMPLE_ROWS` of some row numbers, ascending."""
    if len(rows) <= SAMPLE_ROWS:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE_ROWS]
    return rows[chosen.sort().values]
