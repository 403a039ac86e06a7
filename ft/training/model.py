"""The trained module: a CLIP model and, for cross entropy, a head on its image features."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import TrainingError
from ft.checkpoints.state import State
from ft.objectives.head import Head
from ft.regularizers.base import wide
from ft.training.layers import depths
from ft.training.lora import adapt, is_factor
from ft.training.options import FinetuneOptions

PROJECTIONS = (("proj", True), ("head.proj.weight", False), ("attnpool.c_proj.weight", False))
"""Final projections of open_clip's image towers, and whether they are stored as (inputs, outputs)."""

Encode: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Trainable(nn.Module):
    """Both towers of an encoder, trained in place, and a head; only the parts being trained require gradients."""

    def __init__(self, encoder: OpenClipEncoder, head: Head | None, options: FinetuneOptions) -> None:
        super().__init__()
        self.encoder, self._options = encoder, options
        self.clip: nn.Module = encoder.model
        self.head = None if head is None else head.to(encoder.device)
        self._largest_scale = max(math.log(100.0), float(encoder.model.logit_scale.detach()))
        if options.lora_rank:
            scale = (options.lora_alpha or options.lora_rank) / options.lora_rank
            adapt(encoder.model, options.lora_towers, options.lora_targets, options.lora_rank, scale, options.seed)
        self._choose_trained(options)
        if options.checkpoint_activations:
            encoder.model.set_grad_checkpointing(True)
        self.eval()  # no dropout; batch normalisation uses running statistics
        if options.batch_norm:
            for module in encoder.model.visual.modules():
                trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                module.training = trained and "BatchNorm" in type(module).__name__
        self._encode_image = self._compiled(encoder.model)

    def _choose_trained(self, options: FinetuneOptions) -> None:
        layers = self.layers("image")
        if options.freeze_layers >= max(layers.values()):
            raise TrainingError(
                f"freeze_layers {options.freeze_layers}: the image tower has {max(layers.values()) - 1} blocks; "
                "to train the head alone, give --train head"
            )
        for name, parameter in self.named_parameters():
            part = part_of(name)
            frozen = options.freeze_layers and part == "image" and layers[name] <= options.freeze_layers
            kept = part in options.lora_towers and not is_factor(name)
            parameter.requires_grad_(part in options.train and not frozen and not kept)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise TrainingError(f"nothing to train: {', '.join(options.train)} without {options.head!r}")

    def _compiled(self, model: Any) -> Encode:
        encode: Encode = model.encode_image
        return torch.compile(encode) if self._options.compile else encode

    def layers(self, part: str) -> dict[str, int]:
        """Layer of each parameter of a part; see `ft.training.layers.depths`."""
        return depths(name for name, _ in self.named_parameters() if part_of(name) == part)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) float32, not normalised, of prepared images (B, H, W, 3)."""
        with self.encoder.autocast():
            return wide(self._encode_image(self.encoder.pixels(images)))

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (M, D) float32, not normalised, of token ids (M, L)."""
        with self.encoder.autocast():
            return wide(self.encoder.model.encode_text(tokens))

    @property
    def projection(self) -> torch.Tensor:
        """The final projection (width, D) of the image tower; TrainingError if the tower has none."""
        for name, inputs_first in PROJECTIONS:
            found: torch.Tensor | None = dict(self.encoder.model.visual.named_parameters()).get(name)
            if found is not None:
                return found if inputs_first else found.T
        raise TrainingError("orthogonality: this image tower does not end in a projection; leave the regulariser out")

    @property
    def logit_scale(self) -> torch.Tensor:
        """Scalar, exponentiated."""
        scale: torch.Tensor = self.encoder.model.logit_scale.exp()
        return scale

    @torch.no_grad()
    def clip_logit_scale(self) -> None:
        """Clip a trained logit scale to 100, or to its initial value if larger, as in CLIP's training."""
        parameter: torch.Tensor = self.encoder.model.logit_scale
        if parameter.requires_grad:
            parameter.clamp_(max=self._largest_scale)

    def frozen(self) -> "Frozen":
        """A frozen copy of the current model; parameters that are not trained are shared."""
        shared = {id(value): value for value in self.parameters() if not value.requires_grad}
        model, head = copy.deepcopy((self.encoder.model, self.head), shared)
        model.eval()  # features of an image must not depend on the rest of its batch
        return Frozen(self.encoder, model, self._compiled(model), head)

    def trained(self) -> dict[str, torch.Tensor]:
        """All values that training changes: trained parameters, and the running statistics of batch normalisation."""
        values: dict[str, torch.Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        if self._options.batch_norm:
            values |= {n: b for n, b in self.named_buffers() if part_of(n) == "image"}
        return {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def take(self, state: State) -> None:
        """Overwrite the values of `trained`."""
        for name, value in self.trained().items():
            value.copy_(state[name])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use the running statistics of batch normalisation inside the block, as the saved model will."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def holding(self, state: State | None) -> Iterator[None]:
        """Replace the trained values inside the block, as by their average; None keeps them."""
        if state is None:
            yield
            return
        own = {name: value.clone() for name, value in self.trained().items()}
        try:
            self.take(state)
            yield
        finally:
            self.take(own)


@dataclass(frozen=True)
class Frozen:
    """The initial model, without gradients."""

    encoder: OpenClipEncoder
    model: Any
    encode_image: Encode
    head: Head | None

    @torch.no_grad()
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) float32, not normalised, of prepared images (B, H, W, 3)."""
        with self.encoder.autocast():
            return wide(self.encode_image(self.encoder.pixels(images)))

    @torch.no_grad()
    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (M, D) float32, not normalised, of token ids (M, L) on any device."""
        with self.encoder.autocast():
            return wide(self.model.encode_text(tokens.to(self.encoder.device)))


def part_of(name: str) -> str:
    """Part of the model that a parameter is in: ``image``, ``text``, ``head`` or ``logit_scale``.

    >>> part_of("clip.visual.proj"), part_of("clip.logit_scale"), part_of("head.weight"), part_of("clip.ln_final.bias")
    ('image', 'logit_scale', 'head', 'text')
    """
    if name.startswith("head."):
        return "head"
    if name.startswith("clip.visual."):
        return "image"
    return "logit_scale" if name in ("clip.logit_scale", "clip.logit_bias") else "text"
