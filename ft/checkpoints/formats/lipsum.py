"""Lipsum-FT's ``.ckpt`` files.

=========================== ==========================================================================================
``best_acc.ckpt``           ``{cls (D, C), ext {vision_model {...}, visual_projection (W, D), logit_scale ()}}``: the
                            trained part, without the frozen text tower
``imagenet2012.ckpt``,      ``{cls (D, C), ctx (D, T), raw (D, T, C)}``: zero-shot heads, without the logit scale,
``domainnet.ckpt``          which is in ``../logit_scale.ckpt``
``logit_scale.ckpt``        a number, not exponentiated
``visual_projection.ckpt``, ``{kernel (in, out)}``; only the file name tells them apart
``text_projection.ckpt``
=========================== ==========================================================================================

The tower has the layout of `transformers.FlaxCLIPVisionModel`: kernels of linear layers are (in, out), those of
convolutions (height, width, in, out), scales of layer norms are called ``scale``.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from featcache.errors import EncoderError
from featcache.transfer.flax import is_flax, read_flax, write_flax
from ft.checkpoints.formats.huggingface import from_huggingface, to_huggingface
from ft.checkpoints.state import Json, State

SCALE, PROJECTION = "logit_scale", "visual_projection"
PROJECTIONS = {PROJECTION: "visual.proj", "text_projection": "text_projection"}
"""Name of the file -> open_clip's name of the matrix (in, out) in it."""


class LipsumCheckpoint(NamedTuple):
    """Content of a file of Lipsum-FT."""

    state: dict[str, torch.Tensor]
    """Tensors under open_clip's names: image tower, projections, logit scale; empty for a file of heads."""
    head: torch.Tensor | None
    """``cls`` transposed to (C, D), without the logit scale."""

    @property
    def has_tower(self) -> bool:
        """Whether it holds the image tower."""
        return "visual.conv1.weight" in self.state


def read_lipsum(path: str | Path) -> LipsumCheckpoint:
    """Read the tensors of a file of Lipsum-FT, or of a bare ``ext`` map.

    Raises EncoderError if the file has another layout.
    """
    content, stem = read_flax(path), Path(path).stem
    if isinstance(content, torch.Tensor):
        if content.numel() != 1:
            raise EncoderError(f"{path}: an array {tuple(content.shape)}; expected a logit scale, one number")
        return LipsumCheckpoint({SCALE: content.reshape(())}, None)
    extractor, cls = content.get("ext", content), content.get("cls")
    if isinstance(extractor, dict) and "vision_model" in extractor:
        return LipsumCheckpoint(_tower(extractor), None if cls is None else cls.T.contiguous())
    if isinstance(cls, torch.Tensor) and cls.ndim == 2:
        return LipsumCheckpoint({}, cls.T.contiguous())
    kernel = content.get("kernel")
    if isinstance(kernel, torch.Tensor) and stem in PROJECTIONS:
        return LipsumCheckpoint({PROJECTIONS[stem]: kernel}, None)
    held = ", ".join(map(str, content))
    raise EncoderError(
        f"{path}: no vision_model in it ({held}); give a best_acc.ckpt, a file of heads {{cls, ctx, raw}}, "
        f"{SCALE}.ckpt, or {'.ckpt or '.join(PROJECTIONS)}.ckpt under that name"
    )


def logit_scale_of(path: str | Path) -> float | None:
    """The exponentiated logit scale in a file, in ``logit_scale.ckpt`` beside it, or in the folder above.

    `setup.py` of Lipsum-FT writes ``MODEL/logit_scale.ckpt`` and ``MODEL/TEMPLATES/DATA.ckpt``.
    """
    path = Path(path)
    found = read_lipsum(path).state.get(SCALE)
    for place in (path.parent, path.parent.parent):
        if found is None and is_flax(place / f"{SCALE}.ckpt"):
            found = read_lipsum(place / f"{SCALE}.ckpt").state.get(SCALE)
    return None if found is None else math.exp(float(found))


def write_lipsum(state: State, weights: torch.Tensor | None, out: str | Path) -> Path:
    """Write a ``best_acc.ckpt``: the image tower and, if there are `weights` (C, D) with the logit scale, ``cls``.

    Raises EncoderError if the architecture is not a plain ViT, the only one that Lipsum-FT supports.
    """
    named = to_huggingface(state)
    tree: Json = {}
    for name, value in named.items():
        if name.startswith("vision_model."):
            *places, leaf = _flax_place(name, value.ndim)
            at = tree
            for place in places:
                at = at.setdefault(place, {})
            at[leaf] = _flax_layout(name, value)
    extractor = tree | {PROJECTION: state["visual.proj"], SCALE: state[SCALE]}
    content: Json = {"ext": extractor}
    if weights is not None:
        content = {"cls": (weights / state[SCALE].exp().to(weights)).T} | content
    return write_flax(content, out)


def write_lipsum_folder(state: State, folder: Path) -> None:
    """Write the files of Lipsum-FT's `setup.py`: the logit scale and both projections."""
    write_flax(state[SCALE], folder / f"{SCALE}.ckpt")
    for stem, key in PROJECTIONS.items():
        write_flax({"kernel": state[key]}, folder / f"{stem}.ckpt")


def _tower(extractor: Json) -> dict[str, torch.Tensor]:
    named = dict(_flatten(extractor))
    projection = named.pop(f"{PROJECTION}.weight", None)
    if projection is None:  # a bare matrix (in, out), as open_clip keeps it
        projection = named.pop(PROJECTION).T
    state = from_huggingface({**named, f"{PROJECTION}.weight": projection})
    return {key: value.contiguous() for key, value in state.items()}


def _flatten(tree: Json, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Arrays with the names and the layout of torch's layers."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif key == "kernel":
            weight = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
            yield f"{prefix}weight", weight
        elif key in ("scale", "embedding"):
            yield f"{prefix}weight", value
        else:
            yield name, value.reshape(-1) if key == "class_embedding" else value


def _flax_place(name: str, ndim: int) -> list[str]:
    """Keys of a torch tensor in Flax's tree."""
    *places, leaf = name.split(".")
    if leaf == "weight":
        leaf = "embedding" if places[-1] == "position_embedding" else "scale" if ndim == 1 else "kernel"
    return [*places, leaf]


def _flax_layout(name: str, value: torch.Tensor) -> torch.Tensor:
    """A torch tensor in Flax's layout."""
    if value.ndim == 4:
        return value.permute(2, 3, 1, 0)
    return value.T if value.ndim == 2 and not name.endswith("position_embedding.weight") else value
