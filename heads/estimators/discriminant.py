"""Closed-form classifiers from the moments: nearest class mean, and the Gaussian discriminant.

One pass gives the moments per fold, hence the head; a second pass scores each fold's rows by the head of the other
folds to fit the temperature.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import OneOf, Range
from heads.estimators.base import LinearClassifier, Metric, RowsClassifier, criterion
from heads.estimators.kept_moments import blocks_in_place, moments_by_fold
from heads.estimators.standardise import Standardising
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json
from heads.kernels.tally import stats_of_arrays
from heads.rows.samples import Float, Mask, Samples, require_finite
from heads.rows.selection import RowSampler, thinned
from heads.solvers.folds import in_folds, sampled_rows
from heads.solvers.parallel import Blocks
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import symmetric_eigh
from heads.solvers.temperature import fit_temperature

Scored = tuple[list[Float], NDArray[np.integer]]
"""Scores (n, C) of every candidate, and labels (n,)."""


class Solved(NamedTuple):
    """Weights (C, D), intercepts (C,), and the hyper-parameters that gave them, for the provenance."""

    weights: Float
    intercepts: Float
    params: Json


class MomentClassifier(Standardising, RowsClassifier, LinearClassifier):
    """Base of heads whose weights are a function of `Moments`; the fit ignores missing classes."""

    moments_: Moments

    metric: str = "nll"
    """Criterion for choosing among several `candidates`."""

    @abstractmethod
    def candidates(self, moments: Moments) -> list[Solved]:
        """The heads to choose from, given moments in which every class has rows."""

    def _fit(self, samples: Samples, validation: Samples | None) -> None:
        samples, validation = self._scaled(samples, validation)
        parts = moments_by_fold(samples)
        self.moments_ = sum(parts, Moments.zeros(samples.dim, len(samples.classnames)))
        require_finite(samples, self.moments_.xtx.diagonal())
        present = self.moments_.counts > 0
        if present.sum() < 2:
            raise HeadError(f"{present.sum()} class has rows, expected at least 2; add rows of another class")
        found = self.candidates(self.moments_.of_columns(present))
        # Held-out scores of every candidate choose one and fit its temperature.
        if validation is None:
            scored = list(self._fold_scores(samples, parts, len(found)))
        else:
            scored = list(_scores_of(found, thinned(validation), present))
        labels = np.concatenate([np.zeros(0, np.int64), *(y for _, y in scored)])
        scores = [np.concatenate([block[place] for block, _ in scored]) for place in range(len(found) if scored else 0)]
        best = _best(scores, labels, self.metric) if len(found) > 1 and len(labels) else 0
        solved = found[best]
        self.coef_, self.intercept_ = np.zeros((len(present), samples.dim)), np.zeros(len(present))
        self.coef_[present], self.intercept_[present] = self._folded(solved.weights, solved.intercepts)
        self._solution = solved
        if len(labels):
            self.temperature_ = fit_temperature(scores[best], labels)
        else:
            self.temperature_ = self._spread_of_rows(solved, samples, present)
        self.intercept_[~present] = ABSENT * self.temperature_
        self._absent = tuple(np.flatnonzero(~present).tolist())
        how: Json = {"temperature": self.temperature_, "selection": "none"}
        if len(labels):
            how["selection"] = "folds" if validation is None else "split"
        if len(found) > 1:
            how["metric"] = self.metric
        self.provenance_ = self._provenance({**solved.params, **how}, samples, validation)

    def _fold_scores(self, samples: Samples, parts: list[Moments], candidates: int) -> Iterator[Scored]:
        """Scores of a sample of the rows, each under the heads of the other folds, and their labels."""
        solved = [self._without(part) for part in parts]
        n_classes = len(samples.classnames)
        blocks = in_folds(blocks_in_place(samples), n_classes)
        everywhere = self.moments_.counts > 0
        for fold, features, labels, _ in sampled_rows(blocks, RowSampler(self.moments_.n, n_classes)):
            found, present = solved[fold]
            rows = np.flatnonzero(present[labels])
            if present.sum() < 2 or not len(rows):
                continue
            wide, scores = features[rows].astype(np.float64), np.empty((candidates, len(rows), len(present)))
            for own, head in zip(scores, found, strict=True):
                own[:, present] = wide @ head.weights.T + head.intercepts
                # A class whose rows are all in this fold ranks last.
                own[:, ~present] = own[:, present].min(axis=1, keepdims=True)
            yield list(scores[:, :, everywhere]), (np.cumsum(everywhere) - 1)[labels[rows]]

    def _without(self, part: Moments) -> tuple[list[Solved], Mask]:
        """The heads fitted without one fold, and which classes they have."""
        rest = self.moments_ - part
        present = rest.counts > 0
        return self.candidates(rest.of_columns(present)) if present.sum() > 1 else [], present

    def _spread_of_rows(self, solved: Solved, samples: Samples, present: Mask) -> float:
        """The temperature when every class has one row and none can be held out: logits get standard deviation one."""
        blocks = _scores_of([solved], thinned(samples, self.moments_.n), present)
        own = np.concatenate([scores[0] for scores, _ in blocks])
        return float(own.std(axis=1).mean()) or 1.0


def _scores_of(solved: list[Solved], blocks: Blocks, present: Mask) -> Iterator[Scored]:
    """Scores over the classes that have training rows, for the rows of these classes, and their labels."""
    for features, labels in blocks:
        rows = present[labels]
        wide = features[rows].astype(np.float64)
        yield [wide @ head.weights.T + head.intercepts for head in solved], (np.cumsum(present) - 1)[labels[rows]]


def _best(scores: list[Float], labels: NDArray[np.integer], metric: str) -> int:
    """Index of the best candidate on held-out rows, each at its best temperature."""
    found = []
    for own in scores:
        logits = (own / fit_temperature(own, labels)).astype(np.float32)
        found.append(criterion(stats_of_arrays(logits, labels), metric))
    return min(range(len(found)), key=found.__getitem__)


Shrinkage = Annotated[float, Range(0, 1)] | Annotated[str, OneOf("auto", "oas")]
SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Shrinkages that `LinearDiscriminant.path_heads` adds to the fitted one."""


@dataclass(eq=False, repr=False)
class NearestMean(MomentClassifier):
    """Nearest class mean by cosine similarity (prototypes, in the terms of Snell et al. 2017).

    ``score_c = x . m_c / ||m_c||`` with m_c the mean of the class's rows: for unit rows the largest score is the
    nearest normalised mean. Without `normalize`, ``score_c = x . m_c - ||m_c||² / 2``: the nearest mean itself,
    with the predictions of ``sklearn.neighbors.NearestCentroid()``.

    Parameters
    ----------
    normalize : whether class means are scaled to unit length
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_, intercept_ : (C, D), (C,) float64
    temperature_ : scores divided by it are logits; fitted by NLL on the selection split, or on 5 folds
    moments_

    Notes
    -----
    A class without training rows has zero weights and the logit -10,000. With one row per class none can be held out;
    the logits are then scaled to a standard deviation of one over the classes.

    References
    ----------
    Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning".

    Examples
    --------
    >>> X = np.array([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0], [0.2, 0.8]])
    >>> NearestMean().fit(X, [0, 0, 1, 1]).predict([[0.3, 0.4]]).tolist()
    [1]
    """

    name = "nearest_mean"

    normalize: bool = True
    _: KW_ONLY
    standardise: bool = False

    def candidates(self, moments: Moments) -> list[Solved]:
        """The single head of these moments."""
        means = moments.class_sums / moments.counts[:, None]
        squares = (means**2).sum(axis=1)
        if not self.normalize:
            return [Solved(means, -squares / 2, {"normalize": False})]
        lengths = np.sqrt(squares)[:, None]  # a zero mean has no direction: it scores 0
        directions = np.divide(means, lengths, out=np.zeros_like(means), where=lengths > 0)
        return [Solved(directions, np.zeros(len(means)), {"normalize": True})]


@dataclass(eq=False, repr=False)
class LinearDiscriminant(MomentClassifier):
    """Gaussian classes with one shared, shrunk covariance: the training-free baseline of Wang et al. 2024.

    With m_c the class means, S the within-class covariance ``(X.T X - sum_c n_c m_c m_c.T) / N``, and
    ``S_s = (1 - s) S + s tr(S)/D I``::

        score_c = x . S_s^-1 m_c - m_c . S_s^-1 m_c / 2 + log prior_c

    Weights, intercepts and scores equal ``sklearn.discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr",
    shrinkage=s)`` (for two classes scikit-learn keeps only the difference of the two columns).

    Parameters
    ----------
    shrinkage
        A number s in [0, 1]; "auto", ``s = D / (N - 1 + D)``: the empirical Bayes estimator of Wang et al., after
        Kubokawa and Srivastava 2008; or "oas", the oracle approximating shrinkage of Chen et al. 2010, as
        ``sklearn.covariance.OAS(assume_centered=True)`` on rows minus their class mean. Both need only the moments.
        (scikit-learn's "auto" is Ledoit-Wolf per class, which needs the rows. On CLIP features of flowers, pets,
        actions and few-shot ImageNet, "auto" had a lower NLL than "oas", and an accuracy at most 0.1 points lower.)
        Given several, the one with the best `metric` on held-out rows is used, each at its best temperature.
    priors
        "empirical", the training frequencies, or "uniform" (S stays pooled over rows, whereas scikit-learn weights the
        classes' covariances by the priors).
    metric : criterion for choosing among several shrinkages: "nll" or "top1" (ties by NLL)
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_, intercept_ : (C, D), (C,) float64
    shrinkage_ : float
    temperature_ : float
        Scores divided by it are logits; fitted by NLL on the selection split, or on 5 folds. The Gaussian model itself
        has 1, which is overconfident with few rows.
    moments_

    Notes
    -----
    A class without training rows has zero weights and the logit -10,000. With one row per class there is no
    within-class scatter: S is then the variance of all rows times the identity, and the head is the nearest mean. If
    S_s is singular (s = 0 and N < D), its pseudo-inverse is used (scikit-learn inverts the rounding errors).

    References
    ----------
    Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = LinearDiscriminant().fit(X, y)
    >>> head.score(X, y) > 0.9, round(head.shrinkage_, 4) == round(3 / (200 - 1 + 3), 4)
    (True, True)
    """

    name = "discriminant"

    shrinkage: Shrinkage | Sequence[Shrinkage] = "auto"
    priors: Annotated[str, OneOf("empirical", "uniform")] = "empirical"
    metric: Metric = "nll"
    _: KW_ONLY
    standardise: bool = False

    @property
    def shrinkage_(self) -> float:
        """The shrinkage that was used."""
        check_is_fitted(self, "provenance_")
        return float(self.provenance_.params["shrinkage"])

    def path_heads(self, shrinkages: Sequence[float | str] = SHRINKAGES) -> list[LinearHead]:
        """The fitted head and those of other shrinkages, ascending, from the moments and one decomposition.

        Accuracies are exact. Fitting each temperature would take another pass over held-out rows; instead, each head's
        temperature gives its logits the same spread over classes, on the training rows, as those of the fitted head.
        Shrinkages are numbers from 0 to 1, "auto" or "oas"; HeadError for others.
        """
        own, present = self.linear(), self.moments_.counts > 0
        moments = self.moments_.of_columns(present)
        spread = _spread(self._solution.weights, self._solution.intercepts, moments)
        found: dict[float, LinearHead] = {}
        for weights, intercepts, solved in self._solved(moments, [*shrinkages, self.shrinkage_]):
            ratio = _spread(weights, intercepts, moments) / spread if spread > 0 else 1.0
            temperature = self.temperature_ * (ratio or 1.0)
            rows, bias = np.zeros(self.coef_.shape), np.full(len(present), ABSENT * temperature)
            rows[present], bias[present] = self._folded(weights, intercepts)
            record = self.provenance_.with_params(**solved, temperature=temperature)
            name = f"{self.name} shrinkage={solved['shrinkage']:.6g}"
            found[solved["shrinkage"]] = self._as_head(rows, bias, temperature, name, record)
        found[self.shrinkage_] = replace(own, name=found[self.shrinkage_].name)
        return [found[shrinkage] for shrinkage in sorted(found)]

    def candidates(self, moments: Moments) -> list[Solved]:
        """One head per candidate shrinkage."""
        return list(self._solved(moments, self._shrinkages()))

    def _shrinkages(self) -> list[float | str]:
        """The given shrinkages, strongest first, so that it wins ties; if folds leave one row, all score the same."""
        given: list[float | str] = (
            [self.shrinkage] if isinstance(self.shrinkage, str | float | int | np.number) else [*self.shrinkage]
        )
        return sorted(given, key=lambda one: -2.0 if isinstance(one, str) else -one)

    def _solved(self, moments: Moments, shrinkages: Sequence[float | str]) -> Iterator[Solved]:
        """The head of each shrinkage, from one decomposition."""
        means = moments.class_sums / moments.counts[:, None]
        within = (moments.xtx - means.T @ (moments.counts[:, None] * means)) / moments.n
        eigenvalues, vectors = symmetric_eigh(within)
        uniform, counts = np.full(len(means), -np.log(len(means))), moments.counts
        log_priors = np.log(counts / counts.sum()) if self.priors == "empirical" else uniform
        for wanted in shrinkages:
            spectrum, shrinkage = _shrunk(np.maximum(eigenvalues, 0.0), moments, wanted)
            # S is a difference of moments: zeros come out as the rounding of X.T X.
            usable = spectrum > np.finfo(np.float64).eps * moments.xtx.trace() / moments.n * len(moments.xtx)
            inverse = np.divide(1.0, spectrum, out=np.zeros_like(spectrum), where=usable)
            weights = ((means @ vectors) * inverse) @ vectors.T
            intercepts = log_priors - (weights * means).sum(axis=1) / 2
            yield Solved(weights, intercepts, {"shrinkage": shrinkage, "priors": self.priors})


def _shrunk(eigenvalues: Float, moments: Moments, wanted: float | str) -> tuple[Float, float]:
    """Eigenvalues of the shrunk covariance, and the shrinkage used."""
    variance = float(eigenvalues.mean())
    power = float(moments.xtx.trace()) / moments.n / len(moments.xtx)
    if variance > 1e-13 * power:
        shrinkage = _shrinkage(eigenvalues, moments.n, wanted)
        return (1 - shrinkage) * eigenvalues + shrinkage * variance, shrinkage
    # Rounding only: all rows of a class are equal.
    variance = power - float((moments.sum_x**2).sum()) / moments.n**2 / len(moments.xtx)
    return np.full(len(moments.xtx), variance if variance > 1e-13 * power else 1.0), 1.0


def _shrinkage(eigenvalues: Float, n: int, wanted: float | str) -> float:
    """Shrinkage s, from the spectrum of S and the number of rows."""
    dim = len(eigenvalues)
    if wanted == "auto":
        return dim / (n - 1 + dim)
    if wanted == "oas":
        square, mean = float((eigenvalues**2).sum()) / dim**2, float(eigenvalues.mean())
        spread = (n + 1) * (square - mean**2 / dim)
        return min((square + mean**2) / spread, 1.0) if spread > 0 else 1.0
    if isinstance(wanted, str) or not 0 <= wanted <= 1:
        raise HeadError(f"shrinkage is {wanted!r}, expected a number from 0 to 1, 'auto' or 'oas'")
    return float(wanted)


def _spread(weights: Float, intercepts: Float, moments: Moments) -> float:
    """Root mean square of the scores minus each row's mean score, over classes and the rows behind the moments."""
    W, b = weights - weights.mean(axis=0), intercepts - intercepts.mean()
    squares = float(((W @ moments.xtx) * W).sum() + 2 * (b @ (W @ moments.sum_x)) + moments.n * (b @ b))
    return float(np.sqrt(max(squares, 0.0) / (moments.n * len(b))))
