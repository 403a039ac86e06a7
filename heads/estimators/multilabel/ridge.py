"""Multi-label ridge: alpha by leave-one-out or on a validation split, and logits by Platt scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
from scipy.optimize import minimize
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import OneOf, Positive
from heads.estimators.multilabel.base import (
    HELD_SCORES,
    THRESHOLDS,
    HeldOut,
    MultiLabelRowsClassifier,
    Part,
    best_setting,
    rows_where,
)
from heads.estimators.ridge.choice import ALPHAS
from heads.estimators.standardise import Standardising
from heads.fitted.missing_classes import ABSENT
from heads.fitted.multilabel import MultiLabelHead
from heads.rows.multilabel import MultiLabelSamples, Targets
from heads.rows.samples import Features, Float, Float32, Ints, Mask, raise_not_finite
from heads.solvers.ridge.leave_one_out import leave_one_out_scores
from heads.solvers.ridge.problem import RidgeProblem
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

SQUARED = "squared_error"
METRICS = ("map", "map_micro", SQUARED)

MAX_PATTERNS = 512
"""Largest number of distinct sets of rows with known targets; each is a ridge problem with its own decomposition."""

PIECE_ROWS = 2**14
"""Rows whose leave-one-out scores are computed at a time."""

MIN_SLOPE = 1e-3
"""Smallest slope of a calibration, in logits per standard deviation; positive, to keep the order of scores."""


class _Part(NamedTuple):
    """Classes (k,) whose targets are known on the same rows, a mask (N,), and the decomposition of these rows."""

    classes: Ints
    known: Mask
    spectrum: Spectrum


@dataclass(eq=False, repr=False)
class MultiLabelRidge(Standardising, MultiLabelRowsClassifier):
    """Least squares on the targets of every class, with an L2 penalty; scores are then calibrated to logits.

    Minimises ``sum_i (w x_i + b - y_i)² + alpha ||w||²`` for each class over the rows whose target is known, y_i 1 or
    0, b unpenalised, as ``sklearn.linear_model.Ridge(alpha)``. Classes known on the same rows are solved together: one
    decomposition gives every alpha and every leave-one-out score.

    The logits are ``slope * score + offset``, fitted for each class on held-out scores by Platt's method: binary cross
    entropy with targets (P + 1) / (P + 2) for the P positives and 1 / (M + 2) for the M negatives (Platt 1999,
    Probabilistic Outputs for Support Vector Machines). Slopes are positive.

    Parameters
    ----------
    alphas : path of positive penalties, shared by all classes
    fit_intercept : whether to fit unpenalised intercepts
    metric
        Criterion that chooses alpha: "map" (mean over classes of the average precision), "map_micro" (average precision
        over all entries), or "squared_error" (over the known entries); ties go to the smaller alpha.
    threshold
        Logit from which a class is predicted: "per_class" maximises the F1 of each class on held-out rows; "global"
        is one threshold that maximises the micro F1; "none" is probability 0.5.
    in_memory
        Whether to load all rows (True) or to read them again for every set of known rows; None loads up to half of the
        memory.
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_, intercept_ : (L, D), (L,) float64, of the logits
    thresholds_ : (L,) float64
    alpha_ : float
    alphas_ : (A,) float64, ascending
    cv_scores_ : (A,) `metric` on held-out rows, "squared_error" negative
    slopes_, offsets_ : (L,) float64, of the calibration
    absent_ : names of the classes without a positive (their intercept is -10,000) or without a negative (10,000)

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(300, 4))
    >>> Y = X[:, :2] + 0.3 * rng.normal(size=(300, 2)) > 0       # two questions, answered by two columns
    >>> head = MultiLabelRidge([0.1, 10.0]).fit(X, Y, classnames=("right", "above"))
    >>> head.predict([[1.0, -1.0, 0.0, 0.0]]).tolist(), bool(head.score(X, Y) > 0.8)
    ([[1, 0]], True)
    """

    name = "multilabel_ridge"

    alphas: Positive | Sequence[Positive] = ALPHAS
    fit_intercept: bool = True
    metric: Annotated[str, OneOf(*METRICS)] = "map"
    threshold: Annotated[str, OneOf(*THRESHOLDS)] = "per_class"
    in_memory: bool | None = None
    _: KW_ONLY
    standardise: bool = False

    def _fit(self, samples: MultiLabelSamples, validation: MultiLabelSamples | None) -> None:
        samples, validation = self._scaled(samples, validation)
        self.alphas_ = alphas = np.unique(check_alphas(self.alphas))
        rows = self._placed(samples)
        known = [found.copy() for _, found in rows.blocks()]
        if not known:
            raise HeadError("there is no valid row to fit on; encode images that can be read")
        targets = np.concatenate(known)
        parts = list(self._parts(rows, targets))
        self._weights, self._intercepts = self._solved(parts, targets)
        if validation is None:
            held = self._left_out(parts, rows, len(targets))
        else:
            held = HeldOut.on_split(list(zip(*self.path(), strict=True)), validation)
        self._weights, self._intercepts = self._folded(self._weights, self._intercepts)
        self.cv_scores_ = self._compared(held)
        best = best_setting("alpha", alphas, self.cv_scores_) if len(alphas) > 1 else 0
        self.alpha_ = float(alphas[best])
        logits = self._calibrate(held.logits[best], held.targets)
        self.coef_ = self._weights[best] * self.slopes_[:, None]
        self.intercept_ = self._intercepts[best] * self.slopes_ + self.offsets_
        self.thresholds_ = HeldOut(logits[None], held.targets).thresholds(0, self.threshold)
        how = "leave-one-out" if validation is None else "split"
        params = {"alpha": self.alpha_, "fit_intercept": bool(self.fit_intercept), "metric": self.metric}
        params |= {"selection": how, "threshold": self.threshold, "calibration": "platt"}
        self._path_record = self._provenance(params | {"threshold": "none", "calibration": "none"}, samples)
        self.provenance_ = self._provenance(params, samples, validation)

    def path(self) -> tuple[Float, Float]:
        """Weights (A, L, D) and intercepts (A, L) of every alpha of `alphas_`, before calibration."""
        check_is_fitted(self, "alphas_")
        return self._weights, self._intercepts

    def path_heads(self) -> list[MultiLabelHead]:
        """A head for every alpha, without calibration: the logit is the score minus 1/2, and thresholds are 0."""
        check_is_fitted(self, "coef_")
        found = []
        for weights, intercepts, alpha in zip(*self.path(), self.alphas_.tolist(), strict=True):
            record = self._path_record.with_params(alpha=alpha)
            found.append(self._as_head(weights, intercepts - 0.5, None, f"{self.name} alpha={alpha:.6g}", record))
        return found

    def _parts(self, samples: MultiLabelSamples, targets: Targets) -> Iterator[_Part]:
        """One ridge problem per set of rows with known targets, without the classes that cannot be fitted."""
        absent = ~((targets == 1).any(axis=0) & (targets == 0).any(axis=0))
        self._name_absent(absent)
        together: dict[bytes, list[int]] = {}
        for column in np.flatnonzero(~absent).tolist():
            together.setdefault(np.packbits(targets[:, column] >= 0).tobytes(), []).append(column)
        if len(together) > MAX_PATTERNS:
            raise HeadError(
                f"the classes are known on {len(together)} different sets of rows, each of which is a separate ridge "
                f"problem; expected at most {MAX_PATTERNS}: use multilabel_logistic, which has no such limit"
            )
        for columns in together.values():
            classes, known = np.array(columns), targets[:, columns[0]] >= 0
            source = partial(_blocks, samples.blocks if known.all() else rows_where(samples.blocks, known), classes)
            n, fit_intercept = int(known.sum()), bool(self.fit_intercept)
            problem = RidgeProblem(source, samples.dim, len(classes), n, fit_intercept)
            if not np.isfinite(problem.diagonal()).all():
                raise_not_finite(features for features, _ in samples.blocks())
            spectrum = problem.spectrum()
            spectrum.check_resolves(self.alphas_)
            yield _Part(classes, known, spectrum)

    def _solved(self, parts: Sequence[_Part], targets: Targets) -> tuple[Float, Float]:
        """Weights (A, L, D) and intercepts (A, L) of every alpha."""
        shape = len(self.alphas_), targets.shape[1]
        weights, intercepts = np.zeros((*shape, self.n_features_in_)), np.zeros(shape)
        intercepts[:] = np.where((targets == 1).any(axis=0), -ABSENT, ABSENT)
        for part in parts:
            weights[:, part.classes], intercepts[:, part.classes] = part.spectrum.path(self.alphas_)
        return weights, intercepts

    def _left_out(self, parts: Sequence[_Part], samples: MultiLabelSamples, n: int) -> HeldOut:
        """Leave-one-out scores of all n rows, or of a sample if there are too many scores."""
        settings, classes = self._intercepts.shape
        chosen = np.random.default_rng(1).random(n) < max(HELD_SCORES // (settings * classes), 1) / n
        scores = np.empty((settings, int(chosen.sum()), classes), np.float32)
        scores[:] = self._intercepts[:, None]
        kept, done, place = [], 0, np.cumsum(chosen) - 1
        for features, targets in samples.blocks():
            mine = slice(done, done + len(targets))
            kept.append(targets[chosen[mine]])
            for part in parts:
                rows = np.flatnonzero((chosen & part.known)[mine])
                for some in (rows[start : start + PIECE_ROWS] for start in range(0, len(rows), PIECE_ROWS)):
                    Y = targets[np.ix_(some, part.classes)].astype(np.float64)
                    found = leave_one_out_scores(part.spectrum, features[some], Y, self.alphas_)
                    for setting, values in enumerate(found):
                        scores[setting, place[done + some][:, None], part.classes] = values
            done += len(targets)
        return HeldOut(scores, np.concatenate(kept))

    def _compared(self, held: HeldOut) -> Float:
        """`metric` (A,) of every alpha, larger is better; squared errors skip the classes that were not fitted."""
        if self.metric != SQUARED:
            return held.scores(self.metric)
        known = held.targets >= 0
        known[:, [self.classnames_.index(name) for name in self.absent_]] = False
        wanted = held.targets[known]
        return np.array([-float(((scores[known] - wanted) ** 2).mean(dtype=np.float64)) for scores in held.logits])

    def _calibrate(self, scores: Float32, targets: Targets) -> Float32:
        """Set the slope and offset of every class; returns the logits (N', L)."""
        self.slopes_, self.offsets_ = np.ones(targets.shape[1]), np.zeros(targets.shape[1])
        absent = {self.classnames_.index(name) for name in self.absent_}
        for column in sorted(set(range(targets.shape[1])) - absent):
            known = targets[:, column] >= 0
            fitted = platt_scale(scores[known, column].astype(np.float64), targets[known, column] == 1)
            self.slopes_[column], self.offsets_[column] = fitted
        return (scores * self.slopes_ + self.offsets_).astype(np.float32)


def platt_scale(scores: Float, positive: Mask) -> tuple[float, float]:
    """Slope and offset that turn scores (n,) into logits, fitted by Platt's method.

    >>> slope, offset = platt_scale(np.array([-1.0, -0.5, 0.5, 1.0]), np.array([False, False, True, True]))
    >>> slope > 0, abs(round(offset, 4))
    (True, 0.0)
    """
    if not len(scores):
        return 4.0, -2.0  # a least-squares score of 1/2 becomes probability 1/2
    hits = int(positive.sum())
    wanted = np.where(positive, (hits + 1.0) / (hits + 2.0), 1.0 / (len(scores) - hits + 2.0))
    mean, spread = float(scores.mean()), float(scores.std()) or 1.0
    unit = (scores - mean) / spread

    def loss(found: Float) -> tuple[float, Float]:
        logits = found[0] * unit + found[1]
        error = 0.5 * (1.0 + np.tanh(0.5 * logits)) - wanted
        value = float((np.logaddexp(0.0, logits) - wanted * logits).mean())
        return value, np.array([(error * unit).mean(), error.mean()])

    best = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(MIN_SLOPE, None), (None, None)], tol=1e-12
    )
    slope = float(best.x[0]) / spread
    return slope, float(best.x[1]) - slope * mean


def _blocks(blocks: Part, classes: Ints) -> Iterator[tuple[Features, Float]]:
    """Blocks with the targets of some classes only."""
    for features, targets in blocks():
        yield features, targets[:, classes].astype(np.float64)
