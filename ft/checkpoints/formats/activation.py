"""Which activation a checkpoint was trained with: what its file tells, and what is assumed where it tells nothing.

OpenAI's weights want QuickGELU; in a GELU architecture they lose four ImageNet points without an error (see
`featcache.encoders.checkpoints`). A conversion takes the activation from its base, so it can fall into that trap as
loading can: what is known to differ is refused, and what is assumed is said.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from featcache.encoders.checkpoints import check_activation, is_openai_file, is_torchscript
from featcache.encoders.openclip import openai_file_digests
from ft.checkpoints.formats.flax import is_flax

LIKE = "ViT-B-16-quickgelu"
NAMES = {True: "QuickGELU", False: "GELU"}


class Told(NamedTuple):
    """What a checkpoint tells of its activation."""

    what: str
    """The checkpoint, in words."""
    quick_gelu: bool | None = None
    """Its activation; None where it tells nothing."""
    sure: bool = False
    """Whether there is nothing to assume."""


def told_by_file(file: Path) -> Told:
    """By the kind of the file: OpenAI's own are known by digest, other archives of theirs by layout."""
    if is_flax(file):
        return Told("Lipsum-FT's .ckpt (its default start is OpenAI's model, which uses QuickGELU)")
    if not is_torchscript(file):
        return Told("a state dict")
    with file.open("rb") as stream:
        model = openai_file_digests().get(hashlib.file_digest(stream, "sha256").hexdigest())
    if model is not None:
        return Told(f"OpenAI's file of {model}", True, sure=True)
    if is_openai_file(file, ()):
        return Told("an archive in OpenAI's layout, with the digest of none of OpenAI's files", True)
    return Told("a TorchScript archive of unknown origin")


def told_by_config(configuration: Mapping[str, Any]) -> Told:
    """By the configuration of a model folder."""
    return Told("a model folder", _quick_gelu(configuration), sure=True)


def told_by_module(quick_gelu: bool | None) -> Told:
    """By the layers of a pickled module, which are read where it is trusted."""
    if quick_gelu is None:
        return Told("a pickled object (wise-ft starts from OpenAI's models, which use QuickGELU)")
    return Told("a pickled module", quick_gelu, sure=True)


def check_told(source: str, told: Told, configuration: Mapping[str, Any], model: str, flag: str = "--base") -> None:
    """Refuse a checkpoint whose activation is known not to be that of the model it goes into.

    Parameters
    ----------
    source : str
        The checkpoint.
    told : Told
    configuration : mapping
        ``model_cfg`` and ``preprocess_cfg`` of the model.
    model : str
        What `featcache.encoders.load_encoder` takes for it.
    flag : str
        The argument that names it.

    Raises
    ------
    ActivationMismatchError
        Naming what to use instead.
    """
    quick = _quick_gelu(configuration)
    remedy = f"{flag} with a model that computes {NAMES[not quick]}" + ("" if quick else f", such as {LIKE}")
    named = ":" not in model  # an architecture, which has a name with and one without QuickGELU
    check_activation(model, source, quick, told.quick_gelu, flag, None if named else remedy)


def assumption(source: str, told: Told, configuration: Mapping[str, Any], model: str) -> str | None:
    """One line on the activation that is assumed; None where nothing is."""
    if told.sure:
        return None
    quick = _quick_gelu(configuration)
    line = f"{source}: {told.what} does not say its activation; {NAMES[quick]} is assumed, which {model} computes"
    if told.quick_gelu is None and not quick:
        line += (
            "; weights that began as OpenAI's would lose points of accuracy without an error: for them name a base "
            f"with QuickGELU, such as {LIKE}"
        )
    return line


def _quick_gelu(configuration: Mapping[str, Any]) -> bool:
    return bool(configuration["model_cfg"].get("quick_gelu", False))
