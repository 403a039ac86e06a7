"""featcache: encode images and texts once, then fit and evaluate heads from the stored features.

>>> import featcache
>>> featcache.__version__
'0.1.0'

The public names are listed in featcache/api.py and imported on first use, so that ``import heads.kernels.cuda`` needs
neither zarr nor pyarrow, and ``featcache --help`` does not import torch. `featcache.heads` and `featcache.ft` are the
packages `heads` and `ft`.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import ft as ft
    import heads as heads
    from featcache.api import *  # noqa: F403

SIBLINGS = ("heads", "ft")


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) for a package whose public names are in its module `api`."""

    def get(name: str) -> Any:
        if package == "featcache" and name in SIBLINGS:
            return sibling(name)
        if name == "__all__" or not name.startswith("__"):
            api = import_module(f"{package}.api")
            if name == "__all__" or name in api.__all__:
                return getattr(api, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        also = SIBLINGS if package == "featcache" else ()
        return sorted({*vars(sys.modules[package]), *import_module(f"{package}.api").__all__, *also})

    return get, names


def sibling(name: str) -> ModuleType:
    """The package `heads` or `ft` that was installed with featcache.

    ImportError if another module has that name, such as a user's own ``heads.py`` in the folder of the script.
    """
    found = sys.modules.get(name)
    spec = found.__spec__ if found else find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec else []  # without __init__.py, there is no origin
    origin = next(iter([spec.origin] if spec and spec.origin else folders), None)
    expected = Path(__file__).resolve().parents[1] / name / "__init__.py"
    if origin is None or Path(origin).resolve() != expected:
        raise ImportError(
            f"'import {name}' finds {origin or 'nothing'}, expected {expected}; "
            f"rename what it finds, or run from a folder without {name}.py and without a folder {name}"
        )
    return import_module(name)


class _Aliases:
    """Imports of ``featcache.heads``, ``featcache.ft`` and below give the modules of `heads` and `ft`, not copies."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != __name__ or rest.partition(".")[0] not in SIBLINGS:
            return None
        return spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = spec.name.partition(".")[2]
        sibling(name.partition(".")[0])
        module = import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module ran under its own name, whose spec it keeps."""
        module.__spec__ = module.__spec__.loader_state  # type: ignore[union-attr]


sys.meta_path.insert(0, _Aliases())

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__)
