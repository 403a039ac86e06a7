"""LP++ (Huang et al. 2024): a linear probe that learns, class by class, how much of the text to blend in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.parameters import Count
from heads.estimators.base import LinearClassifier, Metric
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows, best_setting, validation_folds
from heads.fitted.linear import LinearHead
from heads.kernels.tally import stats_of_arrays
from heads.rows.samples import gathered

Float = NDArray[np.float64]

_BLEND = 250.0  # the authors' factor between the mean cosine of an image with its class's text and the first blend
_MOMENTUM = np.float32(0.9)
_BLEND_EVERY = 10


class LPPlusPlus(FewShotClassifier, LinearClassifier):
    """Cross entropy of ``logits_c = x . (w_c + blend_c t_c) + b_c`` by gradient steps whose sizes need no search.

    t_c is the unit text vector of class c. Steps are full-batch, of the sizes that Lipschitz constants give: with F
    the N training rows, ``4 N / max eigenvalue of F.T F`` for w and b (momentum 0.9), and every tenth step
    ``N / (4 max_c sum_i (x_i . t_c)²)`` for the blends. They begin at the class sums of the rows for w, at 250 times
    the mean cosine of an image with the text of its class for every blend, and at zero for b.

    Parameters
    ----------
    steps : largest number of gradient steps
    metric : "top1" or "nll": what chooses the number of steps; ties in accuracy are decided by the NLL

    Attributes
    ----------
    coef_ : (C, D) float64, ``w + blend t``
    intercept_ : (C,) float64
    blend_ : (C,) float64
    steps_ : int
        Number of steps of the best metric on the selection split, or by k-fold cross-validation on the training rows
        (stratified, at most 5 folds and as many as the largest class has rows), then fitted on all of them. With one
        row in every class nothing can be held out, and all steps are taken.
    top1_, nll_ : (steps,) float64
        After every step, on the rows that chose; empty where nothing was held out.
    temperature_ : 1.0
    classes_, classnames_, n_features_in_, provenance_

    Notes
    -----
    The number of steps is the only regularisation: the paper reports the test accuracy at the best validation one. Its
    code accumulates the gradient of the blends from step to step; here it is that of the tenth step.

    References
    ----------
    Huang et al. 2024, "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> LPPlusPlus(steps=20).fit(X, [0, 0, 1, 1], texts=text).coef_.shape
    (2, 2)
    """

    name = "lp_plus_plus"

    blend_: Float
    steps_: int
    top1_: Float
    nll_: Float

    def __init__(self, steps: Count = 300, metric: Metric = "top1") -> None:
        self.steps = steps
        self.metric = metric

    def _check_parameters(self) -> None:
        if self.steps < 1:
            raise HeadError(
                f"got steps={self.steps} and metric={self.metric!r}; expected steps from 1, and 'top1' or 'nll'"
            )

    def _fit(self, rows: FewShotRows) -> None:
        directions = _directions(rows.text)
        training = _Rows.of(rows.features, rows.labels, directions)
        if rows.validation is None:
            pairs = _folds(training)
            how = "folds" if pairs else "none"
        else:
            pairs, how = [(training, _Rows.of(*gathered(rows.validation), directions))], "split"
        self.top1_, self.nll_ = self._scores(pairs)
        self.steps_ = best_setting(self.top1_, self.nll_, self.metric) + 1 if pairs else int(self.steps)
        state = next(state for step, state in enumerate(_descent(training), start=1) if step == self.steps_)
        self.blend_ = state.blend.astype(np.float64)
        self.coef_ = state.weights.astype(np.float64) + self.blend_[:, None] * directions
        self.intercept_, self.temperature_ = state.bias.astype(np.float64), 1.0
        self.provenance_ = self._record(rows, {"steps": self.steps_}, how)

    def _scores(self, pairs: list[tuple[_Rows, _Rows]]) -> tuple[Float, Float]:
        """Accuracy and NLL (steps,) after every step on the validation rows."""
        sums, n = np.zeros((2, self.steps if pairs else 0)), 0
        for training, validation in pairs:
            n += len(validation.labels)
            for step, state in zip(range(self.steps), _descent(training), strict=False):
                statistics = stats_of_arrays(validation.logits(state), validation.labels)
                sums[:, step] += int((statistics.rank == 0).sum()), float(statistics.nll.sum())
        return sums[0] / max(n, 1), sums[1] / max(n, 1)


class _State(NamedTuple):
    """Weights (C, D), bias (C,) and blend (C,), float32."""

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    blend: NDArray[np.float32]


@dataclass(frozen=True)
class _Rows:
    """Features (n, D), cosines to the texts (n, C), float32, and labels (n,)."""

    features: NDArray[np.float32]
    texts: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, features: NDArray[np.floating], labels: NDArray[np.int64], directions: Float) -> _Rows:
        rows = features.astype(np.float32)
        return cls(rows, rows @ directions.T.astype(np.float32), labels)

    def take(self, rows: NDArray[np.bool_]) -> _Rows:
        return _Rows(self.features[rows], self.texts[rows], self.labels[rows])

    def logits(self, state: _State) -> NDArray[np.float32]:
        return self.features @ state.weights.T + state.bias + state.blend * self.texts


def _descent(rows: _Rows) -> Iterator[_State]:
    """States after one, two, ... gradient steps, without end."""
    n, classes = rows.texts.shape
    place = np.arange(n)
    # Step sizes, from the largest curvature.
    gram = rows.features.astype(np.float64).T @ rows.features
    rate = np.float32(4 * n / np.linalg.eigvalsh(gram)[-1])
    blend_rate = np.float32(n / (4 * np.square(rows.texts, dtype=np.float64).sum(axis=0).max()))
    # The start: class sums, and blends from the cosines of images with the texts of their classes.
    counts = np.bincount(rows.labels, minlength=classes)
    own = np.bincount(rows.labels, weights=rows.texts[place, rows.labels], minlength=classes)
    blend = np.full(classes, _BLEND * (own[counts > 0] / counts[counts > 0]).mean(), np.float32)
    weights, bias = np.zeros((classes, rows.features.shape[1]), np.float32), np.zeros(classes, np.float32)
    np.add.at(weights, rows.labels, rows.features)
    speed, bias_speed, step = np.zeros_like(weights), np.zeros_like(bias), 0
    while True:
        step += 1
        # Derivative of the mean cross entropy by the logits: (softmax - one-hot) / N.
        slope = rows.logits(_State(weights, bias, blend))
        slope = np.exp(slope - slope.max(axis=1, keepdims=True))
        slope /= slope.sum(axis=1, keepdims=True)
        slope[place, rows.labels] -= 1
        slope /= np.float32(n)
        speed = _MOMENTUM * speed + slope.T @ rows.features
        bias_speed = _MOMENTUM * bias_speed + slope.sum(axis=0)
        weights, bias = weights - rate * speed, bias - rate * bias_speed
        if step % _BLEND_EVERY == 0:
            blend = blend - blend_rate * (slope * rows.texts).sum(axis=0)
        yield _State(weights, bias, blend)


def _folds(rows: _Rows) -> list[tuple[_Rows, _Rows]]:
    """Training and validation rows, fold by fold; none where no class has two rows."""
    found = validation_folds(rows.labels, rows.texts.shape[1])
    if found is None:
        return []
    folds, scored = found
    return [(rows.take(folds != k), rows.take((folds == k) & scored)) for k in range(int(folds.max()) + 1)]


def _directions(text: LinearHead) -> Float:
    """Unit text vectors (C, D)."""
    weights = text.weights.astype(np.float64)
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise HeadError("the text head has a class with zero weights; give one with a text vector for every class")
    return np.asarray(weights / lengths)
