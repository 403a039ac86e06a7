"""The verb ``featcache doctor``: versions, device, extras, the model hub, and the disk that holds the stores."""

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

TORCH = ("torch", "torchvision", "open_clip_torch", "timm")
NEEDED = (*TORCH, "zarr", "numpy", "scipy", "scikit-learn", "pyarrow", "numba")
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
    """``featcache doctor``: exit code 0 if all required packages are installed, else 2."""
    from featcache.datasets.hub import hub_is_reachable
    from featcache.encoders.torch_images import default_device

    versions = {name: _version(name) for name in NEEDED}
    missing = [name for name, found in versions.items() if found is None]
    root = resolve_root(args.root)
    extras = {extra: all(map(_version, names)) for extra, names in EXTRAS.items()}
    speed, writes = _write_speed(root)
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
    shown = ", ".join(f"{extra} {'yes' if there else 'no'}" for extra, there in extras.items())
    lines = [
        f"featcache    {__version__}, Python {record['python']}, {platform.system()} {platform.machine()}",
        f"needs        {', '.join(f'{name} {found or chr(63)}' for name, found in versions.items())}",
        f"device       {record['device']} (default of --device), {record['cores']} cores",
        f"extras       {shown} (pip install 'featcache[NAME]')",
        f"model hub    {'reachable' if record['hub'] else 'not reachable: models come from folders and the cache'}",
        f"stores       {record['stores']} in {root}{writes}",
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


def _write_speed(root: StorePath) -> tuple[float | None, str]:
    """Bytes per second of one synced write to a temporary file, or why it was not measured; and that in words."""
    if not isinstance(root, Path):
        return None, " (not a local folder: write speed not measured)"
    if not root.is_dir() or not os.access(root, os.W_OK):
        return None, " (not writable)" if root.exists() else " (does not exist yet)"
    content = os.urandom(PROBE)
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=root) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    speed = PROBE / (time.perf_counter() - began)
    return speed, f", writes {format_bytes(int(speed))}/s"
