"""Reading and writing checkpoint files and model folders, without pickle and without open_clip.

A model folder is open_clip's ``local-dir:FOLDER``: a configuration, one weights file, and tokenizer files if the model
has its own tokenizer. `write_model_folder` makes one from another folder and a state dict, so that a fine-tuned or
merged model can be encoded with ``featcache encode --model local-dir:FOLDER``.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featcache import encoders
from featcache.encoders.base import FOLDER_CONFIG, FOLDER_FILES
from featcache.encoders.base import FOLDER_PROVENANCE as PROVENANCE
from featcache.encoders.checkpoints import NOT_WEIGHTS, is_pickled, is_torchscript
from featcache.errors import EncoderError
from featcache.parameters import check_regular
from featcache.store.key import checksum
from featcache.store.places.targets import check_folder, new_folder, replacing, writing
from featcache.store.places.tensors import UNSEALED, check_sound, seal
from ft.checkpoints.state import Json, Shapes, State, check_shapes, shapes_of

CONFIG = FOLDER_CONFIG
WEIGHTS = "open_clip_model.safetensors"

START, LAST, BEST = "start", "last", "best"
OPTIONS, LOG = "options.json", "log.jsonl"
"""Files in the folder of a run, see `ft.training.output`."""

# open_clip's order of preference among the weights files of a folder
WEIGHTS_NAMES = tuple(
    f"{stem}.{suffix}"
    for stem in ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
    for suffix in ("safetensors", "bin", "pth")
)
TOKENIZER_FILES: tuple[str, ...] = ("bpe_*.txt.gz", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "config.json", "spiece.model", "sentencepiece*.model")
CLIP, HEAD = "clip", "head"
"""Parts of a model that RegFT saved for adapters."""

WRAPPERS = ("state_dict", "model_state_dict", "model")  # of open_clip, and of many training scripts
PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a file, or from the weights file of a model folder.

    Reads safetensors, torch files (with ``weights_only=True``, so that no code in them runs; including training
    checkpoints that hold the weights under one of `WRAPPERS`) and OpenAI's TorchScript archives. Key prefixes of
    DistributedDataParallel and torch.compile are removed.

    Raises
    ------
    EncoderError
        The file does not exist or cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file = weights_file(file)
    if not file.is_file():
        raise EncoderError(
            f"{file}: no such checkpoint; give a safetensors or torch file, or a model folder{_last_instead(file)}"
        )
    try:
        content = _load(file)
    except Exception as error:  # torch's readers raise KeyError, IndexError and more on broken files
        way = (
            "save the module's state_dict(), or see featcache convert --trust" if is_pickled(file) else "check the file"
        )
        # torch's own message suggests weights_only=False
        said = "objects other than tensors" if "weights_only" in str(error) else str(error)[:200]
        raise EncoderError(
            f"{file}: not a safetensors file, and torch.load(weights_only=True) refuses it ({said}); {way}"
        ) from error
    inner = (content.get(key) for key in WRAPPERS) if isinstance(content, Mapping) else ()
    content = next((found for found in inner if isinstance(found, Mapping)), content)
    if isinstance(content, Mapping) and content.keys() == {CLIP, HEAD}:
        content = _flat(content)
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        raise EncoderError(f"{file}: holds no state dict (name -> tensor); save one with model.state_dict()")
    state = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _flat(content: Mapping[str, object]) -> object:
    """Flatten RegFT's ``{clip: state dict, head: (weight, bias)}`` to one level."""
    clip, head = content[CLIP], content[HEAD]
    if not isinstance(clip, Mapping) or not isinstance(head, tuple | list) or len(head) != 2:
        return content
    return {f"{CLIP}.{key}": value for key, value in clip.items()} | {
        f"{HEAD}.{key}": value.detach() for key, value in zip(("weight", "bias"), head, strict=True)
    }


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        check_sound(file)
        return load_file(file)
    if not is_torchscript(file):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows is clearer
            return torch.load(file, map_location="cpu", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch plans to drop it; OpenAI's files need it
        archive = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]
    return {key: value for key, value in archive.state_dict().items() if key not in NOT_WEIGHTS}


def write_state(state: State, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a state dict as safetensors, atomically even on a power cut: readers see the old file or the new one.

    Parameters
    ----------
    state : tensors by name, on any device; they may share memory
    metadata : strings for the file's header
    """
    tensors = _separate(state)
    with replacing(path) as file, writing(path, sum(value.nbytes for value in tensors.values())):
        save_file(tensors, file.name, metadata={"format": "pt", **(metadata or {}), **UNSEALED})
        seal(file.name)
    return Path(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; empty if there is none."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def write_torch(content: Mapping[str, object], path: str | Path) -> Path:
    """Write tensors with torch.save, atomically; ``torch.load(..., weights_only=True)`` reads them."""
    with replacing(path) as file, writing(path):
        torch.save(dict(content), file)
    return Path(path)


def _separate(state: State) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no memory: safetensors refuses tied weights."""
    seen: set[int] = set()
    separate = {}
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def head_path(out: Path, name: str) -> Path:
    """File of the head that belongs to the model folder ``out/name``."""
    return out / f"{name}_head.safetensors"


def path_of(name: str | Path) -> Path:
    """The path that ``local-dir:FOLDER``, ``FOLDER`` or ``FILE`` names, with ``~`` expanded."""
    return Path(str(name).removeprefix("local-dir:")).expanduser()


def model_folder(name: str | Path) -> Path:
    """The folder of ``tiny``, ``local-dir:FOLDER`` or ``FOLDER``; EncoderError if the folder is not a model folder."""
    folder = path_of(name)
    if folder == Path("tiny") and not folder.exists():
        folder = Path(encoders.__file__).parent / "tiny"
    if not (folder / CONFIG).is_file():
        lacks = f"no {CONFIG}" if folder.exists() else "no such file or folder"
        raise EncoderError(
            f"{folder}: {lacks}; give a model folder (open_clip's local-dir:), or `tiny`{_last_instead(folder)}"
        )
    return folder


def _last_instead(path: Path) -> str:
    """Hint for a run without a best model, which only exists with a validation split."""
    last = path.parent / LAST
    return f"; this run had no validation split, its model is {last}" if path.name == BEST and last.is_dir() else ""


def weights_file(folder: str | Path) -> Path:
    """The weights file of a model folder that open_clip would load; EncoderError if the folder has none."""
    folder = Path(folder)
    found = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    others = sorted(path for suffix in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{suffix}"))
    others.sort(key=lambda path: path.suffix != ".safetensors")
    if not found and not others:
        raise EncoderError(f"{folder}: no weights; expected {WEIGHTS}")
    return (found or others)[0]


def read_config(folder: str | Path) -> Json:
    """Configuration of a model folder: ``model_cfg`` and ``preprocess_cfg``.

    Raises EncoderError if the file is not a JSON object with a ``model_cfg``.
    """
    path = Path(folder) / CONFIG
    try:
        check_regular(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: cannot be read as JSON ({error}); give a model folder") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise EncoderError(f"{path}: no table model_cfg; expected open_clip's configuration")
    return config


def check_targets(folders: Iterable[Path], overwrite: bool) -> None:
    """Raise EncoderError if a folder cannot be made, or exists without `overwrite`."""
    existing = []
    for folder in folders:
        check_folder(folder)
        existing += [str(folder)] if folder.exists() and not overwrite else []
    if existing:
        raise EncoderError(f"{', '.join(existing)}: already exists; name another folder, or replace it (--overwrite)")


def write_model_folder(
    source: str | Path | Json, state: State, out: str | Path, provenance: Json | None = None, *, overwrite: bool = False
) -> Path:
    """Write a model folder: configuration and tokenizer of `source`, weights of `state`.

    Parameters
    ----------
    source
        A model folder, or ``tiny``; or the configuration (``model_cfg`` and ``preprocess_cfg``) of a model loaded by
        name, from which open_clip finds the tokenizer.
    state : tensors with the keys and shapes of the source's weights; not checked if the source is a configuration
    out : the new folder, created atomically
    provenance : origin of the weights, for ``provenance.json``; checksums of the tokenizer files are added
    overwrite : replace an existing folder

    Raises
    ------
    EncoderError
        `source` is not a model folder, or `out` exists.
    MismatchError
        Keys or shapes differ from the weights of a source folder.
    """
    out = Path(out)
    folder = None if isinstance(source, Mapping) else model_folder(source)
    if folder is not None:
        check_shapes(stored_shapes(weights_file(folder)), shapes_of(state), (str(folder), "the new state dict"))
    if out.exists() and (not overwrite or (folder is not None and out.resolve() == folder.resolve())):
        raise EncoderError(f"{out} exists already; name another folder, or overwrite it (never the source itself)")
    with new_folder(out) as partial:
        _write_configuration(source if folder is None else folder, partial)
        if provenance is not None:
            tokenizer = {path.name: checksum(path.read_bytes()) for path in sorted(partial.iterdir())}
            tokenizer.pop(CONFIG)  # users may edit it
            provenance = {**provenance, FOLDER_FILES: tokenizer} if tokenizer else provenance
            (partial / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n")
        write_state(state, partial / WEIGHTS)
    return out


def _write_configuration(source: str | Path | Json, folder: Path) -> None:
    """Write the configuration, and copy the tokenizer files if the source has any."""
    if isinstance(source, Mapping):
        if not {"model_cfg", "preprocess_cfg"} <= source.keys():
            raise EncoderError(f"configuration with {', '.join(source)}: expected model_cfg and preprocess_cfg")
        (folder / CONFIG).write_text(json.dumps(dict(source), indent=2) + "\n", encoding="utf-8")
        return
    for path in [Path(source) / CONFIG, *(path for names in TOKENIZER_FILES for path in Path(source).glob(names))]:
        shutil.copyfile(path, folder / path.name)


def stored_shapes(file: Path) -> Shapes:
    """Shapes of the tensors in a checkpoint file; of safetensors only the header is read."""
    if file.suffix != ".safetensors":
        return shapes_of(read_state(file))
    with safe_open(file, framework="pt") as stored:
        return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118 - not a dict
