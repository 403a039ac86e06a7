"""Linear probes trained on batches: all settings of a grid in one pass over the rows, and the choice of the best."""

# Annotations are not postponed: those of `_BatchOptions` are looked up in the modules of the classes that inherit them.
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from featcache.errors import FeatcacheWarning, HeadError
from featcache.parameters import Count, Fraction, Range, Whole
from featcache.progress import counted
from heads.estimators.base import LinearClassifier, Loss, RowsClassifier, criterion
from heads.estimators.few_shot.base import held_out_masks
from heads.estimators.standardise import Standardising
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.linear import LinearHead
from heads.kernels.tally import row_stats
from heads.rows.arrays import to_numpy
from heads.rows.device import device_rows
from heads.rows.samples import Float, Mask, Samples, finite_blocks, gathered, overflow
from heads.solvers.edges import callers_level
from heads.solvers.schedule import wise_ft_schedule

_Rows: TypeAlias = tuple[Tensor, Tensor]
Groups: TypeAlias = list[dict[str, object]]
"""Parameter groups of an optimiser, one per probe."""
_Start: TypeAlias = tuple[Float, Float] | None

BLOCK = 65_536  # rows scored at a time
WARMUP = 500
Epochs = Annotated[int, Range(1, 10**6)]
EPOCHS, UPDATES = 10, 300
"""Least number of passes and updates if `epochs` is None."""
SHORT, NEAR_CHANCE = 0.3, 0.9
"""Length of rows, and loss as a share of that of chance, below and above which a probe warns."""


class _Bank(NamedTuple):
    """Weights (K, C, D) and biases (K, C) of K probes, and their mean losses (K, epochs); float64."""

    weights: Float
    bias: Float
    losses: Float

    @property
    def diverged(self) -> Mask:
        """Mask (K,) of the probes with a loss or weight that is not finite."""
        finite = np.isfinite(self.losses).all(axis=1)
        finite &= np.isfinite(self.bias).all(axis=1) & np.isfinite(self.weights).all(axis=(1, 2))
        return np.asarray(~finite, bool)


@dataclass(kw_only=True, eq=False, repr=False)
class _BatchOptions:
    """The last parameters of every probe trained on batches, given by keyword."""

    batch_size: Count = 128
    label_smoothing: Fraction = 0.0
    prior: object = None
    seed: Whole = 0
    metric: Loss = "top1"
    standardise: bool = False


class TrainedProbes(_BatchOptions, Standardising, RowsClassifier, LinearClassifier):
    """Base of probes trained on batches: K settings (learning rate, weight decay) train as a bank of K probes.

    A batch is read once for all probes, and one product with K C columns gives their logits. Each probe has its own
    loss, gradient and optimiser state, and ends as if trained alone. A subclass declares the parameters.

    Parameters
    ----------
    lr
        Peak learning rate, or several, of which the best on the selection split, or else on a held-out fifth of the
        training rows, is chosen. All are trained in one pass.
    weight_decay : decoupled, times the learning rate; several are combined with every learning rate
    epochs : passes over the rows; None for at least 10 passes and at least 300 updates
    batch_size : rows per update; the last batch of an epoch may be smaller
    warmup : updates of linear warm-up; None for 500, but at most a tenth of the run
    label_smoothing : in [0, 1)
    prior : fitted linear head to start from; None starts at zero
    seed : seed of the row order
    metric : criterion of the choice: "top1" (ties by NLL), "nll" or "squared_error" (Brier score)
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_, intercept_ : (C, D), (C,) float64
    lr_, weight_decay_ : the chosen values
    losses_ : (epochs,) float64; mean training loss of each epoch, in nats
    temperature_ : 1.0

    Notes
    -----
    Rows are held in memory in their stored dtype; with rows on a GPU, training runs there in float32. K probes take
    ``12 K C D`` bytes. Probes that diverge are not chosen.
    """

    centred = False  # float32 already
    clip: ClassVar[float | None] = None
    """Norm to which the gradient of each probe is clipped; None does not clip."""

    lr: float | Sequence[float]
    weight_decay: float | Sequence[float]
    epochs: int | None
    warmup: int | None

    def _optimiser(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimiser of groups with `params`, `lr` and `weight_decay`."""
        return torch.optim.AdamW(groups)

    def _passes(self, n: int) -> int:
        """Passes over n rows: `epochs`, or at least `EPOCHS` passes and `UPDATES` updates."""
        return max(EPOCHS, -(-UPDATES // -(-n // int(self.batch_size)))) if self.epochs is None else int(self.epochs)

    def _rate(self, lr: float) -> float:
        """Peak learning rate of the optimiser for a setting `lr`."""
        return lr

    def _parameters(self, start: _Start, rows: _Rows) -> list[Tensor]:
        """Trainable parameters of one probe: weights (C, D) and bias (C,), from `start` or zero."""
        shape = len(self.classnames_), self.n_features_in_
        values = (np.zeros(shape), np.zeros(shape[0])) if start is None else start
        return [torch.from_numpy(value).float().to(rows[0].device).requires_grad_() for value in values]

    def _linear(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Weights (C, D) and bias (C,) of the logits."""
        weights, bias = parameters
        return weights, bias

    def _check_parameters(self) -> None:
        """Also set the grid of (learning rate, weight decay), ascending."""
        super()._check_parameters()
        rates, decays = (np.unique(np.asarray(value, np.float64)).tolist() for value in (self.lr, self.weight_decay))
        self._grid: list[tuple[float, float]] = list(product(rates, decays))

    def _fit(self, samples: Samples, validation: Samples | None) -> None:
        samples, validation = self._scaled(samples, validation)
        prior = checked_prior(self.prior, samples)
        rows, start = _tensors(samples), self._on_scale(prior)
        bank = self._train(start, rows)
        best, how = self._choice(bank, start, rows, None if validation is None else _tensors(validation))
        self._path = bank._replace(**dict(zip(("weights", "bias"), self._folded(*bank[:2]), strict=True)))
        (self.lr_, self.weight_decay_), self.losses_ = self._grid[best], bank.losses[best]
        if start is None:
            _warn_of_short(rows, float(self.losses_[-1]), self.name)
        self.coef_, self.intercept_, self.temperature_ = self._path.weights[best], self._path.bias[best], 1.0
        given = {name: value for name, value in self.get_params(deep=False).items() if name != "standardise"}
        params = given | {"prior": prior_record(prior), "lr": self.lr_, "weight_decay": self.weight_decay_}
        params |= {"selection": how, "epochs": self._passes(len(rows[1]))}
        self._path_record = self._provenance(params, samples, parent=prior)
        self.provenance_ = self._provenance(params, samples, validation, prior)

    def path_heads(self) -> list[LinearHead]:
        """The head of every learning rate and weight decay, except those that diverged."""
        check_is_fitted(self, "coef_")
        decays, heads = len({decay for _, decay in self._grid}), []
        for (lr, decay), weights, bias, diverged in zip(
            self._grid, self._path.weights, self._path.bias, self._path.diverged, strict=True
        ):
            name = f"{self.name} lr={lr:g}" + (f" weight_decay={decay:g}" if decays > 1 else "")
            record = self._path_record.with_params(lr=lr, weight_decay=decay)
            heads += [] if diverged else [self._as_head(weights, bias, 1.0, name, record)]
        return heads

    def _choice(self, bank: _Bank, start: _Start, rows: _Rows, held_out: _Rows | None) -> tuple[int, str]:
        """Position of the best setting, and the rows it was chosen on."""
        if held_out is not None:
            return self._best(bank, held_out), "split"
        folds = [] if len(self._grid) == 1 else held_out_masks(rows[1].cpu().numpy(), len(self.classnames_))
        if not folds:  # a single setting, or no row can be held out
            return int(np.nanargmin(np.where(bank.diverged, np.nan, bank.losses[:, -1]))), "none"
        kept, scored = (torch.from_numpy(mask).to(rows[1].device) for mask in folds[0])
        part = self._train(start, (rows[0][kept], rows[1][kept]))
        return self._best(part, (rows[0][scored], rows[1][scored]), bank.diverged), "held-out fifth"

    def _best(self, bank: _Bank, rows: _Rows, excluded: Mask | None = None) -> int:
        """Position of the best probe on some rows by `metric`; ties go to the lower NLL."""
        out = bank.diverged if excluded is None else bank.diverged | excluded
        found = np.full((len(out), 2), np.inf)
        for k in np.flatnonzero(~out).tolist():
            weights, bias = (torch.from_numpy(value[k]).float().to(rows[0].device) for value in bank[:2])
            found[k] = 0.0
            for features, labels in zip(torch.split(rows[0], BLOCK), torch.split(rows[1], BLOCK), strict=True):
                logits = torch.nn.functional.linear(features.float(), weights, bias)
                found[k] += criterion(row_stats(logits, labels), self.metric)
        return int(np.lexsort((found[:, 1], found[:, 0]))[0])

    def _train(self, start: _Start, rows: _Rows) -> _Bank:
        """Train all probes of the grid on some rows."""
        features, labels = rows
        per_epoch = -(-len(labels) // int(self.batch_size))
        epochs = self._passes(len(labels))
        total, probes = per_epoch * epochs, [self._parameters(start, rows) for _ in self._grid]
        warmup = min(WARMUP, total // 10) if self.warmup is None else int(self.warmup)
        rates = [self._rate(lr) for lr, _ in self._grid]
        groups: Groups = [
            {"params": probe, "lr": rate, "weight_decay": decay}
            for probe, rate, (_, decay) in zip(probes, rates, self._grid, strict=True)
        ]
        optimiser = self._optimiser(groups)
        losses = torch.zeros(total, len(probes), device=features.device)
        steepest = torch.zeros(len(probes), device=features.device)
        self.progress.start(f"{self.name}, {counted(len(probes), 'probe')}", epochs * len(labels), 0)
        for step, picked in enumerate(self._batches(len(labels), epochs)):
            batch = torch.from_numpy(picked).to(features.device)
            weights, bias = zip(*map(self._linear, probes), strict=True)
            logits = torch.nn.functional.linear(features[batch].float(), torch.cat(weights), torch.cat(bias))
            logits = logits.view(len(batch) * len(probes), -1)  # rows of K probes
            wanted = labels[batch].repeat_interleave(len(probes))
            own = torch.nn.functional.cross_entropy(
                logits, wanted, reduction="none", label_smoothing=self.label_smoothing
            )
            own = own.view(len(batch), -1).mean(dim=0)
            optimiser.zero_grad()
            own.sum().backward()  # type: ignore[no-untyped-call]
            if self.clip is not None:
                norms = [torch.nn.utils.clip_grad_norm_(probe, self.clip) for probe in probes]
                steepest = torch.maximum(steepest, torch.stack(norms))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = wise_ft_schedule(step, rate, warmup, total)
            optimiser.step()
            losses[step] = own.detach()
            self.progress.advance(len(batch))
        self.progress.finish()
        with torch.no_grad():
            weights, bias = zip(*map(self._linear, probes), strict=True)
        last = [torch.stack(value).detach().cpu().double().numpy() for value in (weights, bias)]
        means = losses.double().cpu().numpy().reshape(epochs, per_epoch, -1).mean(axis=1)
        bank = _Bank(last[0], last[1], means.T)
        # Clipping turns an infinite gradient into zero: the probe would learn nothing.
        learned = torch.isfinite(steepest).numpy(force=True) | bank.diverged
        if not (torch.isfinite(losses[0]).all() and learned.all()):
            raise overflow("a gradient overflows", to_numpy(features))
        if bank.diverged.all():
            raise HeadError(f"training at lr {self.lr} diverged: a loss or a weight is not finite; use a smaller lr")
        return bank

    def _batches(self, n: int, epochs: int) -> Iterator[np.ndarray]:
        """Row indices of each update."""
        for epoch in range(epochs):
            order = np.random.default_rng([int(self.seed), epoch]).permutation(n)
            yield from np.split(order, range(int(self.batch_size), n, int(self.batch_size)))


def _warn_of_short(rows: _Rows, loss: float, name: str) -> None:
    """Warn of short rows where training from zeros has hardly lowered the loss."""
    shares = torch.bincount(rows[1]).double() / len(rows[1])
    chance = float(torch.special.entr(shares).sum())
    length = float(rows[0].double().square().sum(dim=1).mean().sqrt()) if loss > NEAR_CHANCE * chance else 1.0
    if length < SHORT:
        warnings.warn(
            f"{name}: the loss is {loss:.3g} after training, where chance has {chance:.3g}: the rows have length "
            f"{length:.2g} (root mean square), and the learning rates are for length 1; scale the rows to it, or set "
            "standardise=True",
            FeatcacheWarning,
            stacklevel=callers_level(),
        )


def _tensors(samples: Samples) -> _Rows:
    """Features (N, D) and class indices (N,), on the device of the rows."""
    on_device = device_rows(samples)
    if on_device is not None:
        return on_device[0], on_device[1].long()
    features, labels = gathered(samples)
    for _ in finite_blocks(lambda: iter([(features,)])):
        pass
    return torch.from_numpy(np.asarray(features)), torch.from_numpy(np.asarray(labels, np.int64))
