"""A linear probe trained with AdamW on stored features, as papers train it on features that are encoded every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeAlias, Unpack

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import Count, NotNegative, Positive, Range
from heads.estimators.base import LinearClassifier, RowsClassifier, best_setting
from heads.estimators.few_shot.base import validation_folds
from heads.estimators.standardise import Shared, Standardising
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.linear import LinearHead
from heads.rows.device import device_rows
from heads.rows.samples import Samples, finite_blocks, gathered
from heads.solvers.schedule import wise_ft_schedule

Whole = Annotated[int, Range(0)]

_Tensors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_Start: TypeAlias = tuple[np.ndarray, np.ndarray] | None
_Trained: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

LRS = (1e-3, 1e-2, 1e-1)
BLOCK = 65_536  # rows that are scored at once
CLIP = 1.0  # largest norm of the gradient
WARMUP = 500
MAX_EPOCHS = 10**6


class AdamW(Standardising, RowsClassifier, LinearClassifier):
    """Cross entropy of ``logits = W x + b`` by AdamW with a linear warm-up and a cosine to zero.

    This is the linear classifier of WiSE-FT (``--freeze-encoder``): batches in a new random order every epoch, the
    gradient clipped to a norm of 1, weight decay on W and b, the last update's head. With a zero-shot head as prior it
    starts there; without one at zeros, as probes of self-supervised models do. For the minimum of a penalised loss,
    which needs no learning rate, take `Logistic`.

    Parameters
    ----------
    lr
        Largest learning rate; of several, the most accurate on the selection split, or else on a held-out fifth of the
        training rows, is taken (ties by NLL).
    weight_decay : decoupled, times the learning rate
    epochs : passes over the rows
    batch_size : rows per update; the last batch of an epoch may be smaller
    warmup : updates of the warm-up; None: 500 as in WiSE-FT, but at most a tenth of the run
    label_smoothing : in [0, 1)
    prior : a fitted linear head to start from, None for zeros
    seed : of the order of the rows
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64
    lr_ : float
        The chosen learning rate.
    losses_ : (epochs,) float64
        Mean loss of the updates of each epoch, in nats.
    temperature_ : 1.0
    classes_, classnames_, n_features_in_, provenance_

    Notes
    -----
    Rows are held in memory, in their stored type; rows on a GPU are trained on there, in float32.

    References
    ----------
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> AdamW(lr=0.1, batch_size=50).fit(X, y).score(X, y) > 0.9
    True
    """

    name = "adamw"
    centred = False  # float32 already

    lr_: float
    losses_: np.ndarray

    def __init__(
        self,
        lr: Positive | Sequence[Positive] = LRS,
        weight_decay: NotNegative = 0.1,
        epochs: Count = 10,
        batch_size: Count = 128,
        warmup: Whole | None = None,
        label_smoothing: NotNegative = 0.0,
        prior: Any = None,
        seed: Whole = 0,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.prior = prior
        self.seed = seed

    def _check_parameters(self) -> None:
        """Set the learning rates."""
        self._rates = self._checked()

    def _fit(self, samples: Samples, validation: Samples | None) -> None:
        rates = self._rates
        samples, validation = self._scaled(samples, validation)
        prior = checked_prior(self.prior, samples)
        rows = _tensors(samples)
        held_out = None if validation is None else _tensors(validation)
        start = self._on_scale(prior)
        self._path = [self._train(rate, start, *rows) for rate in rates]
        best, how = self._choice(rates, start, rows, held_out)
        self._path = [(*self._folded(weights, bias), losses) for weights, bias, losses in self._path]
        self.lr_, (self.coef_, self.intercept_, self.losses_) = rates[best], self._path[best]
        self.temperature_ = 1.0
        names = ("weight_decay", "epochs", "batch_size", "warmup", "label_smoothing", "seed")
        params = {name: getattr(self, name) for name in names} | {"prior": prior_record(prior)}
        params |= {"lr": self.lr_, "selection": how}
        self._path_record = self._provenance(dict(params), samples.store, parent=prior)
        chosen_on = None if validation is None else validation.store
        self.provenance_ = self._provenance(params, samples.store, chosen_on, prior)

    def path_heads(self) -> list[LinearHead]:
        """The head of every learning rate."""
        check_is_fitted(self, "coef_")
        return [
            self._as_head(weights, bias, 1.0, f"{self.name} lr={rate:g}", self._path_record.with_params(lr=rate))
            for rate, (weights, bias, _) in zip(self._rates, self._path, strict=True)
        ]

    def _choice(
        self, rates: Sequence[float], prior: _Start, rows: _Tensors, held_out: _Tensors | None
    ) -> tuple[int, str]:
        """Position of the best learning rate, and what chose it."""
        if held_out is not None:
            return _best(self._path, held_out), "split"
        folds = None if len(rates) == 1 else validation_folds(rows[1].cpu().numpy(), len(self.classnames_))
        if folds is None:  # nothing to choose, or nothing that can be held out
            return int(np.argmin([losses[-1] for _, _, losses in self._path])), "none"
        kept, scored = (
            torch.from_numpy(mask).to(rows[1].device) for mask in (folds[0] != 0, (folds[0] == 0) & folds[1])
        )
        trained = [self._train(rate, prior, rows[0][kept], rows[1][kept]) for rate in rates]
        return _best(trained, (rows[0][scored], rows[1][scored])), "held-out fifth"

    def _checked(self) -> list[float]:
        """The learning rates, ascending."""
        rates: list[float] = np.unique(np.asarray(self.lr, np.float64)).tolist()
        if not rates or not all(np.isfinite(rate) and rate > 0 for rate in rates):
            raise HeadError(f"lr is {self.lr!r}, expected positive numbers")
        if not 0 <= self.weight_decay < np.inf or not 0 <= self.label_smoothing < 1:
            raise HeadError(
                f"weight_decay={self.weight_decay!r} and label_smoothing={self.label_smoothing!r}; expected a number "
                "from 0, and one in [0, 1)"
            )
        if not 1 <= self.epochs <= MAX_EPOCHS or self.batch_size < 1:
            raise HeadError(
                f"epochs={self.epochs} and batch_size={self.batch_size}; expected at least 1 of each, and at most "
                f"{MAX_EPOCHS:,} epochs"
            )
        return rates

    def _start(self, prior: _Start, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (C, D) and bias (C,) to train."""
        shape = len(self.classnames_), self.n_features_in_
        values = (np.zeros(shape), np.zeros(shape[0])) if prior is None else prior
        first, second = (torch.from_numpy(value).float().to(device).requires_grad_() for value in values)
        return first, second

    def _train(self, lr: float, prior: _Start, features: torch.Tensor, labels: torch.Tensor) -> _Trained:
        """Weights, bias, and the mean loss of every epoch."""
        weights, bias = self._start(prior, features.device)
        per_epoch = -(-len(labels) // int(self.batch_size))
        total = per_epoch * int(self.epochs)
        warmup = min(WARMUP, total // 10) if self.warmup is None else int(self.warmup)
        optimizer = torch.optim.AdamW([weights, bias], lr=lr, weight_decay=self.weight_decay)
        losses, steepest = torch.zeros(total, device=features.device), torch.zeros((), device=features.device)
        for step, rows in enumerate(self._batches(len(labels))):
            picked = torch.from_numpy(rows).to(features.device)
            logits = torch.nn.functional.linear(features[picked].float(), weights, bias)
            loss = torch.nn.functional.cross_entropy(logits, labels[picked], label_smoothing=self.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            steepest = torch.maximum(steepest, torch.nn.utils.clip_grad_norm_([weights, bias], CLIP))
            optimizer.param_groups[0]["lr"] = wise_ft_schedule(step, lr, warmup, total)
            optimizer.step()
            losses[step] = loss.detach()
        means = losses.double().cpu().numpy().reshape(int(self.epochs), per_epoch).mean(axis=1)
        trained = [value.detach().cpu().double().numpy() for value in (weights, bias)]
        finite = all(np.isfinite(values).all() for values in (means, *trained))
        # An infinite gradient is clipped to zero: nothing would be learnt.
        if not torch.isfinite(losses[0]) or (finite and not torch.isfinite(steepest)):
            size = float(features.abs().max())
            raise HeadError(f"a gradient overflows float32: features reach {size:.3g}; scale them to rows of length 1")
        if not finite:
            raise HeadError(f"training at lr {lr:g} diverged: a loss or a weight is not finite; take a smaller lr")
        return trained[0], trained[1], means

    def _batches(self, n: int) -> Iterator[np.ndarray]:
        """Rows of every update."""
        for epoch in range(int(self.epochs)):
            order = np.random.default_rng([int(self.seed), epoch]).permutation(n)
            yield from np.split(order, range(int(self.batch_size), n, int(self.batch_size)))


def _best(path: Sequence[_Trained], rows: _Tensors) -> int:
    """Position of the most accurate head on some rows; ties go to the lower NLL."""
    found = []
    for weights, bias, _ in path:
        first, second = (torch.from_numpy(value).float().to(rows[0].device) for value in (weights, bias))
        hits, nll = 0, 0.0
        for features, labels in zip(torch.split(rows[0], BLOCK), torch.split(rows[1], BLOCK), strict=True):
            logits = torch.nn.functional.linear(features.float(), first, second)
            hits += int((logits.argmax(dim=1) == labels).sum())
            nll += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        found.append((hits, nll))
    top1, losses = (np.array(column, np.float64) for column in zip(*found, strict=True))
    return best_setting(top1, losses, "top1")


def _tensors(samples: Samples) -> _Tensors:
    """Features (N, D) and class indices (N,), on the device of the rows."""
    on_device = device_rows(samples)
    if on_device is not None:
        return on_device[0], on_device[1].long()
    features, labels = gathered(samples)
    for _ in finite_blocks(lambda: iter([(features,)])):
        pass
    return torch.from_numpy(np.asarray(features)), torch.from_numpy(np.asarray(labels, np.int64))
