"""One update: features, objective, regularisers, gradients, optimiser.

A large batch can be split into micro-batches without changing the update. Terms that are means over rows (cross
entropy, Lipsum, distillation) are summed over the micro-batches. For terms of the whole batch (contrastive loss,
variance-covariance), all features are first computed without a graph, then the loss and its gradient with respect to
them; a second forward pass of each micro-batch propagates it into the tower (Gao et al., arXiv 2101.06983).

Losses stay on the device until a log line is due, so that only log lines wait for the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from featcache.errors import DivergedError
from ft.checkpoints.state import Json
from ft.distributed import average_gradients, total
from ft.objectives.base import Objective, TrainingBatch
from ft.objectives.head import Head
from ft.prior.prior import OnlinePrior
from ft.regularizers.base import Regularizer, Step
from ft.training.averages import Teacher
from ft.training.model import Trainable
from ft.training.optim import set_rate
from ft.training.options import FinetuneOptions

FROZEN = frozenset({"frozen_features", "frozen_logits"})
SMALLEST_SCALE = 1.0  # loss scale of fp16

Tensors: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """Result of an update: weighted terms of the loss, which sum to it, gradient norm and learning rate."""

    terms: Mapping[str, torch.Tensor]
    gradient_norm: torch.Tensor
    rate: float


@dataclass
class Ledger:
    """Results of the updates since the last log line, of which losses are averaged over `world` processes.

    With `half` (fp16), gradients overflow now and then, and those updates are skipped.
    """

    world: int
    half: bool
    _updates: list[Update] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Keep the result of an update, on its device."""
        self._updates.append(update)

    def read(self, step: int, scale: float) -> Json:
        """Log record after `step` updates: means over those since the last call.

        Raises DivergedError if a loss is not finite, a gradient is not finite (except in fp16), or the loss `scale` of
        fp16 is below 1.
        """
        updates, self._updates = self._updates, []
        names = list(updates[0].terms)
        terms = torch.stack([torch.stack([u.terms[name].double() for name in names]) for u in updates])
        terms = total(terms / self.world).cpu()
        norms = torch.stack([update.gradient_norm.double() for update in updates]).cpu()
        finite = terms.isfinite().all(dim=1) & (norms.isfinite() | self.half)
        if not finite.all():
            at = int((~finite).nonzero()[0])
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, terms[at].tolist(), strict=True))
            raise DivergedError(
                f"update {step - len(updates) + at + 1}: {parts}, gradient norm {float(norms[at]):.4g}: training has "
                "diverged and stops; use a smaller --lr, a longer --warmup, or --clip 1"
                + (", or --precision bf16" if self.half else "")
            )
        if self.half and scale < SMALLEST_SCALE:
            raise DivergedError(f"update {step}: the loss scale of fp16 fell to {scale}; take --precision bf16")
        means = dict(zip(names, terms.mean(dim=0).tolist(), strict=True))
        return {
            "step": step,
            "loss": sum(means.values()),
            "terms": means,
            "lr": updates[-1].rate,
            "gradient_norm": float(norms[-1]),
        }


@dataclass
class Stepper:
    """Model, loss and optimiser; `update` makes one step.

    Parameters
    ----------
    regularizers : weight (lambda) and term by name
    scaler : enabled with fp16 only
    generator : random numbers of the regularisers
    prior, frozen_head, initial, teacher
        Frozen features, frozen logits, initial values of the trained parameters, and the moving average of the model;
        only where a regulariser needs them.
    """

    model: Trainable
    objective: Objective
    regularizers: Mapping[str, tuple[float, Regularizer]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    options: FinetuneOptions
    generator: torch.Generator
    prior: OnlinePrior | None
    frozen_head: Head | None
    initial: Mapping[str, torch.Tensor]
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        self._needs = frozenset().union(*(term.needs for _, term in self.regularizers.values()))
        separable = [term.separable for _, term in self.regularizers.values()]
        self._separable = self.objective.separable and all(separable)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def update(self, batch: TrainingBatch, rate: float) -> Update:
        """Train on one batch."""
        torch.manual_seed(_seed(self.options.seed, batch.step))  # a resumed run draws the same numbers
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.parts(self.options.accumulate)
        if len(parts) == 1 or self._separable:
            terms = self._add_up(parts, len(batch))
        else:
            terms = self._through_features(batch, parts)
        average_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clip_logit_scale()
        if self.teacher is not None:
            self.teacher.follow(self.model.trained(), batch.step)
        return Update(terms, norm, rate)

    def terms(
        self,
        features: torch.Tensor,
        frozen: torch.Tensor | None,
        batch: TrainingBatch,
        taught: torch.Tensor | None = None,
    ) -> Tensors:
        """The objective and each regulariser, with their weights, for the features (N, D) of a batch."""
        objective, logits = self.objective(features, batch)
        step = Step(
            features=features,
            frozen_features=frozen,
            logits=logits,
            frozen_logits=self.frozen_head(frozen) if self.frozen_head is not None and frozen is not None else None,
            parameters=self.parameters,
            initial_parameters=self.initial,
            teacher_logits=taught,
            paired=self.options.objective == "contrastive",
            projection=self.model.projection if "projection" in self._needs else None,
        )
        terms: Tensors = {self.options.objective: self.options.objective_weight * objective}
        for name, (weight, regularizer) in self.regularizers.items():
            self.generator.manual_seed(_seed(self.options.seed, batch.step))
            terms[name] = weight * regularizer(step)
        return terms

    def _frozen(self, batch: TrainingBatch) -> torch.Tensor | None:
        if self.prior is None or not self._needs & FROZEN:
            return None
        return self.prior.features(batch.rows, batch.epoch, batch.images)

    @torch.no_grad()
    def _taught(self, batch: TrainingBatch, parts: list[TrainingBatch]) -> torch.Tensor | None:
        """Logits of the teacher, whose weights replace the model's; so this comes before the model's forward pass."""
        if self.teacher is None:
            return None
        with self.model.evaluating(), self.model.holding(self.teacher.state_dict()):
            features = torch.cat([self.model.image_features(part.images) for part in parts])
            return self.objective.logits(features, batch)

    def _add_up(self, parts: list[TrainingBatch], rows: int) -> Tensors:
        """Forward and backward pass part by part, weighted by rows."""
        totals: Tensors = {}
        for part in parts:
            frozen, taught = self._frozen(part), self._taught(part, [part])
            terms = self.terms(self.model.image_features(part.images), frozen, part, taught)
            shares = {name: term * (len(part) / rows) for name, term in terms.items()}
            self.scaler.scale(_sum(shares)).backward()  # type: ignore[no-untyped-call]
            totals = {name: totals.get(name, 0.0) + share.detach() for name, share in shares.items()}
        return totals

    def _through_features(self, batch: TrainingBatch, parts: list[TrainingBatch]) -> Tensors:
        """Backward pass from the loss of the whole batch to the features, then part by part into the tower."""
        frozen, taught = [self._frozen(part) for part in parts], self._taught(batch, parts)
        with torch.no_grad():
            values = torch.cat([self.model.image_features(part.images) for part in parts])
        features = values.requires_grad_()
        known = [rows for rows in frozen if rows is not None]
        terms = self.terms(features, torch.cat(known) if known else None, batch, taught)
        self.scaler.scale(_sum(terms)).backward()  # type: ignore[no-untyped-call]
        gradients = features.grad if features.grad is not None else torch.zeros_like(features)
        for part, gradient in zip(parts, torch.split(gradients, [len(part) for part in parts]), strict=True):
            again = self.model.image_features(part.images)
            if again.requires_grad:  # the tower may be frozen
                again.backward(gradient)  # type: ignore[no-untyped-call]
        return {name: term.detach() for name, term in terms.items()}

    def _clip(self) -> torch.Tensor:
        """Clip the gradient to a norm of `clip`, and return its norm before that."""
        if self.options.clip is not None:
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(math.nan)


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _sum(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([term.float() for term in terms.values()]).sum()
