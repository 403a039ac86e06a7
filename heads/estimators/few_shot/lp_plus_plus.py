"""LP++ (Huang et al. 2024): a linear probe that learns, class by class, how much of the text to blend in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from featcache.parameters import Count
from heads.estimators.base import LinearClassifier, Metric, best_setting
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows, validation_folds
from heads.estimators.text_prior import class_directions
from heads.kernels.tally import row_stats
from heads.rows.samples import gathered
from heads.solvers.parallel import one_torch_thread, side_by_side
from heads.solvers.primitives import class_sums

Float = NDArray[np.float64]

_BLEND = 250.0  # the authors' factor between the mean cosine of an image with its class's text and the first blend
_MOMENTUM = 0.9
_BLEND_EVERY = 10
_PIECE_ROWS = 512
_LENGTHS = (1e-2, 1e15)


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
        directions = class_directions(rows.text)[0]
        _check_lengths(rows.features)
        training = _Rows.of(rows.features, rows.labels, directions)
        if rows.validation is None:
            pairs = _folds(training)
            how = "folds" if pairs else "none"
        else:
            pairs, how = [(training, _Rows.of(*gathered(rows.validation), directions))], "split"
        with one_torch_thread() as threads:
            self.top1_, self.nll_ = self._scores(pairs, threads)
            self.steps_ = best_setting(self.top1_, self.nll_, self.metric) + 1 if pairs else int(self.steps)
            state = next(islice(_descent(training, threads), self.steps_ - 1, None))
        self.blend_ = state.blend.double().numpy()
        self.coef_ = state.weights.double().numpy() + self.blend_[:, None] * directions
        self.intercept_, self.temperature_ = state.bias.double().numpy(), 1.0
        self.provenance_ = self._record(rows, {"steps": self.steps_}, how)

    def _scores(self, pairs: list[tuple[_Rows, _Rows]], threads: int) -> tuple[Float, Float]:
        """Accuracy and NLL (steps,) after every step on the validation rows."""
        n = sum(len(validation.labels) for _, validation in pairs)
        descents = [_descent(training, threads) for training, _ in pairs]
        found = np.zeros((2, self.steps if pairs else 0))
        self.progress.start("LP++, number of steps", self.steps * n, 0)
        for step in range(found.shape[1]):
            for descent, (_, validation) in zip(descents, pairs, strict=True):
                found[:, step] += validation.scores(next(descent), threads)
            self.progress.advance(n)
        self.progress.finish()
        return found[0] / max(n, 1), found[1] / max(n, 1)


class _State(NamedTuple):
    """Weights (C, D), bias (C,) and blend (C,), float32."""

    weights: Tensor
    bias: Tensor
    blend: Tensor


@dataclass(frozen=True)
class _Rows:
    """Features (n, D), labels (n,) and unit text vectors (C, D); float32."""

    features: Tensor
    labels: Tensor
    directions: Tensor

    @classmethod
    def of(cls, features: NDArray[np.floating], labels: NDArray[np.int64], directions: Float) -> _Rows:
        columns = features.astype(np.float32), np.asarray(labels, np.int64), directions.astype(np.float32)
        return cls(*map(torch.from_numpy, columns))

    def take(self, rows: NDArray[np.bool_]) -> _Rows:
        kept = torch.from_numpy(rows)
        return _Rows(self.features[kept], self.labels[kept], self.directions)

    def scores(self, state: _State, threads: int) -> Float:
        """Number of hits and sum of NLLs (2,)."""
        whole = state.weights + state.blend[:, None] * self.directions

        def of(piece: slice) -> tuple[int, float]:
            logits = torch.addmm(state.bias, self.features[piece], whole.T)
            found = row_stats(logits, self.labels[piece])
            return int((found.rank == 0).sum()), float(found.nll.sum())

        found: Float = np.array(list(side_by_side(len(self.labels), _PIECE_ROWS, of, threads)), np.float64)
        return np.asarray(found.sum(axis=0))

    def gradient(self, state: _State, threads: int) -> tuple[Tensor, Tensor]:
        """Of the mean cross entropy, by ``w + blend t`` (C, D) and by b (C,)."""
        whole = state.weights + state.blend[:, None] * self.directions

        def of(piece: slice) -> tuple[Tensor, Tensor]:
            X = self.features[piece]
            slope = torch.softmax(torch.addmm(state.bias, X, whole.T), dim=1)
            slope[torch.arange(len(X)), self.labels[piece]] -= 1.0
            return slope.T @ X, slope.sum(dim=0)

        weights, bias = torch.zeros_like(whole), torch.zeros_like(state.bias)
        for of_weights, of_bias in side_by_side(len(self.labels), _PIECE_ROWS, of, threads):
            weights += of_weights
            bias += of_bias
        return weights.div_(len(self.labels)), bias.div_(len(self.labels))


def _descent(rows: _Rows, threads: int) -> Iterator[_State]:
    """States after one, two, ... gradient steps, without end."""
    X, labels, directions = rows.features, rows.labels, rows.directions
    n, classes = len(X), len(directions)
    # Step sizes, from the largest curvature.
    cosines = X @ directions.T
    rate = float(4 * n / torch.linalg.eigvalsh(X.double().T @ X.double())[-1])
    blend_rate = float(n / (4 * cosines.double().square().sum(dim=0).max()))
    # The start: class sums, and blends from the cosines of images with the texts of their classes.
    counts = torch.bincount(labels, minlength=classes)
    own = torch.bincount(labels, weights=cosines[torch.arange(n), labels].double(), minlength=classes)
    blend = torch.full((classes,), float(_BLEND * (own[counts > 0] / counts[counts > 0]).mean()))
    state = _State(class_sums(X, labels, classes), torch.zeros(classes), blend)
    speed, bias_speed, step = torch.zeros_like(state.weights), torch.zeros_like(state.bias), 0
    while True:
        step += 1
        of_weights, of_bias = rows.gradient(state, threads)
        if step % _BLEND_EVERY == 0:  # a step along t_c alone
            blend = blend - blend_rate * torch.linalg.vecdot(of_weights, directions)
        speed, bias_speed = _MOMENTUM * speed + of_weights, _MOMENTUM * bias_speed + of_bias
        state = _State(state.weights - rate * speed, state.bias - rate * bias_speed, blend)
        yield state


def _folds(rows: _Rows) -> list[tuple[_Rows, _Rows]]:
    """Training and validation rows, fold by fold; none where no class has two rows."""
    found = validation_folds(rows.labels.numpy(), len(rows.directions))
    if found is None:
        return []
    folds, scored = found
    return [(rows.take(folds != k), rows.take((folds == k) & scored)) for k in range(int(folds.max()) + 1)]


def _check_lengths(features: NDArray[np.floating]) -> None:
    """Refuse rows far from unit length: the step of the bias would diverge, or logits overflow."""
    length = float(np.sqrt(np.square(features, dtype=np.float64).sum(axis=1).mean()))
    if not _LENGTHS[0] <= length <= _LENGTHS[1]:
        raise HeadError(
            f"the rows have a length of {length:.3g} (root mean square), and LP++'s steps are sized for rows of about "
            "length 1; scale them to it"
        )
