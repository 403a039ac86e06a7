"""LP++ (Huang et al. 2024): a linear probe with a learned weight per class for the text vector."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import Count
from heads.estimators.base import LinearClassifier, Metric, best_setting
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows, held_out_masks
from heads.estimators.text_prior import class_directions
from heads.rows.samples import Features, Float, Ints, Mask, gathered
from heads.solvers.edges import callers_level
from heads.solvers.logistic.precision import Precision, cpu_precision
from heads.solvers.parallel import denormals_as_zero, one_torch_thread, side_by_side
from heads.solvers.primitives import class_sums

Result = TypeVar("Result")

_BLEND = 250.0  # the authors' ratio of the initial blend to the mean cosine of an image with its class's text
_MOMENTUM = 0.9
_BLEND_EVERY = 10
_PIECE_ROWS = 1024
HELD_ROWS = 2000
"""Enough held-out rows to choose by: once the folds so far hold as many, the remaining folds are skipped."""
_LENGTHS = (1e-2, 1e15)
_USUAL = (0.5, 2.0)


@dataclass(eq=False, repr=False)
class LPPlusPlus(FewShotClassifier, LinearClassifier):
    """Cross entropy of ``logits_c = x . (w_c + blend_c t_c) + b_c``, by gradient descent with fixed step sizes.

    t_c is the unit text vector of class c. Steps are full-batch, with sizes from Lipschitz constants: with F the N
    training rows, ``4 N / max eigenvalue of F.T F`` for w and b (momentum 0.9), and every tenth step ``N / (4 max_c
    sum_i (x_i . t_c)²)`` for the blends. Initially, w holds the class sums of the rows, every blend is 250 times the
    mean cosine of an image with the text of its class, and b is zero.

    Parameters
    ----------
    steps : maximum number of gradient steps
    metric : criterion for the number of steps: "top1" (ties by NLL) or "nll"

    Attributes
    ----------
    coef_ : (C, D) float64, ``w + blend t``
    intercept_ : (C,) float64
    blend_ : (C,) float64
    steps_ : int
        Number of steps with the best metric on the selection split, or by k-fold cross-validation on the training rows,
        after which the head is fitted on all of them. (Folds are stratified, at most 5 and at most the number of rows
        of the largest class; enough folds to hold out 2,000 rows are used.) With one row in every class none can be
        held out, and all steps are taken.
    top1_, nll_ : (steps,) float64; after every step, on the rows used for the choice; empty if nothing was held out
    temperature_ : 1.0

    Notes
    -----
    The number of steps is the only regularisation: the paper reports the test accuracy at the best validation accuracy.
    Its code accumulates the gradient of the blends over steps; here it is that of the tenth step alone.

    On CPUs with bfloat16 multiplication, products of large problems use bfloat16 and everything else float32. On
    ImageNet with four rows per class this changed held-out accuracies by up to 0.05 points and NLLs by 1e-5, and no
    choice.

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

    steps: Count = 300
    metric: Metric = "top1"

    def _fit(self, rows: FewShotRows) -> None:
        directions = class_directions(rows.text)[0]
        _check_lengths(rows.features)
        training = _Rows.of(rows.features, rows.labels, directions)
        if rows.validation is None:
            pairs = _folds(training)
            how = "folds" if pairs else "none"
        else:
            pairs, how = [(training, _Rows.of(*gathered(rows.validation), directions))], "split"
        with one_torch_thread() as threads, denormals_as_zero():
            self.top1_, self.nll_ = self._scores(pairs, threads)
            self.steps_ = best_setting(self.top1_, self.nll_, self.metric) + 1 if pairs else int(self.steps)
            descent = _Descent(training, threads)
            for _ in range(self.steps_):
                descent.step()
        self.blend_ = descent.blend.double().numpy()
        self.coef_ = descent.weights.double().numpy() + self.blend_[:, None] * directions
        self.intercept_, self.temperature_ = descent.bias.double().numpy(), 1.0
        self.provenance_ = self._record(rows, {"steps": self.steps_}, how)

    def _scores(self, pairs: list[tuple[_Rows, _Rows]], threads: int) -> tuple[Float, Float]:
        """Accuracy and NLL (steps,) after every step on the validation rows."""
        n = sum(len(validation.labels) for _, validation in pairs)
        found = np.zeros((2, self.steps if pairs else 0))
        self.progress.start("LP++, number of steps", self.steps * n, 0)
        for training, validation in pairs:
            descent = _Descent(training, threads, validation)
            for step in range(self.steps):
                descent.step()
                found[:, step] += descent.validation_scores()
                self.progress.advance(len(validation.labels))
        self.progress.finish()
        return found[0] / max(n, 1), found[1] / max(n, 1)


@dataclass(frozen=True)
class _Rows:
    """Features (n, D), labels (n,) and unit text vectors (C, D); float32."""

    features: Tensor
    labels: Tensor
    directions: Tensor

    @classmethod
    def of(cls, features: Features, labels: Ints, directions: Float) -> _Rows:
        columns = features.astype(np.float32), np.asarray(labels, np.int64), directions.astype(np.float32)
        return cls(*map(torch.from_numpy, columns))

    def take(self, rows: Mask) -> _Rows:
        kept = torch.from_numpy(rows)
        return _Rows(self.features[kept], self.labels[kept], self.directions)


class _Part:
    """Rows and their logits (n, C), float32, which are updated with each change of the parameters."""

    def __init__(self, rows: _Rows, precision: Precision, start: tuple[Tensor, Tensor], threads: int) -> None:
        self.labels, self.precision, self.threads = rows.labels, precision, threads
        self.features = rows.features.to(precision.dtype)
        self.logits = torch.addmm(start[1], rows.features, start[0].T)

    def moved(self, change: tuple[Tensor, Tensor] | None, function: Callable[[slice], Result]) -> list[Result]:
        """Apply a change of weights and bias to the logits, and `function` to each piece of the rows."""
        weights = None if change is None else change[0].to(self.precision.dtype)

        def of(piece: slice) -> Result:
            if change is not None and weights is not None:
                self.logits[piece].add_(self.features[piece] @ weights.T).add_(change[1])
            return function(piece)

        return list(side_by_side(len(self.labels), _PIECE_ROWS, of, self.threads))


class _Descent:
    """The state of gradient descent on some rows: weights (C, D), bias (C,) and blend (C,), float32.

    On CPUs with bfloat16 multiplication, large problems round the factors of products to it: the rows, the steps, and
    the residuals of the gradient.
    """

    def __init__(self, rows: _Rows, threads: int, validation: _Rows | None = None) -> None:
        X, labels, self.directions = rows.features, rows.labels, rows.directions
        n, classes = len(X), len(self.directions)
        # Step sizes, from the largest curvature.
        cosines = X @ self.directions.T
        self.rate = float(4 * n / torch.linalg.eigvalsh(X.double().T @ X.double())[-1])
        self.blend_rate = float(n / (4 * cosines.double().square().sum(dim=0).max()))
        # Initial values: class sums, and blends from the cosines of images with the texts of their classes.
        counts = torch.bincount(labels, minlength=classes)
        own = torch.bincount(labels, weights=cosines[torch.arange(n), labels].double(), minlength=classes)
        blend = float(_BLEND * (own[counts > 0] / counts[counts > 0]).mean())
        self.blend = torch.full((classes,), blend)
        self.weights, self.bias = class_sums(X, labels, classes), torch.zeros(classes)
        self.speed, self.bias_speed, self.steps = torch.zeros_like(self.weights), torch.zeros_like(self.bias), 0
        precision, start = cpu_precision(X.numel() * classes), (self.weights + blend * self.directions, self.bias)
        self.training = _Part(rows, precision, start, threads)
        self.validation = None if validation is None else _Part(validation, precision, start, threads)
        self._change: tuple[Tensor, Tensor] | None = None  # of the last step, not yet in the training rows' logits

    def step(self) -> None:
        """One gradient step."""
        self.steps += 1
        of_weights, of_bias = self._gradient()
        self.speed.mul_(_MOMENTUM).add_(of_weights)
        self.bias_speed.mul_(_MOMENTUM).add_(of_bias)
        self.weights -= self.rate * self.speed
        self.bias -= self.rate * self.bias_speed
        moved = self.speed * -self.rate
        if self.steps % _BLEND_EVERY == 0:  # a step along t_c alone
            longer = -self.blend_rate * torch.linalg.vecdot(of_weights, self.directions)
            self.blend += longer
            moved += longer[:, None] * self.directions
        self._change = moved, self.bias_speed * -self.rate

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """Gradient of the mean cross entropy, by ``w + blend t`` (C, D) and by b (C,)."""
        part = self.training

        def of(piece: slice) -> tuple[Tensor, Tensor]:
            slope = torch.softmax(part.logits[piece], dim=1)
            slope[torch.arange(len(slope)), part.labels[piece]] -= 1.0
            sums = slope.sum(dim=0)  # first, as the product may overwrite the slope
            return part.precision.backward(slope, part.features[piece]), sums

        weights, bias = torch.zeros_like(self.weights), torch.zeros_like(self.bias)
        for of_weights, of_bias in part.moved(self._change, of):
            weights += of_weights
            bias += of_bias
        return weights.div_(len(part.labels)), bias.div_(len(part.labels))

    def validation_scores(self) -> Float:
        """Number of hits and sum of NLLs (2,) after a step."""
        part = self.validation
        if part is None:
            return np.zeros(2)

        def of(piece: slice) -> tuple[int, float]:
            logits, labels = part.logits[piece], part.labels[piece]
            largest, predicted = logits.max(dim=1, keepdim=True)  # on ties the first class
            total = (logits - largest).exp_().sum(dim=1)
            nll = total.double().log() + (largest - logits.gather(1, labels[:, None]))[:, 0]
            return int((predicted[:, 0] == labels).sum()), float(nll.sum())

        return np.asarray(np.array(part.moved(self._change, of), np.float64).sum(axis=0))


def _folds(rows: _Rows) -> list[tuple[_Rows, _Rows]]:
    """Training and validation rows of each fold until enough are held out; nothing if no class has two rows."""
    pairs, held = [], 0
    for keep, scored in held_out_masks(rows.labels.numpy(), len(rows.directions)):
        if held < HELD_ROWS:
            pairs.append((rows.take(keep), rows.take(scored)))
            held += int(scored.sum())
    return pairs


def _check_lengths(features: Features) -> None:
    """Warn of rows not about as long as 1, refuse those far from it: the bias steps would diverge, or logits overflow.

    The initial logits grow with the square of the length, and the steps of the bias with its inverse: on rows five
    times as long as published, the probabilities are all but certain.
    """
    length = float(np.sqrt(np.square(features, dtype=np.float64).sum(axis=1).mean()))
    if not _LENGTHS[0] <= length <= _LENGTHS[1]:
        raise HeadError(
            f"the rows have a length of {length:.3g} (root mean square), and LP++'s steps are sized for rows of about "
            "length 1; scale them to it"
        )
    if not _USUAL[0] <= length <= _USUAL[1]:
        warnings.warn(
            f"the rows have a length of {length:.3g} (root mean square), and LP++'s initial weights and steps are for "
            "length 1: its probabilities may be far off; scale the rows to length 1",
            FeatcacheWarning,
            stacklevel=callers_level(),
        )
