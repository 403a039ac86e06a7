"""Lipsum-FT's ``.ckpt`` files: Flax's msgpack, read without pickle and without Flax.

A file is one msgpack map. Every array in it is an extension of type 1 (a NumPy scalar of type 3) that holds msgpack of
``[shape, dtype name, bytes in C order]``. ``best_acc.ckpt`` is ``{cls (D, C), ext {vision_model {...},
visual_projection (W, D), logit_scale ()}}`` in the layout of `transformers.FlaxCLIPVisionModel`: kernels of linear
layers are (in, out), those of convolutions (height, width, in, out), scales of layer norms are called ``scale``. The
frozen text tower is not in the file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.errors import EncoderError, MissingExtraError
from ft.checkpoints.formats.huggingface import from_huggingface
from ft.checkpoints.state import Json

ARRAY, SCALAR = 1, 3


class LipsumCheckpoint(NamedTuple):
    """The trained part of Lipsum-FT's model."""

    state: dict[str, torch.Tensor]
    """Image tower, projection and logit scale, under open_clip's names."""
    head: torch.Tensor | None
    """``cls`` transposed to (C, D), without the logit scale."""


def is_flax(file: Path) -> bool:
    """Whether a file may be Flax's: a msgpack map by its first byte, not a zip archive."""
    if file.suffix not in (".ckpt", ".msgpack"):
        return False
    with file.open("rb") as stream:
        first = stream.read(1)
    return bool(first) and (first[0] & 0xF0 == 0x80 or first[0] in (0xDE, 0xDF))


def read_flax(path: str | Path) -> Json:
    """The nested map of arrays in a Flax msgpack file, as CPU tensors.

    Raises
    ------
    EncoderError
        The file is damaged, or holds values other than arrays and numbers.
    MissingExtraError
        msgpack is not installed.
    """
    try:
        import msgpack
    except ImportError as error:
        raise MissingExtraError("msgpack is not installed; pip install 'featcache[finetune]'") from error
    try:
        content = msgpack.unpackb(Path(path).read_bytes(), ext_hook=_array, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise EncoderError(f"{path}: not Flax's msgpack ({error}); give a file that Lipsum-FT saved") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path}: holds {type(content).__name__}, expected a map of arrays")
    return content


def _array(code: int, payload: bytes) -> torch.Tensor:
    import msgpack

    if code not in (ARRAY, SCALAR):
        raise ValueError(f"extension type {code}, expected an array (type {ARRAY})")
    shape, name, content = msgpack.unpackb(payload, raw=False)
    if name == "bfloat16":  # NumPy has no such type
        return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(tuple(shape))
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"array of {name}, expected numbers")
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(tuple(shape)).copy())


def read_lipsum(path: str | Path) -> LipsumCheckpoint:
    """Image tower and head of a ``best_acc.ckpt``, or of an ``ext`` map alone.

    Raises
    ------
    EncoderError
        The file has another layout.
    """
    content = read_flax(path)
    extractor = content.get("ext", content)
    if not isinstance(extractor, Mapping) or "vision_model" not in extractor:
        raise EncoderError(f"{path}: no vision_model in it ({', '.join(map(str, content))}); give a best_acc.ckpt")
    named = dict(_flatten(extractor))
    projection = named.pop("visual_projection.weight", None)
    if projection is None:  # a bare matrix (in, out), as open_clip keeps it
        projection = named.pop("visual_projection").T
    state = from_huggingface({**named, "visual_projection.weight": projection})
    head = content.get("cls")
    return LipsumCheckpoint(
        {key: value.contiguous() for key, value in state.items()}, None if head is None else head.T.contiguous()
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The arrays under the names and in the layout of torch's layers."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif key == "kernel":
            weight = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
            yield f"{prefix}weight", weight
        elif key in ("scale", "embedding"):
            yield f"{prefix}weight", value
        else:
            yield name, value.reshape(-1) if key == "class_embedding" else value
