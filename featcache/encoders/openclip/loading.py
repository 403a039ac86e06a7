"""Loading open_clip models by name and tag, checkpoint file or model folder, and the built-in `tiny`."""

import difflib
import hashlib
import json
import logging
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from featcache.datasets.hub import needs_hub, offline_where_unreachable
from featcache.encoders.base import FOLDER_FILES, FOLDER_PROVENANCE
from featcache.encoders.checkpoints import is_openai_file, is_torchscript, load_torchscript
from featcache.encoders.openclip.encoder import OpenClipEncoder
from featcache.encoders.published import check_activation
from featcache.encoders.torch_images import default_device
from featcache.errors import EncoderError, FeatcacheError
from featcache.parameters import Range, check_record, check_regular, json_value
from featcache.progress import one_line
from featcache.store.key import Json, checksum
from featcache.store.places.tensors import check_sound

TINY = Path(__file__).parent.parent / "tiny"
MERGES = "bpe_merges.txt.gz"


def load(
    model: str, pretrained: str | None = None, device: str | None = None, precision: str = "fp32"
) -> OpenClipEncoder:
    """Load an open_clip model; EncoderError, or ActivationMismatchError for weights of the other activation.

    `model` is an architecture such as ``ViT-B-32``, or a file ``MY-CLIP.json`` in the format of open_clip's
    ``model_configs``, both with `pretrained`: a tag (``openai``), a checkpoint file, or ``random`` for seeded random
    weights (tests, benchmarks); or ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``.
    """
    place = default_device(device)
    hub = offline_where_unreachable(f"model {model}") if needs_hub(model, pretrained) else nullcontext()
    try:
        with hub:
            return _loaded(model, pretrained, place, precision)
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:  # of open_clip, torch and safetensors
        if "weights_only" in str(error):  # torch's message recommends loading them anyway
            raise EncoderError(
                f"model {model} with weights {pretrained}: the file holds objects other than tensors, which are not "
                "loaded since they could run code; save the model's state_dict(), or see featcache convert --trust"
            ) from error
        said = one_line(str(error))[:300] or type(error).__name__
        raise EncoderError(
            f"model {model} with weights {pretrained}: open_clip cannot load it ({said}); check the name, the file, "
            "and that this machine reaches the model's host"
        ) from error


def _loaded(model: str, pretrained: str | None, device: str, precision: str) -> OpenClipEncoder:
    folder = model.startswith("local-dir:")
    shown, prepares = model, dict[str, Any]()
    if model.endswith(".json"):
        model, shown, prepares = register_architecture(Path(model).expanduser())
    config = _config(model)
    if folder:
        check_configuration(model, config, Path(model.partition(":")[2]))
    if folder or model.startswith("hf-hub:"):
        network = _create(model, None)
        name = folder_name(model.partition(":")[2])
    else:
        network = _create_named(model, pretrained, bool(config.get("quick_gelu", False)), prepares)
        name = f"{shown}/{Path(str(pretrained)).stem if Path(str(pretrained)).is_file() else pretrained}"
    merges = Path(model.partition(":")[2]) / MERGES
    arguments = {"bpe_path": str(merges)} if folder and merges.exists() else {}
    tokenizer: Any
    try:
        tokenizer = open_clip.get_tokenizer(model, **arguments)
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, KeyError) as error:
        tokenizer = MissingTokenizer(model, error)  # not needed for images
    return OpenClipEncoder(network, config, tokenizer, name, device, precision)


def register_architecture(file: Path) -> tuple[str, str, Json]:
    """Register a user's architecture with open_clip: its unique name there, its name for people, its preprocessing.

    The file is JSON as in open_clip's ``model_configs`` (``embed_dim``, ``vision_cfg``, ``text_cfg``), or as in a model
    folder (``model_cfg``, ``preprocess_cfg``). EncoderError if there is no such file, or it has no architecture.
    """
    expected = "expected an architecture as in open_clip's model_configs"
    try:
        check_regular(file)
        found = json_value(file.read_bytes())
    except (OSError, ValueError) as error:
        raise EncoderError(f"model {file}: cannot be read as JSON ({error}); {expected}") from error
    config = found.get("model_cfg", found) if isinstance(found, dict) else {}
    if missing := ", ".join(name for name in _CONFIG if name not in config):
        raise EncoderError(f"model {file}: no {missing}; {expected}")
    _check_fields(str(file), config)
    content = json.dumps(config, sort_keys=True)
    name = f"{file.stem}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if open_clip.factory.get_model_config(name) is None:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / f"{name}.json"
            copy.write_text(content)
            open_clip.add_model_config(copy)
    return name, file.stem, dict(found.get("preprocess_cfg", {}))


_SIZE = Annotated[int, Range(1, 1 << 24)]
_TOWER: dict[str, object] = dict.fromkeys(("width", "heads", "head_width", "context_length", "vocab_size"), _SIZE)
_TOWER |= {"layers": _SIZE | list[_SIZE], "image_size": _SIZE | list[_SIZE], "patch_size": _SIZE | None}
_CONFIG: dict[str, object] = {"embed_dim": _SIZE, "vision_cfg": dict[str, Any], "text_cfg": dict[str, Any]}
"""Types of some fields of a configuration; open_clip has more fields."""


def check_configuration(model: str, config: Json, folder: Path) -> None:
    """EncoderError if fields have wrong types, or describe far more weights than the folder has; allocates nothing."""
    least = sum(map(_least_weights, _check_fields(model, config)))
    held = sum(file.stat().st_size for file in _weights(folder))
    if least > held + SLACK:
        raise EncoderError(
            f"{model}: its configuration has at least {least:,} weights, and its files hold {held:,} bytes; "
            "they do not belong together"
        )


def _check_fields(model: str, config: Json) -> list[Json]:
    """The configurations of both towers."""
    try:
        check_record(config, _CONFIG, model, _CONFIG)
        return [check_record(config[tower], _TOWER, f"{model}: {tower}") for tower in ("vision_cfg", "text_cfg")]
    except ValueError as error:
        raise EncoderError(f"{error}; give a model folder as open_clip writes it") from error


SLACK = 1 << 24
"""Slack for small models, which may compute their positional embeddings."""


def _least_weights(tower: Json) -> int:
    """Lower bound of a tower's weights: square matrices and token embeddings; 0 for other families."""
    width, layers = tower.get("width", 0), tower.get("layers", 0)
    depth = layers if isinstance(layers, int) else len(layers)
    return int(4 * depth * width**2 + tower.get("vocab_size", 0) * width) if "timm_model_name" not in tower else 0


class MissingTokenizer:
    """In place of a tokenizer that cannot be loaded; any use raises an error that names the missing files."""

    def __init__(self, model: str, error: Exception) -> None:
        self._model, self._why = model, " ".join(str(error).split())[:200]

    def __getattr__(self, name: str) -> Any:
        raise EncoderError(
            f"{self._model}: texts need its tokenizer, which cannot be loaded ({self._why}); put tokenizer.json and "
            "tokenizer_config.json (and what they name) into the model's folder; images need no tokenizer"
        )

    def __call__(self, texts: object) -> Any:
        """EncoderError, as for any use."""
        return self.tokens


GENERIC = re.compile(r"best|last|start|final|latest|model|(?:alpha=|epoch|step|checkpoint).*")
"""Names of folders that every run has, which need the name of the run."""


def folder_name(folder: str) -> str:
    """Short name of a model folder, with the folder above it if its own name is `GENERIC`.

    >>> folder_name("models/my-clip"), folder_name("RUN2/best"), folder_name("WISE/alpha=0.500")
    ('my-clip', 'RUN2/best', 'WISE/alpha=0.500')
    """
    path = Path(folder).absolute()
    return f"{path.parent.name}/{path.name}" if GENERIC.fullmatch(path.name) and path.parent.name else path.name


def load_tiny(
    model: str, pretrained: str | None = None, device: str | None = None, precision: str = "fp32"
) -> OpenClipEncoder:
    """The built-in default model, small enough to ship, for demonstrations and tests (see its card)."""
    check_arguments(model, pretrained)
    return load(f"local-dir:{TINY}", None, device, precision)


def check_arguments(model: str, pretrained: str | None) -> None:
    """EncoderError if there is no such model, or it has no such weights; loads nothing."""
    if model == "tiny" and pretrained is not None:
        raise EncoderError(f"--pretrained {pretrained}: `tiny` has its own weights; leave --pretrained out")
    if model == "tiny" or model.startswith(("local-dir:", "hf-hub:")):
        return
    if model.endswith(".json"):
        model, *_ = register_architecture(Path(model).expanduser())
    _config(model)
    _check_weights(model, pretrained)


def _config(model: str) -> Json:
    try:
        if model.startswith("local-dir:"):
            check_regular(Path(model.partition(":")[2]) / "open_clip_config.json")
        config = open_clip.factory.get_model_config(model)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"model {model}: no readable open_clip_config.json ({error}); name a model folder"
        ) from error
    if config is None:
        near = difflib.get_close_matches(model, ["tiny", *open_clip.list_models()], n=1)
        raise EncoderError(
            f"model {model!r}: open_clip has no such architecture; "
            f"{f'did you mean {near[0]}? Else ' if near else ''}expected `tiny`, `local-dir:FOLDER`, or one of "
            f"{', '.join(open_clip.list_models()[:8])}, ... (open_clip.list_models() lists all)"
        )
    if not isinstance(config, dict):
        raise EncoderError(f"model {model}: model_cfg holds {config!r}, expected an object; name a model folder")
    return dict(config)


def _create_named(model: str, pretrained: str | None, quick_gelu: bool, prepares: Json) -> torch.nn.Module:
    if pretrained == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _create(model, None, prepares)
    _check_weights(model, pretrained)
    file = Path(str(pretrained))
    if file.is_file():
        wanted = True if is_openai_file(file, openai_file_digests()) else None  # unknown
    else:
        known = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
        wanted = bool(known.get("quick_gelu", False)) if known else None
    check_activation(model, str(pretrained), quick_gelu, wanted)
    if file.is_file() and is_torchscript(file):
        network = _create(model, None, prepares)
        load_torchscript(network, file)
        return network
    return _create(model, pretrained, prepares)


def _check_weights(model: str, pretrained: str | None) -> None:
    if pretrained == "random":
        return
    tags = open_clip.pretrained.list_pretrained_tags_by_model(model)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        raise EncoderError(
            f"--pretrained {pretrained}: {model} needs weights; give a checkpoint file, `random`, or one of the tags "
            f"{', '.join(tags) or '(none)'}"
        )


def openai_file_digests() -> dict[str, str]:
    """SHA-256 of OpenAI's checkpoint files -> architecture, from the addresses in open_clip's table."""
    found: dict[str, str] = {}
    for model in open_clip.pretrained.list_pretrained_models_by_tag("openai"):
        url = (open_clip.pretrained.get_pretrained_cfg(model, "openai") or {}).get("url", "")
        if digest := re.search(r"/([0-9a-f]{64})/", url):
            found.setdefault(digest[1], model)
    return found


def _check_files(model: str, pretrained: str | None) -> None:
    """EncoderError if weights or a tokenizer differ from their checksums, or weights are missing."""
    files = [] if pretrained is None or not Path(pretrained).is_file() else [Path(pretrained)]
    if model.startswith("local-dir:"):
        folder = Path(model.partition(":")[2])
        files += _weights(folder)
        if not files:  # open_clip would use random ones
            raise EncoderError(f"{folder}: holds no weights (open_clip_model.safetensors); write or fetch it again")
        _check_tokenizer(folder)
    for file in files:
        try:
            check_regular(file)
            check_sound(file)
            if file.suffix == ".safetensors":
                safe_open(file, framework="pt")
        except (ValueError, OSError, SafetensorError) as error:
            raise EncoderError(f"{file}: {one_line(str(error))}; write or fetch it again") from error


def _weights(folder: Path) -> list[Path]:
    return [file for pattern in ("*.safetensors", "*.bin", "*.pt*") for file in folder.glob(pattern)]


def _check_tokenizer(folder: Path) -> None:
    try:
        named = json_value((folder / FOLDER_PROVENANCE).read_bytes())[FOLDER_FILES].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # written by another program or an earlier version
    for name, known in named:
        file = folder / Path(str(name)).name
        if not file.is_file() or checksum(file.read_bytes()) != known:
            raise EncoderError(f"{file}: differs from its checksum in {FOLDER_PROVENANCE}; write or fetch it again")


def _create(model: str, pretrained: str | None, prepares: Json | None = None) -> torch.nn.Module:
    _check_files(model, pretrained)
    more = {"precision": "fp32", "device": "cpu"} | ({"force_preprocess_cfg": prepares} if prepares else {})
    logging.disable(logging.ERROR)  # open_clip warns about random weights, which are intended
    try:
        network: torch.nn.Module = open_clip.create_model(model, pretrained=pretrained, **more)
    finally:
        logging.disable(logging.NOTSET)
    return network
