"""GDA, the training-free "hard-to-beat baseline": zero-shot logits plus a Gaussian discriminant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from featcache.parameters import NotNegative, OneOf
from heads.estimators.base import LinearClassifier, Loss, criterion
from heads.estimators.discriminant import LinearDiscriminant
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows, held_out_masks
from heads.kernels.tally import stats_of_arrays
from heads.rows.samples import Features, Float, gathered, overflow
from heads.solvers.ridge.moments import Moments
from heads.solvers.temperature import fit_mixture, fit_temperature

Labels = NDArray[np.integer]

SHARES = np.logspace(-1.5, 1.5, 25)
"""Multiples of the maximum-likelihood alpha among which another metric chooses."""


@dataclass(eq=False, repr=False)
class GDA(FewShotClassifier, LinearClassifier):
    """Zero-shot logits plus alpha times a Gaussian discriminant with one shared covariance S.

    ``logits = zero-shot + alpha (x . w_c + b_c)`` with ``w_c = P m_c``, ``b_c = log(1/C) - m_c . w_c / 2``, m_c the
    mean of the rows of class c, and the precision matrix ``P = D ((N - 1) S + trace(S) I)^-1``. Up to a factor, this is
    `LinearDiscriminant` with shrinkage "auto" and uniform priors; nothing is trained.

    Parameters
    ----------
    alpha
        A number, as in the paper's formula; or "fitted": alpha and a temperature of the sum are fitted by likelihood on
        the selection split, or on folds of the training rows.
    metric
        Criterion for alpha: "nll", the likelihood; or "top1", as in the paper (ties by NLL), or "squared_error" of the
        probabilities, among 25 values around the maximum-likelihood one, each at its best temperature.

    Attributes
    ----------
    coef_ : (C, D) float64, of the sum before the temperature
    intercept_ : (C,) float64
    alpha_ : float
        Infinite if the zero-shot logits only hurt. With one row in every class none can be held out; the
        discriminant's logits are then scaled to a standard deviation of one over classes.
    temperature_ : float

    Notes
    -----
    In the discriminant, a class without training rows gets the mean of the others' weights and intercepts, so its
    zero-shot logit decides.

    References
    ----------
    Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> GDA().fit(X, [0, 0, 1, 1], texts=text).coef_.shape
    (2, 2)
    """

    name = "gda"

    alpha: NotNegative | Annotated[str, OneOf("fitted")] = "fitted"
    metric: Loss = "nll"

    def _fit(self, rows: FewShotRows) -> None:
        X = rows.features.astype(np.float64)
        weights, intercepts = gda(X, rows.labels, len(rows.text.bias))
        self.alpha_, how = self._share(rows, X, (weights, intercepts))
        if np.isfinite(self.alpha_):
            weights = rows.text.weights.astype(np.float64) + self.alpha_ * weights
            intercepts = rows.text.bias.astype(np.float64) + self.alpha_ * intercepts
        self.coef_, self.intercept_ = weights, intercepts
        self.provenance_ = self._record(rows, {"alpha": self.alpha_, "temperature": self.temperature_}, how)

    def _share(self, rows: FewShotRows, X: Float, whole: tuple[Float, Float]) -> tuple[float, str]:
        """Alpha and how it was found; sets the temperature."""
        self.temperature_ = 1.0
        if not isinstance(self.alpha, str):
            return float(self.alpha), "given"
        held = _held_out(rows, X, whole)
        if held is None:
            found = X @ whole[0].T + whole[1]
            spread = found.std(axis=1).mean()
            some = spread > 1e-12 * np.abs(found).max()  # of equal rows it is only rounding
            return float(1.0 / spread) if some else 0.0, "none"
        scores, features, labels = held
        how, base = "folds" if rows.validation is None else "split", rows.text.logits(features)
        if not np.isfinite(base).all():
            raise overflow("zero-shot logits overflow", features)
        temperature, weight = fit_mixture(scores, base, labels)
        self.temperature_, share = (temperature / weight, 1.0 / weight) if weight > 0 else (temperature, np.inf)
        if self.metric != "nll" and np.isfinite(share):
            self.temperature_, share = _best_share(share * SHARES, scores, base, labels, self.metric)
        return share, how


def _best_share(shares: Float, scores: Float, base: Features, labels: Labels, metric: str) -> tuple[float, float]:
    """The temperature, and the alpha with the best accuracy (ties by NLL) or squared error on held-out rows."""
    found = []
    for share in shares.tolist():
        logits = base + share * scores
        temperature = fit_temperature(logits, labels)
        stats = stats_of_arrays((logits / temperature).astype(np.float32), labels)
        found.append((*criterion(stats, metric), temperature, share))
    return min(found)[2:]


def gda(X: Float, y: Labels, n_classes: int) -> tuple[Float, Float]:
    """Weights (C, D) and intercepts (C,) of the paper's discriminant of rows (N, D)."""
    moments = Moments.from_blocks([(X, y)], dim=X.shape[1], n_targets=n_classes)
    present = moments.counts > 0
    (solved,) = LinearDiscriminant("auto", "uniform").candidates(moments.of_columns(present))
    n, dim = X.shape
    scale = dim * (n - 1) / (n * (n - 1 + dim))  # the paper's S is divided by N - 1
    weights, intercepts = np.empty((n_classes, dim)), np.empty(n_classes)
    weights[present] = scale * solved.weights
    intercepts[present] = scale * solved.intercepts + (1 - scale) * np.log(1 / present.sum())  # log(1/C) is not scaled
    weights[~present], intercepts[~present] = weights[present].mean(axis=0), intercepts[present].mean()
    return weights, intercepts


def _held_out(rows: FewShotRows, X: Float, whole: tuple[Float, Float]) -> tuple[Float, Features, Labels] | None:
    """Scores, features and labels of the selection split, or of folds of the training rows; None if neither exists."""
    if rows.validation is not None:
        features, labels = gathered(rows.validation)
        return features.astype(np.float64) @ whole[0].T + whole[1], features, labels
    scores, held = np.zeros((len(X), len(whole[1]))), np.zeros(len(X), bool)
    for keep, scored in held_out_masks(rows.labels, len(whole[1])):
        if len(np.unique(rows.labels[keep])) > 1:
            weights, intercepts = gda(X[keep], rows.labels[keep], len(whole[1]))
            scores[scored] = X[scored] @ weights.T + intercepts
            held |= scored
    return (scores[held], rows.features[held], rows.labels[held]) if held.any() else None
