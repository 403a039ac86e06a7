"""Checkpoints of other systems to open_clip's or Hugging Face's layout.

=====================  ==========================================================================================
read                   safetensors, torch state dicts (``weights_only``), OpenAI's TorchScript archives, model
                       folders; Lipsum-FT's ``.ckpt`` (msgpack); with ``trust`` also pickled modules (wise-ft)
written                a safetensors state dict (``OUT.safetensors``), a model folder of open_clip, a folder of
                       Hugging Face's CLIPModel; a classification head beside it, where there is one
=====================  ==========================================================================================

Lipsum-FT saves the image tower alone: the text tower comes from the base model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.encoders import load_encoder
from featcache.encoders.checkpoints import NOT_WEIGHTS
from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import EncoderError
from ft.checkpoint import CONFIG, model_folder, read_config, read_state, weights_file, write_model_folder, write_state
from ft.formats.flax import is_flax, read_lipsum
from ft.formats.huggingface import write_huggingface
from ft.formats.pickled import read_pickled
from ft.start import encoder_key
from heads import LinearHead, save

__all__ = ["LAYOUTS", "Checkpoint", "Converted", "convert", "read_checkpoint"]

LAYOUTS = ("open_clip", "huggingface")
HEAD = "classification_head."
TOWERS = ("image_encoder.model.", "model.")


class Checkpoint(NamedTuple):
    """What was read: a state dict under open_clip's names, and a head where the file has one."""

    state: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    """(C, D), the logit scale included."""
    bias: torch.Tensor | None = None


class Converted(NamedTuple):
    """What was written."""

    out: Path
    head: Path | None
    tensors: int


def read_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read any checkpoint that featcache knows.

    Parameters
    ----------
    path : str or Path
    trust : bool
        Unpickle a file that nothing else reads; this runs the code in it, see `ft.formats.pickled`.

    Raises
    ------
    EncoderError
        A file that cannot be read, or only by unpickling it.
    """
    file = Path(str(path).removeprefix("local-dir:"))
    if file.is_file() and is_flax(file):
        state, cls = read_lipsum(file)
        scale = float(state["logit_scale"].double().exp()) if "logit_scale" in state else 1.0
        return Checkpoint(state, None if cls is None else scale * cls)
    try:
        state = read_state(model_folder(path) if file.is_dir() or str(path) == "tiny" else file)
    except EncoderError:
        if not (trust and file.is_file()):
            raise
        state = read_pickled(file, trust=trust)
    return _split_head(state)


def _split_head(state: dict[str, torch.Tensor]) -> Checkpoint:
    """wise-ft's classifier beside its image encoder; prefixes of the encoder taken off."""
    head = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    rest = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    for prefix in TOWERS:
        if rest and all(key.startswith(prefix) for key in rest):
            rest = {key.removeprefix(prefix): value for key, value in rest.items()}
    rest = {key: value for key, value in rest.items() if key not in NOT_WEIGHTS}
    return Checkpoint(rest, head.get("weight"), head.get("bias"))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    layout: str = "open_clip",
    trust: bool = False,
    classnames: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert a checkpoint.

    Parameters
    ----------
    source : str or Path
        What `read_checkpoint` reads.
    out : str or Path
        A ``.safetensors`` file for the state dict alone, or the new folder.
    base : str, optional
        The model that gives configuration, tokenizer, and tensors that the checkpoint lacks: a model folder, ``tiny``,
        or an open_clip architecture (configuration alone). Default: the source, where it is a model folder.
    layout : {"open_clip", "huggingface"}
        Of a folder.
    trust : bool
        See `read_checkpoint`.
    classnames : sequence of C str, optional
        Of the head; default: numbers.
    overwrite : bool

    Raises
    ------
    EncoderError
        A checkpoint that cannot be read, is not whole, or has no place in the layout; an `out` that exists.
    MismatchError
        Tensors that are not those of the base's architecture.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise EncoderError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if out.exists() and not overwrite:
        raise EncoderError(f"{out} exists already; name another place, or overwrite it (--overwrite)")
    found = read_checkpoint(source, trust=trust)
    folder, configuration = _base(source, base)
    state = found.state
    if folder is not None and base is not None and not state.keys() >= (known := read_state(folder)).keys():
        extra = sorted(state.keys() - known.keys())
        if extra:
            raise EncoderError(f"{source}: {', '.join(extra[:3])} are no tensors of {base}; name the right base")
        state = {**known, **state}
    if out.suffix == ".safetensors":
        write_state(state, out)
    elif configuration is None:
        raise EncoderError(f"{source}: a folder needs a configuration; name the architecture with --base")
    elif layout == "huggingface":
        write_huggingface(configuration, state, out, overwrite=overwrite)
    else:
        target = folder if folder is not None else configuration
        write_model_folder(target, state, out, {"converted_from": Path(source).name}, overwrite=overwrite)
    return Converted(out, _write_head(found, out, layout, classnames), len(state))


def _base(source: str | Path, base: str | None) -> tuple[Path | None, dict[str, Any] | None]:
    """Folder and configuration of the base model."""
    name = str(source if base is None else base)
    folder = Path(name.removeprefix("local-dir:"))
    if name == "tiny" or (folder / CONFIG).is_file():
        found = model_folder(name)
        weights_file(found)
        return found, read_config(found)
    if base is None:
        return None, None
    encoder = load_encoder(name, "random", device="cpu")
    if not isinstance(encoder, OpenClipEncoder):
        raise EncoderError(f"base {base}: expected a model folder, `tiny`, or an architecture of open_clip")
    return None, encoder.configuration()


def _write_head(found: Checkpoint, out: Path, layout: str, classnames: Sequence[str] | None) -> Path | None:
    if found.weights is None:
        return None
    weights = found.weights.float().numpy()
    names = tuple(classnames or (f"class {number}" for number in range(len(weights))))
    bias = np.zeros(len(weights), np.float32) if found.bias is None else found.bias.float().numpy()
    folder = out.is_dir() and layout == "open_clip"
    encoder: Any = load_encoder(f"local-dir:{out}", device="cpu") if folder else None
    provenance: dict[str, Any] = {
        "head": "converted",
        "params": {},
        "encoder_key": None if encoder is None else encoder_key(encoder),
        "classnames": list(names),
        "fitted_on": [],
    }
    head = LinearHead(weights, bias, names, "converted", provenance)
    return save(head, out.with_name(f"{out.stem if out.is_file() else out.name}_head.safetensors"))
