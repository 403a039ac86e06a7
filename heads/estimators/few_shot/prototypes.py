"""Base of heads that train the class vectors of a zero-shot head: logits ``s_c cos(x, w_c)``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from featcache.errors import HeadError
from featcache.store.protocol import TextSource
from heads.estimators.base import LinearClassifier
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows
from heads.estimators.text_prior import class_directions
from heads.fitted.base import Fitted
from heads.fitted.linear import LinearHead
from heads.rows.samples import Rows
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

    losses_: NDArray[np.float64]

    def __init__(self, lr: float, epochs: int, batch_size: int, norm: float, seed: int) -> None:
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.norm = norm
        self.seed = seed

    def fit(  # type: ignore[override]  # nothing is chosen
        self, X: Rows, y: ArrayLike | None = None, *, texts: TextSource | LinearHead | Fitted
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
            raise HeadError(
                f"{self.name}: the gradient overflows float32, with features up to {np.abs(rows.features).max():.3g}; "
                "scale them, for instance to rows of length 1"
            )
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
