"""Public names are imported on first use, and submodules import only what they need."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import featcache
import ft
import heads

ROOT = Path(__file__).parents[2]
HEAVY = ("zarr", "pyarrow", "sklearn", "scipy", "numba", "open_clip", "torchvision", "safetensors", "xxhash", "PIL")


@pytest.mark.parametrize("package", [featcache, heads, ft])
def test_public_names_are_the_public_objects(package: ModuleType) -> None:
    api = importlib.import_module(f"{package.__name__}.api")
    assert set(api.__all__) <= set(dir(package))
    for name in api.__all__:
        assert getattr(package, name) is getattr(api, name)


@pytest.mark.parametrize("package", [featcache, heads, ft])
def test_no_public_name_is_that_of_a_module(package: ModuleType) -> None:
    """Else the import system would put the module in the name's place, depending on the order of imports."""
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)


def test_heads_and_ft_are_attributes_of_featcache() -> None:
    assert featcache.heads is heads
    assert featcache.ft is ft
    assert {"heads", "ft", "encode"} <= set(dir(featcache))


def test_heads_and_ft_are_importable_below_featcache() -> None:
    """One module under two names: classes of both are the same, and nothing runs twice."""
    code = """
import featcache.heads, featcache.heads.estimators.ridge.classifier as below
from featcache.heads import Ridge
from featcache.ft.merging import wise as other
import heads, heads.estimators.ridge.classifier, ft.merging.wise
assert featcache.heads is heads and below is heads.estimators.ridge.classifier and other is ft.merging.wise
assert Ridge is heads.Ridge is below.Ridge
assert heads.__spec__.name == "heads" and below.__spec__.name == below.__name__ == "heads.estimators.ridge.classifier"
try:
    import featcache.heads.nothing
except ModuleNotFoundError as error:
    assert "heads.nothing" in str(error)
else:
    raise AssertionError("imported what is not there")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", ["heads.py", "ft/__init__.py"])
def test_a_file_that_shadows_a_package_is_named(name: str, tmp_path: Path) -> None:
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("answer = 42\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    package = name.partition("/")[0].removesuffix(".py")
    for arguments in (
        ["-m", "featcache", {"heads": "fit", "ft": "wise"}[package], "--help"],
        ["-c", f"import featcache; featcache.{package}"],
        ["-c", f"import featcache.{package}"],
    ):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == (2 if arguments[0] == "-m" else 1)
        assert str(other) in done.stderr.splitlines()[-1]
        assert "rename what it finds" in done.stderr.splitlines()[-1]
        assert arguments[0] == "-c" or "Traceback" not in done.stderr


def test_a_folder_of_caches_that_hides_a_package_is_named(tmp_path: Path) -> None:
    """Such as one that an uninstalled copy leaves in site-packages."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "featcache").symlink_to(ROOT / "featcache")
    (tmp_path / "heads" / "__pycache__").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "library")}
    # Without the path entry of an editable install, where the package would be found.
    code = f"import sys; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]; "
    code += "from featcache.cli.main import main; sys.exit(main(['fit', '--help']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"'import heads' finds {tmp_path / 'heads'}, expected" in done.stderr


def test_unknown_names_raise_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"module 'heads' has no attribute 'Rigde'"):
        heads.Rigde  # noqa: B018
    with pytest.raises(ImportError):
        from heads import Rigde  # noqa: F401
    assert not hasattr(heads, "__wrapped__")


@pytest.mark.parametrize("module", ["heads.kernels", "heads.kernels.cuda", "heads.kernels.triton"])
def test_kernels_import_with_few_libraries(module: str) -> None:
    """A machine with a GPU, torch, numpy, and none of what stores and heads need."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gpu_tests_are_collected_with_few_libraries() -> None:
    """torch, triton, cupy, numpy and pytest are enough for ``pytest -m gpu tests/test_gpu``."""
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    script = f"{blocked}; import pytest; sys.exit(pytest.main({arguments!r}))"
    bare = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the blocked libraries bring plugins
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_gpu/test_kernels.py: " in done.stdout  # and how many
