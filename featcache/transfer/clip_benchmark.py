"""featcache's encoders as CLIP_benchmark models: ``(model, transform, tokenizer)``."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from featcache.datasets.base import Picture
from featcache.encoders import Encoder, load_encoder
from featcache.encoders.base import FloatArray


class ClipModel(torch.nn.Module):
    """An encoder with the methods that CLIP_benchmark calls; features are those of `featcache.encode`, in float32."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        scale = 1.0 if encoder.logit_scale is None else encoder.logit_scale
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(scale)), requires_grad=False)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of B images preprocessed by `ClipModel.transform`."""
        return self._placed(self.encoder.encode_images(list(images.cpu().numpy())), images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of token ids (B, L)."""
        return self._placed(self.encoder.encode_tokens(tokens.cpu()), tokens)

    def transform(self, picture: Picture) -> torch.Tensor:
        """One image with the encoder's preprocessing."""
        whole = picture.convert("RGB") if isinstance(picture, Image.Image) else picture
        return torch.from_numpy(self.encoder.prepare(whole))

    def _placed(self, features: FloatArray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(features).to(like.device)


def load_clip_benchmark(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | None = None
) -> tuple[ClipModel, Callable[[Picture], torch.Tensor], Callable[[Sequence[str]], torch.Tensor]]:
    """Load an encoder as CLIP_benchmark loads its models; errors are those of `featcache.load_encoder`.

    ``clip_benchmark.models.TYPE2FUNC["featcache"] = load_clip_benchmark`` enables ``--model_type featcache``. An empty
    `pretrained` means None; `cache_dir` is not used, since weights are in the hub's cache.

    Returns
    -------
    (model, transform, tokenizer)
        `ClipModel`; from a PIL image to a tensor; from texts to token ids (B, L).
    """
    model = ClipModel(load_encoder(model_name, pretrained or None, device=None if device is None else str(device)))
    return model, model.transform, model.encoder.tokenize
