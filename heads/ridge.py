"""Ridge classification on one-hot targets: the whole alpha path and exact leave-one-out from one pass of moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.base import LinearClassifier
from heads.held_out import selection_samples, thinned
from heads.samples import Samples, as_samples, require_finite
from heads.solvers.eigh_path import Spectrum, check_alphas, decompose
from heads.solvers.leave_one_out import leave_one_out_errors, leave_one_out_scores, squared_errors
from heads.solvers.moments import Moments
from heads.temperature import fit_temperature

__all__ = ["ALPHAS", "Ridge"]

ALPHAS = tuple(float(10.0 ** (k / 4)) for k in range(-12, 13))
"""Default path: 25 values from 1e-3 to 1e3, four a decade."""


class Ridge(LinearClassifier):
    """Least squares to one-hot targets (0/1) with an L2 penalty, alpha chosen on rows that did not fit.

    Minimises ``||Y - X Wᵀ - b||² + alpha ||W||²`` (sums, b unpenalised), scikit-learn's meaning of alpha.
    Weights equal ``sklearn.linear_model.Ridge(alpha)``, and alpha equals that of ``RidgeCV(alphas)``, on the same
    targets.

    Parameters
    ----------
    alphas
        Path of positive penalties.
    fit_intercept
        Whether to fit an unpenalised intercept.

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64
    alpha_ : float
        The chosen penalty: smallest of `cv_errors_`, the first one on ties.
    alphas_ : (A,) float64
    cv_errors_ : (A,) float64
        Mean over rows and classes of the squared error: exact leave-one-out, or on the selection split.
    temperature_ : float
        Scores divided by it are logits; fitted by NLL on the selection split, or on exact leave-one-out scores.
    classes_, classnames_, n_features_in_, provenance_, moments_, spectrum_

    Notes
    -----
    A class without a training row (a store's, or one of `classnames`) gets zero weights and intercept zero.
    N < D works (see `heads.solvers.eigh_path`).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = Ridge().fit(X, y)
    >>> head.score(X, y) > 0.9, head.coef_.shape
    (True, (3, 3))
    """

    name = "ridge"

    alpha_: float
    alphas_: NDArray[np.float64]
    cv_errors_: NDArray[np.float64]
    moments_: Moments
    spectrum_: Spectrum

    def __init__(self, alphas: Sequence[float] = ALPHAS, fit_intercept: bool = True) -> None:
        self.alphas = alphas
        self.fit_intercept = fit_intercept

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        selection: Any = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X
            Image store (streamed twice), or array-like (N, D).
        y
            Labels (N,), with arrays.
        selection
            Store, or ``(X, y)``, on which alpha and temperature are chosen; None uses exact leave-one-out.
        classnames
            With arrays: the C names; y then holds class indices, and classes may lack rows.

        Raises
        ------
        HeadError
            For fewer than two classes, NaN or infinite features (naming rows), labels out of range, alphas <= 0.
        MismatchError
            If the selection store has another encoder or class list.
        """
        alphas = check_alphas(self.alphas)
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        self.moments_ = Moments.from_blocks(samples.blocks(), dim=samples.dim, n_classes=len(samples.classnames))
        require_finite(samples, self.moments_.xtx.diagonal())
        self.spectrum_ = decompose(self.moments_, fit_intercept=self.fit_intercept)
        held_out = None if selection is None else selection_samples(selection, samples)
        self._choose(alphas, samples, held_out)
        self.coef_, self.intercept_ = self.spectrum_.solve(self.alpha_)
        self.temperature_ = self._temperature(samples, held_out)
        self.provenance_ = self._provenance(
            {
                "alpha": self.alpha_,
                "fit_intercept": bool(self.fit_intercept),
                "temperature": self.temperature_,
                "selection": "leave-one-out" if held_out is None else "split",
            },
            samples.store,
            None if held_out is None else held_out.store,
        )
        return self

    def path(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (A, C, D) and intercepts (A, C) of every alpha of `alphas_`: scores, before any temperature."""
        if not hasattr(self, "spectrum_"):
            raise HeadError("this Ridge is not fitted yet; call fit first")
        return self.spectrum_.path(self.alphas_)

    def _choose(self, alphas: NDArray[np.float64], samples: Samples, held_out: Samples | None) -> None:
        """Errors along the path, and the best alpha."""
        if held_out is None:
            errors = leave_one_out_errors(self.spectrum_, samples.blocks, alphas)
        else:
            errors = squared_errors(self.spectrum_, held_out.blocks, alphas)
        self.alphas_ = alphas
        self.cv_errors_ = errors / len(samples.classnames)
        if not np.isfinite(self.cv_errors_).any():
            raise HeadError(
                "no alpha has a finite error: the selection rows hold NaN, or every row is fitted exactly; "
                "drop bad rows, or use larger alphas"
            )
        self.alpha_ = float(alphas[np.nanargmin(self.cv_errors_)])

    def _temperature(self, samples: Samples, held_out: Samples | None) -> float:
        """Maximum-likelihood temperature on rows that did not fit the scores."""
        rows = samples if held_out is None else held_out
        drawn = thinned(rows, self.moments_.n if held_out is None else None)
        if held_out is None:
            blocks = list(leave_one_out_scores(self.spectrum_, drawn, self.alpha_))
        else:
            blocks = [(x.astype(np.float64) @ self.coef_.T + self.intercept_, y) for x, y in drawn]
        return fit_temperature(np.concatenate([s for s, _ in blocks]), np.concatenate([labels for _, labels in blocks]))
