"""The open_clip encoder: images and texts to features, with an identity for each tower.

Pictures are resized and cropped by open_clip's own transforms in
worker threads; scaling and normalising happen once a batch, on the device, with the same float32 operations.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
import torchvision
from PIL import Image

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders.base import Batch, FloatArray
from featcache.encoders.checkpoints import tower_digest
from featcache.errors import EncoderError, PromptError
from featcache.store.key import checksum

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_BATCH = 256


class OpenClipEncoder:
    """An open_clip model with both towers.

    Parameters
    ----------
    model : torch.nn.Module
        An open_clip CLIP, CustomTextCLIP or CoCa model in float32.
    config : dict
        Its model configuration (``vision_cfg``, ``text_cfg``, ...).
    tokenizer : callable
        Texts to token ids (B, L).
    name : str
        What people call it.
    device : str
    precision : {"fp32", "bf16", "fp16"}
        Type of the towers' products (autocast); weights and outputs are float32.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Mapping[str, Any],
        tokenizer: Any,
        name: str,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise EncoderError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
        self.name, self.device, self.precision = name, device, precision
        self._config, self._tokenizer = dict(config), tokenizer
        self._preprocess = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr,arg-type]
        transforms = open_clip.transform.image_transform_v2(self._preprocess, is_train=False).transforms
        self._geometry = torchvision.transforms.Compose(transforms[:-3])  # not: to RGB, to tensor, normalise
        self._mean = torch.tensor(self._preprocess.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(self._preprocess.std, device=device).view(1, 3, 1, 1)
        self.model: Any = model.to(device).eval()
        self.rehash()

    def rehash(self) -> None:
        """Take the identity of the weights as they are now: training changes them in place."""
        self._image_weights, self._text_digest = (tower_digest(self.model, image=image) for image in (True, False))

    @cached_property
    def dim(self) -> int:
        """D, the width of the shared embedding."""
        return int(self._config["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """Exponential of the model's parameter: the factor on cosine similarities."""
        return float(self.model.logit_scale.detach().double().exp())

    @property
    def logit_bias(self) -> float | None:
        """The model's logit bias (SigLIP), None where it has none."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of prepared images."""
        size = self._preprocess.size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def interpolation(self) -> str:
        """How pictures are resized: ``bicubic``, ``bilinear`` or ``random``."""
        return str(self._preprocess.interpolation)

    def configuration(self) -> dict[str, Any]:
        """What open_clip writes as ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``."""
        return {"model_cfg": self._config, "preprocess_cfg": _jsonable(asdict(self._preprocess))}

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """Token ids of the start and the end of a text, size of the vocabulary, tokens of a padded text.

        Raises
        ------
        EncoderError
            The tokenizer names none (Hugging Face tokenizers that pool elsewhere).
        """
        ids = [getattr(self._tokenizer, name, None) for name in ("sot_token_id", "eot_token_id", "vocab_size")]
        if None in ids:
            raise EncoderError(f"{self.name}: its tokenizer has no start and end of text; random texts need CLIP's own")
        sot, eot, size = (int(number) for number in ids if number is not None)
        return sot, eot, size, int(self._tokenizer.context_length)

    @property
    def image_identity(self) -> dict[str, Any]:
        """Architecture and weights of the image tower, activation, preprocessing, precision."""
        return {
            "library": "open_clip",
            "tower": "image",
            "architecture": self._config["vision_cfg"],
            "embed_dim": self.dim,
            "activation": self._activation,
            "weights": self._image_weights,
            "preprocess": _jsonable(asdict(self._preprocess)),
            "precision": self.precision,
        }

    @property
    def text_identity(self) -> dict[str, Any]:
        """Architecture and weights of the text tower (logit scale and bias included), tokenizer, context length."""
        return {
            "library": "open_clip",
            "tower": "text",
            "architecture": self._config["text_cfg"],
            "embed_dim": self.dim,
            "activation": self._activation,
            "weights": self._text_digest,
            "tokenizer": self._tokenizer_identity,
            "precision": self.precision,
        }

    @property
    def _activation(self) -> str:
        return "quick_gelu" if self._config.get("quick_gelu", False) else "gelu"

    @cached_property
    def _tokenizer_identity(self) -> dict[str, Any]:
        vocabulary = getattr(self._tokenizer, "encoder", None) or self._tokenizer.tokenizer.get_vocab()
        listing = "\n".join(sorted(f"{token} {number}" for token, number in vocabulary.items()))
        return {
            "type": type(self._tokenizer).__name__,
            "vocabulary": checksum(listing.encode()),
            "context_length": int(self._tokenizer.context_length),
        }

    @property
    def text_digest(self) -> str:
        """Digest of the text tower's tensors, logit scale and bias included."""
        return self._text_digest

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions and settings that may move the last digits."""
        return {
            "open_clip": open_clip.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one picture as open_clip does.

        PIL images and uint8 arrays go through Pillow and stay uint8; float arrays (H, W, 3) with values 0-255 are
        resized in float32 (bicubic with antialiasing; overshoot is kept) and never rounded.
        """
        if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
            tensor = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
            return np.ascontiguousarray(self._geometry(tensor).permute(1, 2, 0).numpy())
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else to_rgb(picture)
        return np.asarray(self._geometry(image))

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images (H, W, 3)."""
        batch = torch.from_numpy(np.stack(images)).to(self.device, non_blocking=True)
        with torch.inference_mode(), self.autocast():
            features: FloatArray = self.model.encode_image(self.pixels(batch)).float().cpu().numpy()
        return features

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """What the image tower takes, (B, 3, H, W) float32, of prepared images (B, H, W, 3) on the device."""
        return images.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self._mean).div_(self._std)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B texts.

        Raises
        ------
        PromptError
            A text is longer than the context length: open_clip would cut it silently.
        """
        batches = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
        features = [self.encode_tokens(self.tokenize(batch)) for batch in batches]
        return np.concatenate(features) if features else np.empty((0, self.dim), dtype=np.float32)

    def encode_tokens(self, ids: torch.Tensor) -> FloatArray:
        """Features (B, D) float32, not normalised, of B token sequences (B, L), which may lie on the CPU."""
        with torch.inference_mode(), self.autocast():
            features: FloatArray = self.model.encode_text(ids.to(self.device)).float().cpu().numpy()
        return features

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (B, L) int64 of B texts, on the CPU; raises PromptError as `encode_texts` does."""
        self._check_lengths(texts)
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def _check_lengths(self, texts: Sequence[str]) -> None:
        encode = getattr(self._tokenizer, "encode", None)
        if encode is None:
            return
        limit = int(self._tokenizer.context_length) - 2
        for text in texts:
            if len(encode(text)) > limit:
                raise PromptError(
                    f"text of {len(encode(text))} tokens, {self.name} takes {limit}: {text!r}; shorten it"
                )

    def autocast(self) -> AbstractContextManager[Any]:
        """The block in which the towers compute in `precision`."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.partition(":")[0], dtype=dtype)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
