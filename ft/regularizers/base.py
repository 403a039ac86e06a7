"""Base class of regularisers, their inputs in a training step, and what a run offers to build them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F

from featcache.encoding.banks import SecondMoment
from featcache.errors import TrainingError
from featcache.parameters import Parameter, parameters_of


@dataclass(frozen=True)
class Step:
    """Inputs of regularisers in a training step; only fields in `Regularizer.needs` are filled in.

    Parameters
    ----------
    features : (N, D), of the batch from the trained image tower, after its projection, not normalised
    frozen_features : (N, D), of the same augmented pixels from the initial tower
    logits, frozen_logits : (N, C), of the trained and of the initial model
    teacher_logits : (N, C), of a moving average of the trained model
    paired : whether logits are those of N pairs (N, N), so that columns are predictions too
    projection : (width, D), the final projection of the trained image tower
    parameters, initial_parameters : current and initial values of the trained parameters, by name
    """

    features: torch.Tensor | None = None
    frozen_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    frozen_logits: torch.Tensor | None = None
    parameters: Mapping[str, torch.Tensor] | None = None
    initial_parameters: Mapping[str, torch.Tensor] | None = None
    teacher_logits: torch.Tensor | None = None
    paired: bool = False
    projection: torch.Tensor | None = None

    def need(self, name: str) -> Any:
        """A field; TrainingError if it is missing."""
        if (value := vars(self)[name]) is None:
            raise TrainingError(f"the step has no {name}; this regulariser needs it")
        return value

    def pair(self, trained: str, frozen: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Two fields, the second without gradient, both in float32 or wider.

        Raises TrainingError if one of them is missing, or their shapes differ.
        """
        now, then = self.need(trained), self.need(frozen)
        if now.shape != then.shape:
            raise TrainingError(
                f"{trained} {tuple(now.shape)} and {frozen} {tuple(then.shape)} must have the same shape"
            )
        return wide(now), wide(then.detach())


class Setting(Protocol):
    """Parts of a run that `Regularizer.from_setting` may use."""

    logit_scale: float
    """s of the initial model, already exponentiated."""

    generator: torch.Generator
    """CPU generator, seeded in every step: the same in all processes and all parts of a batch."""

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """Token ids of the start and the end of a text, vocabulary size, context length."""

    def encode_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Text features (M, D) of the initial model for token ids (M, L), without gradients."""

    def bank(self, reference: str | int) -> torch.Tensor:
        """Features (K, D) of a stored bank of random texts."""

    def moment(self, reference: str | int) -> SecondMoment:
        """Second moment of a stored bank of random texts."""

    def contexts(self, templates: str | None) -> torch.Tensor:
        """Context features (T, D) of templates, by default those of the run."""


class Regularizer(ABC):
    """A term added to the objective; its weight (lambda) is applied by the training loop.

    Its parameters are the keyword arguments of `from_setting` if it defines that, else of its constructor. Call it
    outside autocast, which would compute products in half precision.
    """

    needs: ClassVar[frozenset[str]]
    """Fields of `Step` that it uses."""

    separable: ClassVar[bool]
    """Whether the term of a batch is the mean over its parts, weighted by rows."""

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """Parameters for recipes and the command line."""
        declared = parameters_of(cls.from_setting if "from_setting" in vars(cls) else cls)
        return {name: found for name, found in declared.items() if name != "setting"}

    @classmethod
    def from_setting(cls, setting: Setting, *args: Any, **parameters: Any) -> Self:
        """The regulariser of a run."""
        return cls(**parameters)

    @abstractmethod
    def __call__(self, step: Step) -> torch.Tensor:
        """The term, a scalar of float32 or wider."""


class Constant:
    """A tensor without gradient that caches its copy on another device or in another dtype."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = self._cast = values.detach()

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The values on the device and in the dtype of `other`."""
        if (self._cast.device, self._cast.dtype) != (other.device, other.dtype):
            self._cast = self._values.to(other)
        return self._cast


def wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32 or wider: at a logit scale of 100, half precision changes losses visibly."""
    return values.float() if values.itemsize < 4 else values


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) divided by their L2 norm, without an epsilon."""
    normalised: torch.Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return normalised


def kl_to_frozen(logits: torch.Tensor, frozen_logits: torch.Tensor) -> torch.Tensor:
    """Mean over rows of ``KL(softmax(frozen_logits) || softmax(logits))``, both (N, C), in nats."""
    return F.kl_div(logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="batchmean", log_target=True)
