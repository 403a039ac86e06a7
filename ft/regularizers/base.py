"""What a regulariser sees of a training step, and what it promises."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from featcache.errors import TrainingError


@dataclass(frozen=True)
class Step:
    """Everything a regulariser may read of one step; a training loop fills in what `Regularizer.needs` names.

    Parameters
    ----------
    features : (N, D), optional
        Output of the trained image tower for the batch, after its projection, not normalised.
    frozen_features : (N, D), optional
        The same batch (the same augmented pixels) through the initial tower.
    logits, frozen_logits : (N, C), optional
        Logits of the trained and of the initial model.
    parameters, initial_parameters : mappings of name -> tensor, optional
        Trained parameters now and at the start.
    """

    features: torch.Tensor | None = None
    frozen_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    frozen_logits: torch.Tensor | None = None
    parameters: Mapping[str, torch.Tensor] | None = None
    initial_parameters: Mapping[str, torch.Tensor] | None = None


class Regularizer(Protocol):
    """A term added to the objective; its weight (lambda) belongs to the training loop.

    Call it outside of autocast, which would take its products back to half precision.
    """

    needs: ClassVar[frozenset[str]]
    """Fields of `Step` that it reads."""

    zero_at_start: ClassVar[bool]
    """Whether value and gradient are zero while the model is still the initial one."""

    separable: ClassVar[bool]
    """Whether the term of a batch is the mean of those of its parts, weighted by their rows."""

    def __call__(self, step: Step) -> torch.Tensor:
        """The term, a scalar of float32 or wider."""


class Setting(Protocol):
    """What a run offers to regularisers that are made of more than numbers, through ``from_setting``."""

    logit_scale: float
    """s of the initial model, already exponentiated."""

    generator: torch.Generator
    """CPU generator, seeded anew by every step: alike on all processes and in all parts of a batch."""

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """Ids of start and end of a text, size of the vocabulary, context length."""

    def encode_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Text features (M, D) of the initial model for token ids (M, L), without gradients."""

    def bank(self, reference: Any) -> torch.Tensor:
        """Features (K, D) of a stored bank of random texts."""

    def moment(self, reference: Any) -> Any:
        """Second moment of a stored bank of random texts."""

    def contexts(self, templates: str | None) -> torch.Tensor:
        """Features (T, D) of the templates' contexts, by default those of the run."""


def build(kind: type[Regularizer], setting: Setting, parameters: Mapping[str, Any]) -> Regularizer:
    """A regulariser of a run: ``kind.from_setting(setting, **parameters)`` where it has that, else of its parameters.

    Raises
    ------
    TrainingError
        A parameter that it does not have.
    """
    try:
        make = getattr(kind, "from_setting", None)
        made: Regularizer = kind(**parameters) if make is None else make(setting, **parameters)
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
        raise TrainingError(f"regularizer {kind.__name__}: parameters {given} do not fit ({error})") from error
    return made


class Constant:
    """A tensor without gradient, copied to another device or dtype once and not at every step."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = self._cast = values.detach()

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The values on the device and in the dtype of `other`."""
        if (self._cast.device, self._cast.dtype) != (other.device, other.dtype):
            self._cast = self._values.to(other)
        return self._cast


def pair(step: Step, trained: str, frozen: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of a step, the second without gradient, both in float32 or wider.

    Raises
    ------
    TrainingError
        One of them is missing, or their shapes differ.
    """
    now, then = getattr(step, trained), getattr(step, frozen)
    if now is None or then is None:
        raise TrainingError(f"the step has no {trained if now is None else frozen}; this regulariser needs it")
    if now.shape != then.shape:
        raise TrainingError(f"{trained} {tuple(now.shape)} and {frozen} {tuple(then.shape)} must have one shape")
    return wide(now), wide(then.detach())


def wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32 or wider: at a logit scale of 100 half precision moves losses visibly."""
    return values.float() if values.itemsize < 4 else values


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) divided by their L2 norm, without an epsilon."""
    normalised: torch.Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return normalised


def kl_to_frozen(logits: torch.Tensor, frozen_logits: torch.Tensor) -> torch.Tensor:
    """Mean over rows of ``KL(softmax(frozen_logits) || softmax(logits))``, both (N, C), in nats."""
    return F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="batchmean", log_target=True)
