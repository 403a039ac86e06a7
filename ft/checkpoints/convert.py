"""Convert checkpoints of other systems to open_clip's or Hugging Face's layout.

=====================  ==========================================================================================
read                   safetensors, torch state dicts (``weights_only``), OpenAI's TorchScript archives, model
                       folders; Lipsum-FT's ``.ckpt`` (msgpack); with ``trust`` also pickled modules (wise-ft)
written                a safetensors state dict (``OUT.safetensors``), a model folder of open_clip, a folder of
                       Hugging Face's CLIPModel; a classification head beside it, where there is one
=====================  ==========================================================================================

Lipsum-FT saves the image tower alone: the text tower comes from the base model. So does the activation: a checkpoint
that is known to need another one is refused, and an assumption is logged as a warning.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from featcache.encoders.checkpoints import NOT_WEIGHTS
from featcache.encoding.chunks import encoder_key
from featcache.errors import EncoderError, MismatchError
from ft.checkpoints.folder import CONFIG, model_folder, read_config, read_state, write_model_folder, write_state
from ft.checkpoints.formats.activation import (
    KnownActivation,
    activation_of_config,
    activation_of_file,
    activation_of_module,
    assumption,
    check_base_activation,
)
from ft.checkpoints.formats.flax import is_flax, read_lipsum
from ft.checkpoints.formats.huggingface import write_huggingface
from ft.checkpoints.formats.pickled import is_pickled, read_pickled
from ft.checkpoints.parents import Parent, load_open_clip, parent_of
from ft.checkpoints.state import State, check_shapes, shapes_of
from heads import LinearHead, save
from heads.fitted.provenance import Provenance

LOG = logging.getLogger(__name__)
LAYOUTS = ("open_clip", "huggingface")
HEAD = "classification_head."
TOWERS = ("image_encoder.model.", "model.")


class Checkpoint(NamedTuple):
    """A state dict under open_clip's names, and the head if the file has one."""

    state: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    """(C, D), including the logit scale."""
    bias: torch.Tensor | None = None
    known: KnownActivation = KnownActivation("a state dict")
    """What is known of the activation."""


class Converted(NamedTuple):
    """Result of a conversion."""

    out: Path
    head: Path | None
    tensors: int
    from_base: int
    """Number of tensors taken from the base."""


def read_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint in any supported format.

    Parameters
    ----------
    path : str or Path
    trust : bool
        Unpickle a file that has no safe reader; this runs the code in it, see `ft.checkpoints.formats.pickled`.

    Raises
    ------
    EncoderError
        The file cannot be read, or only by unpickling it.
    """
    file = Path(str(path).removeprefix("local-dir:"))
    if file.is_file() and is_flax(file):
        state, cls = read_lipsum(file)
        scale = float(state["logit_scale"].double().exp()) if "logit_scale" in state else 1.0
        return Checkpoint(state, None if cls is None else scale * cls, known=activation_of_file(file))
    if file.is_dir() or str(path) == "tiny":
        folder = model_folder(path)
        return _split_head(read_state(folder), activation_of_config(read_config(folder)))
    try:
        return _split_head(read_state(file), activation_of_file(file))
    except EncoderError as error:
        refused = error.__cause__ is not None  # by torch's reader
        if not file.is_file() or not (trust or (refused and is_pickled(file))):
            raise
    pickled = read_pickled(file, trust=trust)
    return _split_head(pickled.state, activation_of_module(pickled.quick_gelu))


def _split_head(state: State, known: KnownActivation) -> Checkpoint:
    """Separate wise-ft's classifier from its image encoder, and remove prefixes."""
    head = {key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)}
    rest = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    for prefix in TOWERS:
        if rest and all(key.startswith(prefix) for key in rest):
            rest = {key.removeprefix(prefix): value for key, value in rest.items()}
    rest = {key: value for key, value in rest.items() if key not in NOT_WEIGHTS}
    return Checkpoint(rest, head.get("weight"), head.get("bias"), known)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    pretrained: str | None = None,
    layout: str = "open_clip",
    trust: bool = False,
    classnames: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert a checkpoint.

    Parameters
    ----------
    source : str or Path
        See `read_checkpoint`.
    out : str or Path
        A ``.safetensors`` file for the state dict alone, or the new folder.
    base : str, optional
        The model that gives configuration, activation, tokenizer, and tensors that the checkpoint lacks; see
        `ft.checkpoints.parents.parent_of`. An architecture without `pretrained` has no tensors. Default: the source,
        if it is a model folder.
    pretrained : str, optional
        Weights of a base that is an architecture: a tag of open_clip or a checkpoint file.
    layout : {"open_clip", "huggingface"}
        Layout of the new folder.
    trust : bool
        See `read_checkpoint`.
    classnames : sequence of C str, optional
        Class names of the head; default: numbers.
    overwrite : bool

    Raises
    ------
    EncoderError
        The checkpoint cannot be read, is incomplete, or does not fit the layout; `out` exists.
    ActivationMismatchError
        The weights are known to need another activation than the base has, such as OpenAI's without QuickGELU.
    MismatchError
        Tensors do not match the base's architecture, or are missing; the number of names differs from the classes of
        the head. Nothing is written then.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise EncoderError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if out.exists() and not overwrite:
        raise EncoderError(f"{out} exists already; name another place, or overwrite it (--overwrite)")
    parent = _base(source, base, pretrained)
    if parent is None and out.suffix != ".safetensors":
        raise EncoderError(f"{source}: a folder needs a configuration; name the architecture with --base")
    found = read_checkpoint(source, trust=trust)
    _check_classnames(found, classnames)
    state = found.state
    if parent is not None:
        check_base_activation(str(source), found.known, parent.config, parent.named[0])
        state = state if base is None else _whole(source, state, parent)
        if note := assumption(str(source), found.known, parent.config, parent.name):
            LOG.warning(note)
    if parent is None or out.suffix == ".safetensors":
        write_state(state, out)
    elif layout == "huggingface":
        write_huggingface(parent.config, state, out, overwrite=overwrite)
    else:
        write_model_folder(parent.source, state, out, {"converted_from": Path(source).name}, overwrite=overwrite)
    head = _write_head(found, out, layout, classnames)
    return Converted(out, head, len(state), len(state) - len(found.state))


def _base(source: str | Path, base: str | None, pretrained: str | None) -> Parent | None:
    if base is not None:
        return parent_of(base, pretrained, architecture=True)
    if pretrained is not None:
        raise EncoderError(f"--pretrained {pretrained}: the weights of which architecture? Name it with --base")
    folder = Path(str(source).removeprefix("local-dir:"))
    return parent_of(source) if str(source) == "tiny" or (folder / CONFIG).is_file() else None


def _whole(source: str | Path, state: dict[str, torch.Tensor], parent: Parent) -> dict[str, torch.Tensor]:
    """Complete the model with tensors of the base; all must have the shapes of the base."""
    known, given = parent.shapes(), shapes_of(state)
    if extra := sorted(given.keys() - known.keys()):
        raise MismatchError(f"{source}: {_first(extra)} are not tensors of {parent.name}; name the right --base")
    missing = sorted(known.keys() - given.keys())
    if missing and not parent.has_weights:
        raise MismatchError(
            f"{source} lacks {_first(missing)} of {parent.name}, which is an architecture without weights; give a "
            "model folder as --base, or the base's weights with --pretrained"
        )
    check_shapes({key: known[key] for key in given}, given, (parent.name, str(source)))
    return {**parent.state(), **state} if missing else state


def _first(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _check_classnames(found: Checkpoint, classnames: Sequence[str] | None) -> None:
    if found.weights is not None and classnames and len(classnames) != len(found.weights):
        raise MismatchError(
            f"{len(classnames)} class names for a head of {len(found.weights)} classes; give its own, in its order"
        )


def _write_head(found: Checkpoint, out: Path, layout: str, classnames: Sequence[str] | None) -> Path | None:
    if found.weights is None:
        return None
    weights = found.weights.float().numpy()
    names = tuple(classnames or (f"class {number}" for number in range(len(weights))))
    bias = np.zeros(len(weights), np.float32) if found.bias is None else found.bias.float().numpy()
    folder = out.is_dir() and layout == "open_clip"
    encoder = load_open_clip(f"local-dir:{out}", device="cpu") if folder else None
    provenance = Provenance(
        head="converted",
        params={},
        encoder_key=None if encoder is None else encoder_key(encoder),
        classnames=list(names),
        fitted_on=[],
    )
    head = LinearHead(weights, bias, names, "converted", provenance)
    return save(head, out.with_name(f"{out.stem if out.is_file() else out.name}_head.safetensors"))
