"""Convert checkpoints between the layouts of open_clip, Hugging Face, wise-ft, RegFT and Lipsum-FT.

Read: safetensors, torch state dicts (``weights_only``), OpenAI's TorchScript archives, model folders, Lipsum-FT's
``.ckpt`` files (msgpack; also of heads alone), RegFT's ``{clip, head}``, and with ``trust`` pickled modules (wise-ft).
Written: a state dict (``.safetensors`` or ``.pt``), a model folder of open_clip, a folder of Hugging Face's CLIPModel,
and the files of RegFT and Lipsum-FT; if there is a classification head, it is written beside the model.

Lipsum-FT saves only the image tower: the text tower comes from the base model. So does the activation: a checkpoint
that is known to need another one is refused, and an assumption is logged as a warning. Its head is bound to
features of ``central-crop``, on which Lipsum-FT evaluates; other heads to those of the model's own preprocessing.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch

from featcache.encoders.checkpoints import NOT_WEIGHTS, is_pickled
from featcache.encoders.model_names import QUICK
from featcache.encoding.chunks import encoder_key
from featcache.errors import EncoderError, MismatchError
from featcache.store.places.targets import check_folder, new_folder
from featcache.transfer.flax import SUFFIXES, is_flax
from ft.checkpoints.folder import (
    CLIP,
    CONFIG,
    HEAD,
    head_path,
    model_folder,
    path_of,
    read_config,
    read_state,
    write_model_folder,
    write_state,
    write_torch,
)
from ft.checkpoints.formats.activation import (
    KnownActivation,
    activation_of_config,
    activation_of_file,
    activation_of_module,
    assumption,
    check_base_activation,
)
from ft.checkpoints.formats.huggingface import write_huggingface
from ft.checkpoints.formats.lipsum import logit_scale_of, read_lipsum, write_lipsum, write_lipsum_folder
from ft.checkpoints.formats.pickled import read_pickled
from ft.checkpoints.parents import Parent, load_open_clip, parent_of
from ft.checkpoints.state import State, check_shapes, shapes_of
from heads import LinearHead, load, save
from heads.fitted.linear import as_linear
from heads.fitted.provenance import Provenance

LOG = logging.getLogger(__name__)
LAYOUTS = ("open_clip", "huggingface", "regft", "lipsum")
TORCH = (".pt", ".pth", ".bin")
FILES = (".safetensors", *TORCH)
"""Suffixes of files; other names are folders, ``alpha=0.500`` among them."""
HEADS = ("classification_head.", "head.")
TOWERS = ("image_encoder.model.", "model.", "clip.")


class Checkpoint(NamedTuple):
    """A state dict with open_clip's names, and the head if the file has one."""

    state: dict[str, torch.Tensor]
    weights: torch.Tensor | None = None
    """(C, D), including the logit scale."""
    bias: torch.Tensor | None = None
    known: KnownActivation = KnownActivation("a state dict")
    """What is known about the activation."""


class ConvertSettings(TypedDict, total=False):
    """Keyword arguments of `convert`."""

    layout: str
    """``open_clip`` (default), ``huggingface``, ``regft`` or ``lipsum``."""
    trust: bool
    """See `read_checkpoint`."""
    classnames: Sequence[str] | None
    """Class names of the head; default: numbers."""
    head: str | Path | None
    """Head file, for the layouts that hold one; default: ``X_head.safetensors`` beside a model folder ``X``."""
    overwrite: bool


class Converted(NamedTuple):
    """Result of a conversion."""

    out: Path
    head: Path | None
    tensors: int
    from_base: int
    """Tensors taken from the base."""


def read_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint in any supported format; EncoderError if it cannot be read, or only by unpickling.

    `trust` unpickles files without a safe reader, which runs the code in them; see `ft.checkpoints.formats.pickled`.
    """
    file = path_of(path)
    if is_flax(file):
        state, cls = read_lipsum(file)
        scale = (logit_scale_of(file) if state else None) or 1.0
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
    """Separate the classifier of wise-ft or RegFT from the image encoder, and remove prefixes."""
    prefix = HEADS[any(key.startswith(TOWERS[-1]) for key in state)]
    head = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for tower in TOWERS:
        if rest and all(key.startswith(tower) for key in rest):
            rest = {key.removeprefix(tower): value for key, value in rest.items()}
    rest = {key: value for key, value in rest.items() if key not in NOT_WEIGHTS}
    return Checkpoint(rest, head.get("weight"), head.get("bias"), known)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    pretrained: str | None = None,
    **settings: Unpack[ConvertSettings],
) -> Converted:
    """Convert a checkpoint.

    Parameters
    ----------
    source : see `read_checkpoint`
    out
        A ``.safetensors`` or ``.pt`` file for the state dict, or the new folder. For the layout ``regft``, a file
        ``{clip, head}``; for ``lipsum``, a ``best_acc.ckpt``, or a folder of ``logit_scale.ckpt`` and both projections.
        For a file of heads, the ``.safetensors`` file of the head.
    base
        Model that gives configuration, activation, tokenizer, and tensors that the checkpoint lacks; see
        `ft.checkpoints.parents.parent_of`. An architecture without `pretrained` has no tensors. Default: the source,
        if it is a model folder.
    pretrained : weights of a base that is an architecture: a tag of open_clip or a checkpoint file
    **settings : see `ConvertSettings`

    Raises
    ------
    EncoderError
        The checkpoint cannot be read, is incomplete, or does not fit the layout; or `out` exists.
    ActivationMismatchError
        The weights need another activation than the base has, such as OpenAI's without QuickGELU.
    MismatchError
        Tensors are missing or do not match the base's architecture; or the number of class names differs from the
        head's classes. Nothing is written then.
    """
    out, layout = Path(out).expanduser(), settings.get("layout", "open_clip")
    overwrite, classnames = settings.get("overwrite", False), settings.get("classnames")
    _check_target(out, layout, overwrite)
    parent = _base(source, base, pretrained)
    if parent is None and out.suffix not in FILES and layout != "lipsum" and Path(source).exists():
        raise EncoderError(f"{source}: a folder needs a configuration; name the architecture with --base")
    found = read_checkpoint(source, trust=settings.get("trust", False))
    if found.weights is not None and classnames and len(classnames) != len(found.weights):
        raise MismatchError(
            f"{len(classnames)} class names for a head of {len(found.weights)} classes; expected all, in its order"
        )
    if not found.state:
        return _convert_head(source, found, out, parent, classnames)
    state = found.state
    if parent is not None:
        check_base_activation(str(source), found.known, parent.config, parent.named[0])
        state = state if base is None else _whole(source, state, parent)
        if note := assumption(str(source), found.known, parent.config, parent.name):
            LOG.warning(note)
    if layout in ("regft", "lipsum"):
        _write_for_system(layout, state, _with_head(source, found, settings.get("head")), out, overwrite)
    elif parent is None or out.suffix in FILES:
        (write_torch if out.suffix in TORCH else write_state)(state, out)
    elif layout == "huggingface":
        write_huggingface(parent.config, state, out, overwrite=overwrite)
    else:
        write_model_folder(parent.source, state, out, {"converted_from": Path(source).name}, overwrite=overwrite)
    preprocess = "central-crop" if is_flax(Path(source)) else None  # what Lipsum-FT's heads are trained and judged on
    head = _write_head(found, out, layout, classnames, preprocess) if layout in ("open_clip", "huggingface") else None
    return Converted(out, head, len(state), len(state) - len(found.state))


def _check_target(out: Path, layout: str, overwrite: bool) -> None:
    if layout not in LAYOUTS:
        raise EncoderError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if layout == "regft" and out.suffix not in FILES:
        raise EncoderError(f"{out}: RegFT's layout is one file; name it {' or '.join(FILES)}")
    if layout != "lipsum" and out.suffix in SUFFIXES:
        raise EncoderError(f"{out}: files of Lipsum-FT are written with --to lipsum; for a state dict name a .pt file")
    if out.suffix not in (*FILES, *SUFFIXES):
        check_folder(out)
    if out.exists() and not overwrite:
        raise EncoderError(f"{out} exists already; name another place, or overwrite it (--overwrite)")


def _with_head(source: str | Path, found: Checkpoint, file: str | Path | None) -> Checkpoint:
    """Add the head in `file`, or by default the one beside a model folder, if any."""
    folder = path_of(source)
    beside = head_path(folder.parent, folder.name)
    if file is None and (found.weights is not None or not beside.is_file()):
        return found
    head = as_linear(load(file or beside))
    return found._replace(weights=torch.from_numpy(head.weights), bias=torch.from_numpy(head.bias))


def _write_for_system(layout: str, state: State, found: Checkpoint, out: Path, overwrite: bool) -> None:
    """Write RegFT's ``{clip, head}``, which has no blocks of the text tower, or files of Lipsum-FT."""
    if layout == "lipsum":
        if out.suffix in SUFFIXES:
            if found.bias is not None and bool((found.bias != found.bias[0]).any()):
                raise EncoderError(
                    f"{out}: the head has a bias per class, and cls in Lipsum-FT's files has none; give one without by "
                    "--head FILE (zero_shot, or fitted with --set fit_intercept=false), or keep it with --to regft"
                )
            write_lipsum(state, found.weights, out)
        else:
            with new_folder(out) as folder:
                write_lipsum_folder(state, folder)
        return
    if found.weights is None:
        raise EncoderError(f"{out}: RegFT's layout holds a head, and there is none; give it with --head FILE")
    bias = torch.zeros(len(found.weights)) if found.bias is None else found.bias
    clip = {key: value for key, value in state.items() if not key.startswith("transformer.")}
    if out.suffix in TORCH:
        write_torch({CLIP: clip, HEAD: (found.weights, bias)}, out)
    else:
        named = {f"{CLIP}.{key}": value for key, value in clip.items()}
        write_state(named | {f"{HEAD}.weight": found.weights, f"{HEAD}.bias": bias}, out)


def _convert_head(
    source: str | Path, found: Checkpoint, out: Path, parent: Parent | None, classnames: Sequence[str] | None
) -> Converted:
    """Convert a file of zero-shot heads: ``cls`` times the logit scale, bound to the text tower of the base."""
    if out.suffix != ".safetensors" or found.weights is None:
        raise EncoderError(f"{source}: holds a head alone (cls), no model; name {out.with_suffix('.safetensors')}")
    encoder = None if parent is None else parent.load("cpu")
    scale = logit_scale_of(Path(source)) if encoder is None else encoder.logit_scale
    if scale is None:
        raise EncoderError(
            f"{source}: it has no logit scale, and there is no logit_scale.ckpt beside it or in the folder above; "
            "name the model of the head with --base"
        )
    if encoder is not None and encoder.dim != found.weights.shape[1]:
        raise MismatchError(f"{source}: a head of {found.weights.shape[1]} features, {encoder.name} has {encoder.dim}")
    digest = None if encoder is None else encoder.text_digest
    bound = Provenance(head="converted", params={"logit_scale": scale}, encoder_key=None, text_digest=digest)
    head = _save_head(found._replace(weights=scale * found.weights.float()), classnames, bound, out)
    return Converted(head, head, 0, 0)


def _base(source: str | Path, base: str | None, pretrained: str | None) -> Parent | None:
    if base is not None:
        return parent_of(base, pretrained, architecture=True)
    if pretrained is not None:
        raise EncoderError(
            f"--pretrained {pretrained}: expected an architecture for these weights; name it with --base"
        )
    folder = path_of(source)
    return parent_of(source) if str(source) == "tiny" or (folder / CONFIG).is_file() else None


def _whole(source: str | Path, state: dict[str, torch.Tensor], parent: Parent) -> dict[str, torch.Tensor]:
    """Fill in missing tensors from the base; all must have its shapes."""
    known, given = parent.shapes(), shapes_of(state)
    if extra := sorted(given.keys() - known.keys()):
        raise MismatchError(f"{source}: {_first(extra)} are not tensors of {parent.name}; name the right --base")
    missing = sorted(known.keys() - given.keys())
    if missing and not parent.has_weights and "/" in parent.name and parent.name in QUICK:
        parent = parent_of(parent.name)  # the name of an OpenAI model implies its weights
    if missing and not parent.has_weights:
        raise MismatchError(
            f"{source} lacks {_first(missing)} of {parent.name}, an architecture without weights; give a model "
            "folder as --base, or its weights with --pretrained"
        )
    check_shapes({key: known[key] for key in given}, given, (parent.name, str(source)))
    return {**parent.state(), **state} if missing else state


def _first(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _write_head(
    found: Checkpoint, out: Path, layout: str, classnames: Sequence[str] | None, preprocess: str | None
) -> Path | None:
    if found.weights is None:
        return None
    folder = out.is_dir() and layout == "open_clip"
    key = encoder_key(load_open_clip(f"local-dir:{out}", device="cpu", preprocess=preprocess)) if folder else None
    path = out.with_name(f"{out.stem if out.is_file() else out.name}_head.safetensors")
    return _save_head(found, classnames, Provenance(head="converted", params={}, encoder_key=key), path)


def _save_head(found: Checkpoint, classnames: Sequence[str] | None, bound: Provenance, path: Path) -> Path:
    """Save the head of a checkpoint; `bound` says which features it belongs to."""
    assert found.weights is not None
    weights = found.weights.float().numpy()
    names = tuple(classnames or (f"class {number}" for number in range(len(weights))))
    bias = np.zeros(len(weights), np.float32) if found.bias is None else found.bias.float().numpy()
    provenance = Provenance(**bound, classnames=list(names), fitted_on=[])
    return save(LinearHead(weights, bias, names, "converted", provenance), path)
