"""Recipes: options of published runs as TOML files, with source and results in a comment at the top.

A recipe sets fields of `ft.training.options.FinetuneOptions`. Other fields keep their defaults, and command-line flags
take precedence. A new recipe is one file in this folder.
"""

import tomllib
from pathlib import Path
from typing import Any

from featcache.errors import TrainingError

__all__ = ["RECIPES", "load_recipe", "recipe_header"]

FOLDER = Path(__file__).parent
RECIPES: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
"""Names of the built-in recipes."""


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Read the options of a recipe.

    Parameters
    ----------
    name : one of `RECIPES`, or a TOML file

    Raises
    ------
    TrainingError
        There is no such recipe, or the file is not TOML.

    Examples
    --------
    >>> load_recipe("lipsum_domainnet")["regularizers"]["lipsum"]["weight"]
    1.0
    """
    path = _path(name)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"recipe {path}: cannot be read as TOML ({error}); expected NAME = VALUE lines") from error


def recipe_header(name: str | Path) -> str:
    """The comment at the top of a recipe: source and published results."""
    lines = _path(name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def _path(name: str | Path) -> Path:
    if str(name) in RECIPES:
        return FOLDER / f"{name}.toml"
    if Path(name).is_file():
        return Path(name)
    raise TrainingError(f"recipe {name}: expected one of {', '.join(RECIPES)}, or a TOML file")
