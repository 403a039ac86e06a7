"""Checkpoint files of CLIP models: digests of towers, and OpenAI's TorchScript archives.

OpenAI's files, whose weights need QuickGELU, are recognised by digest or by layout.
"""

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Container
from pathlib import Path

import torch

from featcache.errors import EncoderError

OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
NOT_WEIGHTS = {*OPENAI_EXTRAS, "attn_mask"}  # some archives hold the causal mask, which is computed
PICKLE = b"\x80"
"""First byte of pickles since protocol 2, and so of torch files older than zip archives."""


def state_digest(model: torch.nn.Module, keep: Callable[[str], bool] = lambda name: True) -> str:
    """sha256 (first 128 bits, hexadecimal) of names, dtypes, shapes and bytes of the tensors that `keep` accepts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if keep(name):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def tower_digest(model: torch.nn.Module, *, image: bool) -> str:
    """`state_digest` of one tower.

    Everything outside ``visual.`` belongs to the text side, logit scale and bias included, since the zero-shot head
    depends on them.
    """
    return state_digest(model, lambda name: name.startswith("visual.") is image)


def is_openai_file(path: Path, known: Container[str]) -> bool:
    """Whether a checkpoint is one of OpenAI's files (`known` sha256 digests), or another archive in their layout."""
    if not is_torchscript(path):
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest in known or set(OPENAI_EXTRAS) <= set(_torchscript_state(path))


def is_torchscript(path: Path) -> bool:
    """Whether a checkpoint is a TorchScript archive, as OpenAI published them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _torchscript_state(path: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the format of OpenAI's files
        try:
            archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:  # torch raises anything on damaged archives
            raise EncoderError(f"{path}: a damaged TorchScript archive ({str(error)[:200]}); fetch it again") from error
    return dict(archive.state_dict())


def load_torchscript(model: torch.nn.Module, path: Path) -> None:
    """Load a TorchScript archive in OpenAI's layout into an open_clip model; EncoderError if its tensors do not fit."""
    state = {name: tensor for name, tensor in _torchscript_state(path).items() if name not in NOT_WEIGHTS}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise EncoderError(
            f"{path}: its tensors do not fit the architecture ({error}); name the right --model"
        ) from error


def is_pickled(file: Path) -> bool:
    """Whether a file is a pickle, or a torch archive that contains one."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return not is_torchscript(file) and any(name.endswith("data.pkl") for name in archive.namelist())
    with file.open("rb") as stream:
        return stream.read(1) == PICKLE
