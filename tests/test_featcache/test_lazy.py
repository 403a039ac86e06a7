"""Lazy packages: submodules that need little import little, and public names win over submodules of the same name."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import featcache
import heads

ROOT = Path(__file__).parents[2]
HEAVY = ("zarr", "pyarrow", "sklearn", "scipy", "numba", "open_clip", "torchvision", "safetensors", "xxhash", "PIL")


@pytest.mark.parametrize("package", [featcache, heads])
def test_public_names_are_the_public_objects(package: ModuleType) -> None:
    api = importlib.import_module(f"{package.__name__}.api")
    assert set(api.__all__) <= set(dir(package))
    for name in api.__all__:
        assert getattr(package, name) is getattr(api, name)


@pytest.mark.parametrize("name", ["featcache", "heads"])
def test_a_function_is_not_hidden_by_its_module(name: str) -> None:
    """In whatever order they are imported; a public name that a submodule has too must be in ``functions``."""
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    shared = sorted(modules & set(package.__all__))
    assert shared
    checks = "; ".join(f"import {name}.{both}; assert callable({name}.{both}), {both!r}" for both in shared)
    done = subprocess.run([sys.executable, "-c", checks], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'heads' has no attribute 'Rigde'"):
        heads.Rigde  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from heads import Rigde  # type: ignore[attr-defined]  # noqa: F401
    assert not hasattr(heads, "__wrapped__")


@pytest.mark.parametrize("module", ["heads.kernels", "heads.kernels.cuda", "heads.kernels.triton"])
def test_kernels_import_where_there_is_little_else(module: str) -> None:
    """A machine with a GPU, torch, numpy, and none of what stores and heads need."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gpu_tests_are_collected_where_there_is_little_else() -> None:
    """torch, triton, cupy, numpy and pytest are enough for ``pytest -m gpu tests/test_gpu``."""
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    script = f"{blocked}; import pytest; sys.exit(pytest.main({arguments!r}))"
    bare = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the blocked libraries bring plugins
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_gpu/test_kernels.py: " in done.stdout  # and how many
