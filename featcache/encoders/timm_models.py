"""timm's image models, such as DINOv2, for probes; the only module that imports timm's models.

``timm:NAME`` is a timm model, such as ``timm:vit_small_patch14_dinov2.lvd142m``. Its features are those before the
classifier (``forward_head(..., pre_logits=True)``); images are resized and cropped by its data configuration.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from featcache.datasets.base import Picture
from featcache.datasets.hub import offline_where_unreachable
from featcache.encoders.base import PROJECTED, Batch, Encoder, ImageEncoder, TokenShape
from featcache.encoders.checkpoints import state_digest
from featcache.encoders.published import TIMM_REMEDY
from featcache.encoders.token_outputs import LAST, token_shapes, with_tokens
from featcache.encoders.torch_images import Scaling, TorchImages, default_device, prepare_picture, torch_provenance
from featcache.errors import EncoderError
from featcache.store.key import Json

RANDOM = "random"
NOT_GEOMETRY = ("MaybeToTensor", "Normalize")


class TimmEncoder(TorchImages, ImageEncoder):
    """A timm image model without its classifier (``num_classes=0``); it has no text side."""

    def __init__(self, model: torch.nn.Module, name: str, device: str = "cpu", precision: str = "fp32") -> None:
        super().__init__(model, name, device, precision)
        self._weights = state_digest(model)
        self._data: Json = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        steps = create_transform(**self._data, is_training=False).transforms
        self._geometry = torchvision.transforms.Compose([s for s in steps if type(s).__name__ not in NOT_GEOMETRY])
        self._scaling = Scaling(self._data["mean"], self._data["std"], device)

    @cached_property
    def dim(self) -> int:
        """D, the width of the features before the classifier."""
        return int(self.encode_images([np.zeros((*self._data["input_size"][1:], 3), np.uint8)]).shape[1])

    @property
    def image_identity(self) -> Json:
        """Architecture and weights, feature tap, preprocessing, precision."""
        return {
            "library": "timm",
            "tower": "image",
            "architecture": str(self.model.pretrained_cfg.get("architecture") or type(self.model).__name__),
            "weights": self._weights,
            "tap": "pre_logits",
            "preprocess": {key: list(v) if isinstance(v, tuple) else v for key, v in sorted(self._data.items())},
            "precision": self._computed_in,
        }

    @property
    def provenance(self) -> Json:
        """Versions and settings that may change the last digits."""
        return {"timm": timm.__version__, "torchvision": torchvision.__version__} | torch_provenance(self.device)

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one picture by the model's data configuration; see `prepare_picture`."""
        return prepare_picture(self._geometry, picture)

    def forward(self, images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """See `TorchImages.forward`."""

        def outputs(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
            def compute() -> dict[str, torch.Tensor]:
                last = model.forward_features(x)
                return {LAST: last, PROJECTED: model.forward_head(last, pre_logits=True)}

            return with_tokens(model, compute, taps)

        found = self._computing(outputs, self._scaling(images))
        return {name: found[name] for name in (PROJECTED, *taps)}

    @cached_property
    def token_taps(self) -> Mapping[str, TokenShape]:  # type: ignore[override]  # read-only here
        """See `Encoder.token_taps`; a blank image is encoded to count the tokens."""
        blank = np.zeros((*self._data["input_size"][1:], 3), np.uint8)
        return token_shapes(self.model, lambda taps: self.encode_outputs([blank], taps))


def load_timm(model: str, pretrained: str | None = None, device: str | None = None, precision: str = "fp32") -> Encoder:
    """Load ``timm:NAME`` or ``timm:NAME,CHECKPOINT``.

    NAME is one of ``timm.list_models()``, optionally with a pretrained tag, ``vit_base_patch16_224.dino``. `pretrained`
    is a checkpoint file, or ``random`` for seeded random weights (tests, benchmarks); default: the published weights.
    EncoderError if the model or its weights cannot be loaded.
    """
    name, comma, checkpoint = model.removeprefix("timm:").partition(",")
    weights = checkpoint if comma else pretrained
    if not timm.is_model(name):
        raise EncoderError(f"--model {model}: timm has no model {name!r}; timm.list_models() lists them")
    network = _create(name, weights)
    suffix = f"/{Path(weights).stem}" if weights else ""
    return TimmEncoder(network, name + suffix, default_device(device), precision)


def _create(name: str, weights: str | None) -> torch.nn.Module:
    if weights not in (None, RANDOM) and not Path(str(weights)).is_file():
        raise EncoderError(f"timm:{name}: no checkpoint file {weights}; expected a file, or `random`")
    hub = nullcontext() if weights is not None else offline_where_unreachable(f"timm:{name}", TIMM_REMEDY)
    try:
        with hub, torch.random.fork_rng(devices=[]):  # `random` is the same model every time
            torch.manual_seed(0)
            network: torch.nn.Module = timm.create_model(name, pretrained=weights is None, num_classes=0)
        if weights not in (None, RANDOM):
            _load_weights(network, Path(str(weights)), name)
    except EncoderError:
        raise
    except Exception as error:  # errors of timm, safetensors, the unpickler and the hub
        raise EncoderError(
            f"timm:{name} with weights {weights or 'as published'}: timm cannot load it ({error}); check the file, and "
            "that this machine reaches the model's host"
        ) from error
    return network


def _load_weights(network: torch.nn.Module, file: Path, name: str) -> None:
    """Load a safetensors or torch checkpoint with timm's tensor names; only the classifier may be left over."""
    state = timm.models.load_state_dict(str(file), weights_only=True)
    heads = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)} if prefixes else state
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        lacks, more = ", ".join(missing[:3]), ", ".join(unexpected[:3])
        raise EncoderError(
            f"timm:{name}: {file} lacks {len(missing)} tensors ({lacks}) and has {len(unexpected)} that the model does "
            f"not know ({more}); expected a checkpoint of {name} in timm's names"
        )
