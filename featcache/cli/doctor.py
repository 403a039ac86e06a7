"""The verb ``featcache doctor``: versions, device, extras, the model hub, and the disk of the stores."""

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from featcache import __version__
from featcache.cli.arguments import root_argument, show
from featcache.progress import format_bytes
from featcache.store import list_stores, resolve_root
from featcache.store.places import StorePath

NEEDED = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "zarr",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "numba",
)
EXTRAS = {
    "s3": ("obstore",),
    "fast": ("simplejpeg",),
    "hf": ("datasets",),
    "lance": ("pylance",),
    "faiss": ("faiss-cpu",),
    "finetune": ("tensorboard", "msgpack"),
    "generate": ("diffusers", "transformers"),
    "cuda": ("cupy-cuda13x",),
}
PROBE = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache doctor``."""
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache doctor``: 0 if everything that is needed is there, else 2."""
    from featcache.datasets.hub import hub_is_reachable
    from featcache.encoders.torch_images import default_device

    versions = {name: _version(name) for name in NEEDED}
    missing = [name for name, found in versions.items() if found is None]
    root = resolve_root(args.root)
    extras = {extra: all(map(_version, names)) for extra, names in EXTRAS.items()}
    speed = _write_speed(root)
    record = {
        "featcache": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "device": default_device(None),
        "cores": os.cpu_count(),
        "extras": extras,
        "hub": hub_is_reachable(),
        "root": str(root),
        "stores": len(list_stores(root)),
        "write_bytes_per_second": speed,
    }
    lines = [
        f"featcache    {__version__}, Python {record['python']}, {platform.system()} {platform.machine()}",
        f"needs        {', '.join(f'{name} {found or chr(63)}' for name, found in versions.items())}",
        f"device       {record['device']} (what --device takes by default), {record['cores']} cores",
        f"extras       {', '.join(f'{name} {_yes(there)}' for name, there in extras.items())} "
        "(pip install 'featcache[NAME]')",
        f"model hub    {'reachable' if record['hub'] else 'not reachable: models come from folders and the cache'}",
        f"stores       {record['stores']} in {root}"
        + (f", which takes {format_bytes(int(speed))}/s" if speed else f" ({_why_not(root)})"),
    ]
    if missing:
        lines.append(f"MISSING      {', '.join(missing)}: pip install {' '.join(missing)}")
    show(record, "\n".join(lines), args.json)
    return 2 if missing else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _why_not(root: StorePath) -> str:
    """Why no speed was measured."""
    if not isinstance(root, Path):
        return "not a folder of this machine: its speed is not measured"
    return "not writable" if root.exists() else "not there yet"


def _write_speed(root: StorePath) -> float | None:
    """Bytes per second of one synced write; None where there is no folder to write to. Nothing is left behind."""
    if not isinstance(root, Path) or not root.is_dir() or not os.access(root, os.W_OK):
        return None
    content = os.urandom(PROBE)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return PROBE / (time.perf_counter() - began)
