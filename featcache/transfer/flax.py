"""Flax's msgpack files, read and written without pickle and without Flax; text stores in Lipsum-FT's layout.

A file is a tree of maps with arrays as leaves, or a single array. An array is a msgpack extension of type 1 (a NumPy
scalar: type 3) that contains ``[shape, dtype name, bytes in C order]`` as msgpack.
"""

from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch

from featcache.errors import EncoderError, FeatcacheError, needs
from featcache.store import TextStore
from featcache.store.key import Json
from featcache.store.places.targets import write_target

ARRAY, SCALAR = 1, 3
MAPS, EXTENSIONS = (0xDE, 0xDF), (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8)
SUFFIXES = (".ckpt", ".msgpack")

Tree: TypeAlias = Json | torch.Tensor
"""Nested maps of tensors, or one tensor."""


def is_flax(file: Path) -> bool:
    """Whether a file may be Flax's, by its suffix and a first byte that starts a msgpack map or array.

    ``0x80`` starts an empty map as well as a pickle, and is taken for a pickle.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        return False
    with file.open("rb") as stream:
        first = stream.read(1)
    return bool(first) and (0x81 <= first[0] <= 0x8F or first[0] in MAPS or first[0] in EXTENSIONS)


def read_flax(path: str | Path) -> Tree:
    """The arrays of a Flax msgpack file, as CPU tensors; EncoderError if it is damaged or contains other values."""
    msgpack = _msgpack()
    try:
        content = msgpack.unpackb(Path(path).read_bytes(), ext_hook=_array, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise EncoderError(f"{path}: not a Flax msgpack file ({error}); expected a file saved by Lipsum-FT") from error
    if not isinstance(content, dict | torch.Tensor):
        raise EncoderError(f"{path}: contains {type(content).__name__}, expected an array or a map of arrays")
    return content


def write_flax(tree: Json | torch.Tensor, path: str | Path) -> Path:
    """Write a tree of float tensors as `flax.serialization.to_bytes` does."""
    write_target(path, _msgpack().packb(tree, default=_packed))
    return Path(path)


def write_text_store(store: TextStore, path: str | Path) -> Path:
    """Write a text store as a head file of Lipsum-FT: ``cls`` (D, C), ``ctx`` (D, T) and ``raw`` (D, T, C), float32.

    The logit scale is not multiplied in. Stores made from prompt files have no ``ctx`` and are written as ``cls`` only.

    FeatcacheError for another suffix than ``.ckpt`` or ``.msgpack``.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise FeatcacheError(f"{path}: text stores are written as {' or '.join(SUFFIXES)}; name such a file")
    arrays = {"cls": store.cls}
    if store.ctx is not None:
        arrays |= {"ctx": store.ctx, "raw": store.raw}
    return write_flax({name: torch.from_numpy(np.ascontiguousarray(rows.T)) for name, rows in arrays.items()}, path)


def _msgpack() -> ModuleType:
    with needs("msgpack is not installed; pip install 'featcache[finetune]'"):
        import msgpack
    module: ModuleType = msgpack
    return module


def _array(code: int, payload: bytes) -> torch.Tensor:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"extension type {code}, expected an array (type {ARRAY})")
    shape, name, content = _msgpack().unpackb(payload, raw=False)
    if name == "bfloat16":  # NumPy has no such type
        return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(tuple(shape))
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"array of {name}, expected numbers")
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(tuple(shape)).copy())


def _packed(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__name__}, expected a tensor")
    array = value.detach().cpu().float().numpy()
    msgpack = _msgpack()
    return msgpack.ExtType(ARRAY, msgpack.packb((list(array.shape), array.dtype.name, array.tobytes())))
