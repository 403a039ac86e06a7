"""The activation that a checkpoint was trained with: known from its file, or assumed.

OpenAI's weights need QuickGELU; in a GELU architecture they silently lose four points of ImageNet accuracy (see
`featcache.encoders.checkpoints`). A conversion uses the activation of its base. A known difference is refused, and an
assumption is reported.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from featcache.encoders.checkpoints import is_openai_file, is_torchscript
from featcache.encoders.openclip import openai_file_digests
from featcache.encoders.published import check_activation
from featcache.transfer.flax import is_flax
from ft.checkpoints.state import Json

LIKE = "ViT-B-16-quickgelu"
NAMES = {True: "QuickGELU", False: "GELU"}


class KnownActivation(NamedTuple):
    """What is known about the activation of a checkpoint."""

    what: str
    """Kind of checkpoint, for messages."""
    quick_gelu: bool | None = None
    """None if unknown."""
    sure: bool = False
    """Whether nothing has to be assumed."""


def activation_of_file(file: Path) -> KnownActivation:
    """From the kind of file: OpenAI's are recognised by digest, other archives in their layout by their keys."""
    if is_flax(file):
        return KnownActivation("Lipsum-FT's .ckpt (its default start is OpenAI's model, which uses QuickGELU)")
    if not is_torchscript(file):
        return KnownActivation("a state dict")
    with file.open("rb") as stream:
        model = openai_file_digests().get(hashlib.file_digest(stream, "sha256").hexdigest())
    if model is not None:
        return KnownActivation(f"OpenAI's file of {model}", True, sure=True)
    if is_openai_file(file, ()):
        return KnownActivation("an archive in OpenAI's layout, but none of OpenAI's files", True)
    return KnownActivation("a TorchScript archive of unknown origin")


def activation_of_config(configuration: Json) -> KnownActivation:
    """From the configuration of a model folder."""
    return KnownActivation("a model folder", _quick_gelu(configuration), sure=True)


def activation_of_module(quick_gelu: bool | None) -> KnownActivation:
    """From the layers of a trusted pickled module."""
    if quick_gelu is None:
        return KnownActivation("a pickled object (wise-ft starts from OpenAI's models, which use QuickGELU)")
    return KnownActivation("a pickled module", quick_gelu, sure=True)


def check_base_activation(
    source: str, known: KnownActivation, configuration: Json, model: str, flag: str = "--base"
) -> None:
    """Raise ActivationMismatchError if the known activation differs from that of the model that is loaded.

    Parameters
    ----------
    source : the checkpoint
    configuration : ``model_cfg`` and ``preprocess_cfg`` of the model
    model : its name for `featcache.encoders.load_encoder`
    flag : the argument that names the model
    """
    quick = _quick_gelu(configuration)
    remedy = f"{flag} with a model that computes {NAMES[not quick]}" + ("" if quick else f", such as {LIKE}")
    named = ":" not in model  # an architecture, which has a variant with QuickGELU
    check_activation(model, source, quick, known.quick_gelu, flag, None if named else remedy)


def assumption(source: str, known: KnownActivation, configuration: Json, model: str) -> str | None:
    """A line on the assumed activation; None if nothing is assumed."""
    if known.sure:
        return None
    quick = _quick_gelu(configuration)
    line = f"{source}: {known.what} does not say its activation; {NAMES[quick]} is assumed, which {model} computes"
    if known.quick_gelu is None and not quick:
        line += (
            "; weights fine-tuned from OpenAI's would silently lose accuracy: for them name a base with QuickGELU, "
            f"such as {LIKE}"
        )
    return line


def _quick_gelu(configuration: Json) -> bool:
    return bool(configuration["model_cfg"].get("quick_gelu", False))
