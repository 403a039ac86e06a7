"""Models that others are derived from: the zero-shot model of an interpolation, the base of a conversion.

A model folder, or ``tiny``, is read directly. An architecture of open_clip, with a tag or a checkpoint file, is loaded
as by ``featcache encode``, so that its activation is checked. ``RUN/start`` is the initial model of a run of
``featcache finetune``. The run recorded the source of its weights, not a copy: they are loaded again, and their digests
must be those recorded.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from featcache.encoders import load_encoder
from featcache.encoders.base import full_name
from featcache.encoders.model_names import open_clip_name
from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import EncoderError, MismatchError
from ft.checkpoints.folder import (
    CONFIG,
    OPTIONS,
    START,
    model_folder,
    path_of,
    read_config,
    read_state,
    stored_shapes,
    weights_file,
)
from ft.checkpoints.state import Json, Shapes, shapes_of


@dataclass(frozen=True)
class Parent:
    """A model to derive others from; made by `parent_of`.

    Parameters
    ----------
    name : as given by the user
    named : model and weights for `featcache.encoders.load_encoder`
    source : folder, or configuration of a model loaded by name, for `ft.checkpoints.folder.write_model_folder`
    config : ``model_cfg`` and ``preprocess_cfg``
    encoder : a model loaded by name, on the CPU
    has_weights : False for a bare architecture, which has only shapes
    """

    name: str
    named: tuple[str, str | None]
    source: Path | Json
    config: Json
    encoder: OpenClipEncoder | None = None
    has_weights: bool = True

    def state(self) -> dict[str, torch.Tensor]:
        """The state dict, under open_clip's names."""
        return dict(self.encoder.model.state_dict()) if self.encoder is not None else read_state(self._folder)

    def shapes(self) -> Shapes:
        """Shapes of the tensors."""
        if self.encoder is not None:
            return shapes_of(self.encoder.model.state_dict())
        return stored_shapes(weights_file(self._folder))

    def account(self) -> Json:
        """Provenance: the file and its sha256, or the name and the digests of both towers."""
        if self.encoder is None:
            return account_of(weights_file(self._folder))
        return {"model": self.encoder.name, "weights": _digests(self.encoder)}

    def load(self, device: str | None = None) -> OpenClipEncoder:
        """The model as an encoder on a device."""
        return load_open_clip(*self.named, device=device)

    @property
    def _folder(self) -> Path:
        return Path(self.named[0].removeprefix("local-dir:"))


def parent_of(name: str | Path | Parent, pretrained: str | None = None, *, architecture: bool = False) -> Parent:
    """Find a model by name.

    Raises EncoderError if there is no such model, or an architecture has no weights; ActivationMismatchError if the
    weights need another activation than the architecture has; MismatchError if the initial weights of a run have
    changed.

    Parameters
    ----------
    name
        A model folder, ``tiny``, ``RUN/start``, ``hf-hub:ORG/REPO``, an architecture of open_clip, or an OpenAI model.
    pretrained : weights of an architecture: a tag of open_clip or a checkpoint file
    architecture : accept an architecture without weights
    """
    if isinstance(name, Parent):
        return name
    text = str(name)
    path = path_of(text)
    if text == "tiny" or (path / CONFIG).is_file():
        if pretrained is not None:
            raise EncoderError(f"--pretrained {pretrained}: {text} has weights of its own; leave --pretrained out")
        return _in_folder(text)
    if pretrained is None and path.name == START and (path.parent / OPTIONS).is_file():
        return _start_of(path.parent, text)
    on_hub = text.startswith("hf-hub:")
    alone = architecture and pretrained is None and not on_hub
    chosen, weights = open_clip_name(text, "random" if alone else pretrained)
    if weights is None and not on_hub:
        raise EncoderError(
            f"{text}: not a model folder (no {CONFIG} in it); expected one, `tiny`, RUN/{START} (the initial model "
            "of a run), or an architecture of open_clip with --pretrained"
        )
    named = (chosen, weights)
    return _by_name(text, named, load_open_clip(*named, device="cpu"), has_weights=not alone)


def folder_of(model: str) -> Path | None:
    """The folder of ``tiny``, ``local-dir:FOLDER`` or ``FOLDER``; None for a model loaded by name."""
    return model_folder(model) if model == "tiny" or full_name(model).startswith("local-dir:") else None


def load_open_clip(
    model: str,
    pretrained: str | None = None,
    *,
    device: str | None = None,
    precision: str = "fp32",
    preprocess: str | None = None,
) -> OpenClipEncoder:
    """Load an encoder for training or merging, which only open_clip's models allow.

    Raises EncoderError if the model is not one of open_clip's.
    """
    encoder = load_encoder(model, pretrained, device=device, precision=precision, preprocess=preprocess)
    if not isinstance(encoder, OpenClipEncoder):
        raise EncoderError(f"{model}: expected a model folder, `tiny`, or an architecture of open_clip")
    return encoder


def account_of(file: Path) -> Json:
    """Provenance of weights: folder, file name and sha256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": f"{file.resolve().parent.name}/{file.name}", "sha256": digest}


def _in_folder(name: str) -> Parent:
    folder = model_folder(name)
    weights_file(folder)
    return Parent(name, (f"local-dir:{folder}", None), folder, read_config(folder))


def _by_name(name: str, named: tuple[str, str | None], encoder: OpenClipEncoder, has_weights: bool = True) -> Parent:
    config: Json = json.loads(json.dumps(encoder.configuration()))  # as read from a folder
    return Parent(name, named, config, config, encoder, has_weights)


def _start_of(run: Path, name: str) -> Parent:
    """The initial model of a run, from its record."""
    try:
        start = json.loads((run / OPTIONS).read_text(encoding="utf-8"))["start"]
        model, pretrained, weights = start["model"], start["pretrained"], start["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{run}: its {OPTIONS} does not record the initial weights; run its finetune command again to add them, "
            "or name the model itself: a folder, or an architecture with --pretrained"
        ) from error
    try:
        encoder = load_open_clip(model, pretrained, device="cpu")
    except EncoderError as error:
        raise EncoderError(f"{run} started from {model}, which cannot be loaded: {error}") from error
    if _digests(encoder) != weights:
        raise MismatchError(
            f"{run} started from other weights than {encoder.name} has now (digests {', '.join(weights)} against "
            f"{', '.join(_digests(encoder))}); name the model that it started from"
        )
    return _by_name(name, (model, pretrained), encoder) if folder_of(model) is None else _in_folder(model)


def _digests(encoder: OpenClipEncoder) -> list[str]:
    """Digests of the image and the text tower, as a run records them."""
    return [str(encoder.image_identity["weights"]), encoder.text_digest]
