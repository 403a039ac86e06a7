"""Packages whose public names are imported when they are first asked for.

``import heads.kernels.cuda`` runs ``heads/__init__.py`` first; were every head imported there, a GPU kernel would need
zarr, pyarrow and scikit-learn. A lazy package says in its ``api`` module what its names are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["lazy_package"]


def lazy_package(package: str, api: str, functions: frozenset[str] = frozenset()) -> None:
    """Give the module `package` the names of ``__all__`` of the module `api`, on demand.

    Parameters
    ----------
    package, api
        Full module names; the package calls this from its ``__init__.py`` and imports nothing itself.
    functions
        Public names that submodules have too (``heads.evaluate``): there the package's attribute is the public
        object, as it would be had ``__init__.py`` imported it, and not the submodule.
    """

    class Lazy(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in functions and isinstance(value, ModuleType)):  # the import system binds submodules
                super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            special = name.startswith("__") and name != "__all__"
            if special or not (name == "__all__" or name in import_module(api).__all__):
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(api), name)
            setattr(self, name, value)
            return value

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *import_module(api).__all__})

    sys.modules[package].__class__ = Lazy
