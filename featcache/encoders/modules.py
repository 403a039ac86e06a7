"""A torch module with a transform as an image encoder.

It is identified by a digest of weights and buffers, the module's ``repr``, a digest of the source of its own classes,
and the ``repr`` of the transform, with functions described by module, name and source. If only a memory address would
tell two transforms apart (lambdas, functions of a script, objects without a ``repr``), `digest` must identify them.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from types import FunctionType
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders.base import PROJECTED, Batch, ImageEncoder
from featcache.encoders.checkpoints import state_digest
from featcache.encoders.torch_images import TorchImages, default_device, torch_provenance
from featcache.errors import EncoderError
from featcache.store.key import Json

ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
LOOKS = 8
"""Times that an image is transformed, to detect random steps."""
LIBRARIES = frozenset({"torch", "torchvision", "timm", "open_clip", "transformers"})
"""Libraries whose classes are identified by name, so that an update keeps the stores."""
HIDES = ("Lambda",)
"""Transforms whose ``repr`` does not show what they do."""

Transform: TypeAlias = Callable[[Image.Image], object]


class ModuleEncoder(TorchImages, ImageEncoder):
    """A torch module and its transform; it has no text side.

    Parameters
    ----------
    module : ``module(pixels (B, 3, H, W)) -> features (B, D)``, or a CLIP model with ``encode_image``. It is copied,
        in evaluation mode: later training does not affect the encoder.
    transform : ``transform(picture) -> tensor (3, H, W)`` from a PIL image in RGB, such as torchvision's; must be
        deterministic, and is called in several threads
    digest : identifies the transform and the module's code if their ``repr`` does not
    name : default: the name of the module's class
    device : default: the device of the module's weights
    precision : ``fp32``, ``bf16`` or ``fp16``, of weights and products

    Raises
    ------
    EncoderError
        There is no transform, it is random, or only a memory address tells it from others.

    Examples
    --------
    >>> flat = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> encoder = ModuleEncoder(flat, lambda picture: torch.full((3, 4, 4), 0.5), digest="grey", name="mean")
    >>> encoder.dim, encoder.encode_images([encoder.prepare(np.zeros((8, 8, 3), np.uint8))])
    (3, array([[0.5, 0.5, 0.5]], dtype=float32))
    """

    def __init__(
        self,
        module: torch.nn.Module,
        transform: Transform | None = None,
        *,
        digest: str | None = None,
        name: str | None = None,
        device: str | None = None,
        precision: str = "fp32",
    ) -> None:
        shown = name or type(module).__name__
        if transform is None:
            raise EncoderError(
                f"{shown}: a module needs transform=, from a PIL image to its input (3, H, W), such as torchvision's "
                "transforms"
            )
        weights = next(iter([*module.parameters(), *module.buffers()]), None)
        here = "cpu" if weights is None else str(weights.device)
        self._transform: Transform = transform
        described = [] if digest else [repr(module), describe(transform)]
        for text in described:
            if found := ADDRESS.search(text):
                near = " ".join(text[max(0, found.start() - 40) : found.end()].split())
                raise EncoderError(
                    f"{shown}: '... {near}' is a memory address, which does not identify what is computed; give "
                    "digest=, a string that changes whenever the transform or the module does"
                )
        self._described = digest or [*described, _code(module)]
        super().__init__(copy.deepcopy(module).float(), shown, default_device(device or here), precision)
        self._weights = state_digest(self.model)
        self._check_steady()

    @cached_property
    def dim(self) -> int:
        """D, the width of the features, measured on a black image."""
        return int(self.encode_images([self.prepare(np.zeros((256, 256, 3), np.uint8))]).shape[1])

    @property
    def image_identity(self) -> Json:
        """Weights, class, description of module and transform, precision."""
        kind = type(self.model)
        return {
            "library": "torch",
            "tower": "image",
            "architecture": f"{kind.__module__}.{kind.__qualname__}",
            "weights": self._weights,
            "described": self._described,
            "precision": self._computed_in,
        }

    @property
    def provenance(self) -> Json:
        """Versions and settings that may change the last digits."""
        return torch_provenance(self.device) | {"transform": repr(self._transform)}

    def prepare(self, picture: Picture) -> Batch:
        """The transformed picture, (3, H, W) float32."""
        rgb = to_rgb(picture)
        if isinstance(rgb, np.ndarray):
            rgb = Image.fromarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
        found = self._transform(rgb)
        values = found.numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        if not isinstance(found, torch.Tensor | np.ndarray) or values.ndim != 3:
            raise EncoderError(
                f"{self.name}: the transform gave {type(found).__name__} {values.shape}; expected (3, H, W)"
            )
        return np.ascontiguousarray(values, np.float32)

    def _check_steady(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        first, *others = (self.prepare(pixels) for _ in range(LOOKS))
        if any(not np.array_equal(first, other) for other in others):
            raise EncoderError(
                f"{self.name}: the transform gives different results for the same picture; use the one for "
                "evaluation, without random steps"
            )

    def forward(self, images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features (B, D) of B prepared images (3, H, W) on the device."""
        # Of a CLIP model, the features of the image side.
        found = self._computing(lambda m, x: m.encode_image(x) if hasattr(m, "encode_image") else m(x), images)
        if not isinstance(found, torch.Tensor) or found.ndim != 2:
            shown = f"a tensor {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise EncoderError(
                f"{self.name} returned {shown}; expected features (B, D): wrap it in a module that does so"
            )
        return {PROJECTED: found}


def describe(transform: object) -> str:
    """A description of a transform, without memory addresses if possible.

    >>> describe(functools.partial(round, ndigits=2))
    "partial(<built-in function round>, (), {'ndigits': 2})"
    """
    if isinstance(transform, functools.partial):
        return f"partial({describe(transform.func)}, {transform.args}, {transform.keywords})"
    if isinstance(transform, FunctionType):
        return _of_function(transform)
    if isinstance(steps := getattr(transform, "transforms", None), list | tuple):
        return f"{type(transform).__name__}({', '.join(map(describe, steps))})"
    return f"{transform!r} at 0x0" if type(transform).__name__ in HIDES else repr(transform)


def _of_function(function: FunctionType) -> str:
    """Module, name and digest of the source of an importable function; else its ``repr``."""
    module = sys.modules.get(function.__module__)
    if function.__module__ == "__main__" or vars(module or object).get(function.__qualname__) is not function:
        return repr(function)
    try:
        source = inspect.getsource(function)
    except OSError:
        return repr(function)
    return f"{function.__module__}.{function.__qualname__} {hashlib.sha256(source.encode()).hexdigest()[:32]}"


def _code(module: torch.nn.Module) -> str:
    """Digest of the source of a module's classes, without those of `LIBRARIES` and those without source."""
    kinds = {type(part) for part in module.modules()}
    digest = hashlib.sha256()
    for kind in sorted(kinds, key=lambda one: (one.__module__, one.__qualname__)):
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            with contextlib.suppress(OSError, TypeError):
                digest.update(f"{kind.__qualname__}\n{inspect.getsource(kind)}".encode())
    return digest.hexdigest()[:32]
