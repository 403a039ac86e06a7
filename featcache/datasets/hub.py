"""Fast failure if the Hugging Face hub cannot be reached; its client would retry for minutes."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from featcache.errors import DatasetError, EncoderError

PATIENCE = 3.0
"""Seconds to wait for a connection."""


def needs_hub(model: str, pretrained: str | None) -> bool:
    """Whether a model's files may have to come from the hub."""
    if model.startswith("local-dir:"):  # the folder may name its tokenizer or text tower
        config = Path(model.partition(":")[2]) / "open_clip_config.json"
        return config.is_file() and b'"hf_' in config.read_bytes()
    return model.startswith("hf-hub:") or (pretrained not in (None, "random") and not Path(str(pretrained)).is_file())


MODEL_REMEDY = "connect this machine, or give local-dir:FOLDER or --pretrained FILE"


@contextmanager
def offline_where_unreachable(
    what: str, remedy: str = MODEL_REMEDY, kind: type[EncoderError | DatasetError] = EncoderError
) -> Iterator[None]:
    """Use only the local cache inside the block if the hub cannot be reached; an error if the cache lacks a file.

    The error is of a `kind`; its message begins with `what` and ends with `remedy`.
    """
    if constants.HF_HUB_OFFLINE or hub_is_reachable():
        yield
        return
    lacking = no_hub(what, remedy, kind)
    settings = [module for module in (constants, sys.modules.get("datasets.config")) if module is not None]
    for module in settings:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield
    except Exception as error:
        if not _is_connection_error(error):
            raise
        raise lacking from error
    finally:
        for module in settings:
            vars(module)["HF_HUB_OFFLINE"] = False


def no_hub(
    what: str, remedy: str = MODEL_REMEDY, kind: type[EncoderError | DatasetError] = EncoderError
) -> EncoderError | DatasetError:
    """The error of `offline_where_unreachable`."""
    host = urlsplit(constants.ENDPOINT).hostname
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{host} cannot be reached"
    return kind(f"{what}: {why}, and the local cache ({constants.HF_HUB_CACHE}) lacks its files; {remedy}")


def hub_lacks(repository: str) -> bool:
    """Whether a model is neither in the local cache nor available from the hub."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return not folder.is_dir() and (constants.HF_HUB_OFFLINE or not hub_is_reachable())


def timm_lacks(name: str) -> bool:
    """Whether a timm model is certainly neither in a local cache nor on the hub.

    Only timm knows which repository holds a model: any cached one of another organisation may, and so may torch's
    downloaded checkpoints; of timm's own repositories, only those named like the model.
    """
    own = "models--timm--"
    cached = [folder.name for folder in Path(constants.HF_HUB_CACHE).glob("models--*")]
    if any(not folder.startswith(own) or folder.startswith(own + name) for folder in cached):
        return False
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    if any((Path(home) / "hub" / "checkpoints").glob("*")):
        return False
    return constants.HF_HUB_OFFLINE or not hub_is_reachable()


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether an error, or one in its chain, is the hub client's error without a connection."""
    while error is not None and not isinstance(error, ConnectionError | LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def hub_is_reachable() -> bool:
    """Whether the hub answers; assumed behind a proxy."""
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    return bool(getproxies()) or reaches(str(address.hostname), port)


def reaches(host: str, port: int, seconds: float = PATIENCE) -> bool:
    """Whether a connection to a host can be made in that time."""
    found = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            found.append(True)
        except OSError:
            found.append(False)

    thread = threading.Thread(target=connect, daemon=True)  # name resolution has no timeout
    thread.start()
    thread.join(seconds)
    return found == [True]
