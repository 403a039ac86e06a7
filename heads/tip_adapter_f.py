"""Tip-Adapter-F (Zhang et al. 2022): Tip-Adapter whose keys are then trained on the labelled rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.key_votes import KeyBank, unit_rows
from heads.linear import LinearHead
from heads.samples import Samples
from heads.tip_adapter import ALPHAS, BETAS, PAPER, TipAdapter, fold_keys, scored

__all__ = ["TipAdapterF", "train_keys"]


class TipAdapterF(TipAdapter):
    """`TipAdapter` with keys trained by cross-entropy, at the paper's alpha and beta, before both are chosen.

    ``logits = V W.T + b + alpha exp(-beta (1 - V K.T)) Y``, K the trained keys. AdamW (epsilon 1e-4) with a cosine
    schedule, as published. The original code trains on augmented views of the rows; here a row does not vote for
    itself while its own loss is taken, because on cached features its key is the row itself and would explain it alone.
    The keys' lengths are free, as published.

    Parameters
    ----------
    alphas, betas, metric
        As in `TipAdapter`.
    epochs, learning_rate, batch_size
        20, 1e-3 and 256, as published.
    seed
        Order of the rows.

    Attributes
    ----------
    alpha_, beta_, top1_, nll_ and the rest as in `TipAdapter`; cross-validation trains the keys of each fold anew.

    References
    ----------
    Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> TipAdapterF(epochs=2).fit(X, [0, 0, 1, 1], texts=text).predict([[0.9, 0.95]]).tolist()
    [0]
    """

    name = "tip_adapter_f"

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        betas: Sequence[float] = BETAS,
        metric: str = "top1",
        epochs: int = 20,
        learning_rate: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(alphas, betas, metric)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.seed = seed

    def _bank(self, features: NDArray[np.floating], labels: NDArray[np.int64], text: LinearHead) -> KeyBank:
        """The rows as keys, trained."""
        if self.epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise HeadError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, learning_rate {self.learning_rate!r}; expected "
                "from 0, from 1, and a positive number"
            )
        keys = train_keys(
            features,
            labels,
            text,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return KeyBank(keys, labels, len(text.classnames), free=True)

    def _fold_scores(
        self, text: LinearHead, bank: KeyBank, alphas: NDArray[np.float64], betas: NDArray[np.float64], samples: Samples
    ) -> NDArray[np.float64] | None:
        """Each fold's rows by keys trained on the other folds; `bank` is not looked at."""
        ((features, labels),) = samples.blocks()
        folds = fold_keys(labels, len(samples.classnames))
        if folds is None or not folds[1].any():
            return None
        total, n = np.zeros((2, len(alphas), len(betas))), 0
        for fold in range(int(folds[0].max()) + 1):
            out, rest = (folds[0] == fold) & folds[1], folds[0] != fold
            if not out.any() or not rest.any():
                continue
            held_out = Samples(samples.dim, samples.classes, samples.classnames, (features[out], labels[out]))
            trained = self._bank(features[rest], labels[rest], text)
            total += scored(text, trained, alphas, betas, held_out) * out.sum()
            n += int(out.sum())
        return total / n


def train_keys(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    text: LinearHead,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    alpha: float = PAPER[0],
    beta: float = PAPER[1],
) -> NDArray[np.float32]:
    """Keys (M, D) that start as the unit rows and lower the rows' cross-entropy, no row voting for itself.

    Parameters
    ----------
    features : (M, D); labels : (M,) class indices of `text`
    alpha, beta
        Strength and sharpness while training.
    """
    rows = torch.from_numpy(unit_rows(np.asarray(features)))
    base = torch.from_numpy(text.logits(np.asarray(features)))
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    keys = rows.clone().requires_grad_()
    optimiser = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(batch_size):  # type: ignore[no-untyped-call]
            weights = torch.exp(beta * (rows[batch] @ keys.T - 1.0))
            weights = weights.scatter(1, batch[:, None], 0.0)  # a row has no vote in its own loss
            votes = torch.zeros_like(base[batch]).index_add(1, targets, weights)
            loss = torch.nn.functional.cross_entropy(base[batch] + alpha * votes, targets[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    trained: NDArray[np.float32] = keys.detach().numpy()
    if not np.isfinite(trained).all():
        raise HeadError(f"training the keys diverged at learning_rate {learning_rate:g}; try a smaller one")
    return trained
