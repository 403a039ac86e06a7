"""The open_clip encoder.

Worker threads resize and crop images with open_clip's own transforms; each batch is scaled and normalised on the
device, with the same float32 operations.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision
import torchvision.transforms.v2
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from featcache.datasets.base import Picture
from featcache.encoders.base import PROJECTED, Batch, FloatArray, SpecialTokens, TokenShape
from featcache.encoders.checkpoints import tower_digest
from featcache.encoders.device_pictures import OnDevice
from featcache.encoders.openclip.texts import encode_sorted, encode_text, needed_length
from featcache.encoders.preparation import PREPARATIONS
from featcache.encoders.taps import PRE_PROJECTION
from featcache.encoders.token_outputs import LAST, token_shapes, with_tokens
from featcache.encoders.torch_images import Scaling, TorchImages, autocast, prepare_picture, torch_provenance
from featcache.errors import EncoderError, PromptError
from featcache.store.key import Json, checksum


def pre_projection_dim(model: Any) -> int | None:
    """Width before the last projection; None without one (attention pooling of ResNets, towers that return tokens)."""
    visual = model.visual
    if isinstance(visual, VisionTransformer) and not visual.output_tokens:
        return None if visual.proj is None else int(visual.proj.shape[0])
    if isinstance(visual, TimmModel) and [name for name, _ in visual.head.named_children()] in (["drop", "proj"],):
        return int(visual.head.proj.in_features)
    return None


def outputs_of(model: Any, pixels: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
    """Features (B, D) and the given taps of an image tower from one pass, computed exactly as by the tower."""
    visual = model.visual

    def compute() -> dict[str, torch.Tensor]:
        if isinstance(visual, TimmModel):
            last = visual.trunk.forward_features(pixels)
            before = visual.trunk.forward_head(last)
            return {LAST: last, PRE_PROJECTION: before, PROJECTED: visual.head(before)}
        if pre_projection_dim(model) is None:
            return {PROJECTED: model.encode_image(pixels)}
        trunk = copy.copy(visual)  # shares every tensor, and leaves the original intact
        trunk._parameters = {**visual._parameters, "proj": None}
        before = trunk(pixels)
        return {PRE_PROJECTION: before, PROJECTED: before @ visual.proj}

    return with_tokens(visual, compute, [name for name in taps if name != PRE_PROJECTION])


class OpenClipEncoder(TorchImages):
    """An open_clip model with both towers: CLIP, CustomTextCLIP or CoCa, in float32.

    `config` is its model configuration (``vision_cfg``, ``text_cfg``, ...). `model` stays in float32 for fine-tuning.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Json,
        tokenizer: Any,
        name: str,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        super().__init__(model, name, device, precision)
        self._config, self._tokenizer = dict(config), tokenizer
        self._preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr,arg-type]
        transforms = open_clip.transform.image_transform_v2(self._preprocess, is_train=False).transforms
        self._geometry = torchvision.transforms.Compose(transforms[:-3])  # without RGB, ToTensor, Normalize
        self._geometry_of_tensors = torchvision.transforms.Compose([_in_8_bits(step) for step in transforms[:-3]])
        self._scaling = Scaling(self._preprocess.mean, self._preprocess.std, device)
        self.preparation: str | None = None
        self.prepares = True
        self.source: Mapping[str, str | None] | None = None
        self.rehash()

    def rehash(self) -> None:
        """Compute the digests of the towers again, after training has changed them in place."""
        self._computes = None
        self._image_weights, self.text_digest = (tower_digest(self.model, image=image) for image in (True, False))

    @cached_property
    def dim(self) -> int:
        """D, the width of the shared embedding."""
        return int(self._config["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """Exponential of the model's parameter, the factor of cosine similarities."""
        return float(self.model.logit_scale.detach().double().exp())

    @property
    def logit_bias(self) -> float | None:
        """The model's logit bias (SigLIP), None if it has none."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of prepared images."""
        size = self._preprocess.size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def use_preparation(self, name: str) -> None:
        """See `featcache.encoders.preparation.prepared_by`."""
        if len(set(self.image_size)) > 1 and PREPARATIONS[name].square:
            raise EncoderError(
                f"preprocess {name}: {self.name} takes {self.image_size}, which is not a square; leave it out"
            )
        self.preparation, self.name = name, f"{self.name}/{name}"

    def configuration(self) -> Json:
        """The content of ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``."""
        return {"model_cfg": self._config, "preprocess_cfg": _jsonable(asdict(self._preprocess))}

    @property
    def special_tokens(self) -> SpecialTokens:
        """See `Encoder.special_tokens`; EncoderError for Hugging Face tokenizers that pool elsewhere."""
        ids = [getattr(self._tokenizer, name, None) for name in ("sot_token_id", "eot_token_id", "vocab_size")]
        if None in ids:
            raise EncoderError(f"{self.name}: its tokenizer has no start and end of text; random texts need CLIP's own")
        sot, eot, size = (int(number) for number in ids if number is not None)
        return SpecialTokens(sot, eot, size, int(self._tokenizer.context_length))

    @property
    def image_identity(self) -> Json:
        """Architecture and weights of the image tower, activation, preprocessing, precision."""
        other = {} if self.preparation is None else {"preparation": self.preparation}
        preprocess = _jsonable(asdict(self._preprocess)) | other
        return self._identity("image", "vision_cfg", self._image_weights) | {"preprocess": preprocess}

    @property
    def text_identity(self) -> Json:
        """Architecture and weights of the text tower (logit scale and bias included), tokenizer, context length."""
        return self._identity("text", "text_cfg", self.text_digest) | {"tokenizer": self._tokenizer_identity}

    def _identity(self, tower: str, config: str, weights: str) -> Json:
        return {
            "library": "open_clip",
            "tower": tower,
            "architecture": self._config[config],
            "embed_dim": self.dim,
            "activation": "quick_gelu" if self._config.get("quick_gelu", False) else "gelu",
            "weights": weights,
            "precision": self._computed_in,
        }

    @cached_property
    def _tokenizer_identity(self) -> Json:
        vocabulary = getattr(self._tokenizer, "encoder", None) or self._tokenizer.tokenizer.get_vocab()
        listing = "\n".join(sorted(f"{token} {number}" for token, number in vocabulary.items()))
        return {
            "type": type(self._tokenizer).__name__,
            "vocabulary": checksum(listing.encode()),
            "context_length": int(self._tokenizer.context_length),
        }

    @property
    def provenance(self) -> Json:
        """Versions and settings that may change the last digits."""
        versions = {"open_clip": open_clip.__version__, "torchvision": torchvision.__version__}
        return versions | torch_provenance(self.device)

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one picture as open_clip does, after `preparation`; see `prepare_picture`."""
        changed = PREPARATIONS[self.preparation].change(picture) if self.preparation and self.prepares else picture
        if isinstance(changed, torch.Tensor):
            on_gpu = self.preparation is not None and PREPARATIONS[self.preparation].on_gpu
            geometry = OnDevice(self._geometry_of_tensors, self.device) if on_gpu else self._geometry_of_tensors
            return prepare_picture(geometry, changed)
        return prepare_picture(self._geometry, changed)

    def forward(self, images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """See `TorchImages.forward`."""
        pixels = self.pixels(images)
        if not taps:
            return {PROJECTED: self._computing(lambda model, x: model.encode_image(x), pixels)}
        found = self._computing(lambda model, x: outputs_of(model, x, taps), pixels)
        return {name: found[name] for name in (PROJECTED, *taps)}

    @cached_property
    def taps(self) -> dict[str, int]:
        """``pre_projection`` and its width, if the image tower ends in a projection (vision transformers)."""
        width = pre_projection_dim(self.model)
        return {} if width is None else {PRE_PROJECTION: width}

    @property
    def visual_projection(self) -> FloatArray | None:
        """See `Encoder.visual_projection`."""
        if pre_projection_dim(self.model) is None:
            return None
        visual = self.model.visual
        layer = visual.head.proj if isinstance(visual, TimmModel) else None
        if layer is not None and layer.bias is not None:
            return None
        matrix = visual.proj if layer is None else layer.weight.T
        found: FloatArray = matrix.detach().float().cpu().numpy()
        return found

    @cached_property
    def token_taps(self) -> Mapping[str, TokenShape]:
        """See `Encoder.token_taps`; a blank image is encoded to count the tokens."""
        blank = np.zeros((*self.image_size, 3), np.uint8)
        return token_shapes(self.model.visual, lambda taps: self.encode_outputs([blank], taps))

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Input of the image tower, (B, 3, H, W) float32, from prepared images (B, H, W, 3) on the device."""
        return self._scaling(images)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B texts.

        PromptError if a text is longer than the context length; open_clip would truncate it silently.
        """
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        return encode_sorted(texts, self.tokenize, self.encode_tokens)

    def encode_tokens(self, ids: torch.Tensor) -> FloatArray:
        """Features (B, D) float32, not normalised, of B token sequences (B, L) on any device."""
        ids = ids[:, : needed_length(self.model, ids)].to(self.device)
        features: FloatArray = self._computing(encode_text, ids).float().cpu().numpy()
        return features

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (B, L) int64 of B texts, on the CPU; raises PromptError as `encode_texts` does."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        limit = int(self._tokenizer.context_length)
        for text, last in zip(texts, tokens[:, -1].tolist(), strict=True):
            if self._pads_with_zeros and last == 0:
                continue  # ends in padding: nothing was truncated
            if (count := self._count(text)) > limit:
                raise PromptError(f"text of {count} tokens, {self.name} takes at most {limit}: {text!r}; shorten it")
        return tokens

    @property
    def _pads_with_zeros(self) -> bool:
        """Whether the tokenizer is open_clip's own."""
        return hasattr(self._tokenizer, "encode")

    def _count(self, text: str) -> int:
        """Number of tokens of a text, start and end included."""
        if self._pads_with_zeros:
            return len(self._tokenizer.encode(text)) + 2
        clean = getattr(self._tokenizer, "clean_fn", str)  # of Hugging Face tokenizers, such as SigLIP's
        return len(self._tokenizer.tokenizer(clean(text))["input_ids"])

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which a float32 model computes in `precision`, for fine-tuning."""
        return autocast(self.device, self.precision)


def _in_8_bits(step: Any) -> Any:
    """The step with Resize replaced by that of transforms.v2, which resizes 8-bit tensors in 8 bits, not float32."""
    if type(step) is not torchvision.transforms.Resize:
        return step
    mode = torchvision.transforms.v2.InterpolationMode(step.interpolation.value)
    return torchvision.transforms.v2.Resize(step.size, mode, max_size=step.max_size, antialias=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
