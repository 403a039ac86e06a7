"""Heads that train the class vectors of a zero-shot head, logits ``s_c cos(x, w_c)``: CLAP and TaskRes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from featcache.errors import HeadError
from featcache.parameters import Count, Rate, Seed
from heads.estimators.base import LinearClassifier
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows
from heads.estimators.text_prior import Texts, class_directions
from heads.fitted.base import softmax
from heads.rows.samples import Rows, overflow
from heads.solvers.schedule import cosine

_WARMUP_LR = 1e-5  # in the first epoch, as in the authors' shared code base


class PrototypeClassifier(FewShotClassifier, LinearClassifier):
    """Base: subclasses define the class vectors as a function of the parameter, the penalty, and the optimiser.

    There are no settings to choose, so `fit` takes no selection split. A bias of the zero-shot head is kept.
    """

    metric = "nll"

    lr: float
    epochs: int
    batch_size: int
    norm: float
    seed: int

    def fit(  # type: ignore[override]  # nothing is chosen
        self, X: Rows, y: ArrayLike | None = None, *, texts: Texts
    ) -> Self:
        """Fit like the other few-shot heads (`heads.estimators.few_shot.base`), without choosing any setting.

        Raises
        ------
        HeadError, MismatchError
            As there, or if the loss is not finite.
        """
        return super().fit(X, y, texts=texts)

    @abstractmethod
    def _vectors(self, texts: Tensor, parameter: Tensor) -> Tensor:
        """Class vectors (C, D) as a function of the trained parameter (C, D)."""

    @abstractmethod
    def _optimiser(self, parameter: Tensor) -> torch.optim.Optimizer:
        """The paper's optimiser."""

    def _begin(self, texts: Tensor, rows: FewShotRows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Initial parameter, and penalty of the class vectors; by default zeros and none."""
        return torch.zeros_like(texts), lambda vectors: vectors.new_zeros(())

    def _fit(self, rows: FewShotRows) -> None:
        directions, scales = class_directions(rows.text)
        texts = torch.from_numpy((self.norm * directions).astype(np.float32))
        X = torch.from_numpy(np.asarray(rows.features, np.float32))
        y = torch.from_numpy(np.asarray(rows.labels, np.int64))
        scale, bias = torch.from_numpy(scales.astype(np.float32)), torch.from_numpy(rows.text.bias.astype(np.float32))
        start, penalty = self._begin(texts, rows)
        parameter = start.clone().requires_grad_()

        def loss(batch: Tensor) -> Tensor:
            vectors = self._vectors(texts, parameter)
            unit = torch.nn.functional.normalize(vectors, dim=1) * scale[:, None]
            logits = torch.nn.functional.linear(X[batch], unit, bias)
            return torch.nn.functional.cross_entropy(logits, y[batch]) + penalty(vectors)

        optimiser = self._optimiser(parameter)
        self.progress.start(f"{self.name}, epochs", int(self.epochs) * len(X), 0)
        self.losses_ = np.array(list(self._descend(optimiser, loss, len(X))))
        self.progress.finish()
        vectors = self._vectors(texts, parameter).detach().double().numpy()
        moments = [found for state in optimiser.state.values() for found in state.values() if isinstance(found, Tensor)]
        if any(bool(found.isinf().any()) for found in moments):  # Adam would not move
            raise overflow(f"{self.name}: the gradient overflows", rows.features)
        if not np.isfinite(vectors).all() or not np.isfinite(self.losses_).all():
            raise HeadError(f"training diverged at lr={self.lr:g}; take a smaller one")
        self.coef_ = scales[:, None] * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.intercept_, self.temperature_ = rows.text.bias.astype(np.float64), 1.0
        self.provenance_ = self._record(rows, self.get_params(deep=False), "none")

    def _descend(self, optimiser: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], n: int) -> Iterator[float]:
        """Mean loss of every epoch; the learning rate is tiny in the first one, then decays as a cosine."""
        generator = torch.Generator().manual_seed(int(self.seed))
        for epoch in range(int(self.epochs)):
            rate = self.lr * cosine((epoch - 1) / self.epochs) if epoch else min(_WARMUP_LR, self.lr)
            for group in optimiser.param_groups:
                group["lr"] = rate
            total = 0.0
            for batch in torch.randperm(n, generator=generator).split(int(self.batch_size)):  # type: ignore[no-untyped-call]
                optimiser.zero_grad()
                found = loss(batch)
                found.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += float(found.detach()) * len(batch)
            self.progress.advance(n)
            yield total / n


@dataclass(eq=False, repr=False)
class CLAP(PrototypeClassifier):
    """Cross entropy of ``s cos(x, w_c)`` plus ``mean_c lambda_c ||w_c - t_c||²``; needs no validation split.

    t_c is the text vector of class c, from which w_c starts. ``lambda_c`` is the mean zero-shot probability of class c
    over the rows of class c: a class that the zero-shot head knows well stays close to its text, others are free.
    Trained by SGD with momentum 0.9 on batches; the learning rate is 1e-5 in the first epoch, then decays from `lr` as
    a cosine. s is the zero-shot head's scale.

    Parameters
    ----------
    lr, epochs, batch_size : 0.1, 300 and 256, as published
    norm
        Length of the text vectors. Stores hold unit vectors; the authors use the unnormalised output of the text tower,
        about ten times as long for OpenAI's models. It sets how much a change of direction costs.
    seed : order of the rows

    Attributes
    ----------
    coef_ : (C, D) float64, ``s w_c / ||w_c||``
    intercept_ : (C,) float64, the zero-shot head's
    penalties_ : (C,) float64; lambda; 1 for a class without training rows
    losses_ : (epochs,) float64
    temperature_ : 1.0

    Notes
    -----
    The authors train on 20 augmented views of every row; encode with ``--views`` to do the same.

    References
    ----------
    Silva-Rodríguez et al. 2024, "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> CLAP(epochs=20).fit(X, [0, 0, 1, 1], texts=text).penalties_.round(2).tolist()
    [0.73, 1.0]
    """

    name = "clap"

    lr: Rate = 0.1
    epochs: Count = 300
    batch_size: Count = 256
    norm: Rate = 10.0
    seed: Seed = 0

    def _vectors(self, texts: Tensor, parameter: Tensor) -> Tensor:
        return parameter

    def _optimiser(self, parameter: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter], lr=self.lr, momentum=0.9)

    def _begin(self, texts: Tensor, rows: FewShotRows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        own = softmax(rows.text.logits(rows.features).astype(np.float64))[np.arange(len(rows.labels)), rows.labels]
        counts = np.bincount(rows.labels, minlength=len(texts))
        sums = np.bincount(rows.labels, weights=own, minlength=len(texts))
        self.penalties_ = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
        strengths = torch.from_numpy(self.penalties_.astype(np.float32))
        return texts, lambda vectors: (strengths * (vectors - texts).square().sum(dim=1)).mean()


@dataclass(eq=False, repr=False)
class TaskRes(PrototypeClassifier):
    """Cross entropy of ``s cos(x, t_c + alpha r_c)``, with r trained from zero.

    t_c is the text vector of class c and s the zero-shot head's scale. Trained by Adam on batches; the learning rate is
    1e-5 in the first epoch, then decays from `lr` as a cosine.

    Parameters
    ----------
    alpha : weight of the residual
    lr, epochs, batch_size
        2e-3, 100 and 256, as published for up to four rows per class (more: 200 epochs; ImageNet: lr 2e-4).
    norm
        Length of the text vectors. Stores hold unit vectors; the authors use the unnormalised output of the text tower,
        about ten times as long for OpenAI's models. It sets how far a step turns them.
    seed : order of the rows

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64, the zero-shot head's
    losses_ : (epochs,) float64
    temperature_ : 1.0

    References
    ----------
    Yu et al. 2023, "Task Residual for Tuning Vision-Language Models" (arXiv 2211.10277).

    Examples
    --------
    >>> import numpy as np
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> TaskRes(lr=0.1).fit(X, [0, 0, 1, 1], texts=text).predict([[0.9, 0.95]]).tolist()
    [0]
    """

    name = "taskres"

    alpha: Rate = 0.5
    lr: Rate = 2e-3
    epochs: Count = 100
    batch_size: Count = 256
    norm: Rate = 10.0
    seed: Seed = 0

    def _vectors(self, texts: Tensor, parameter: Tensor) -> Tensor:
        return texts + float(self.alpha) * parameter

    def _optimiser(self, parameter: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter], lr=self.lr)
