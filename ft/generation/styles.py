"""Prompt styles: templates for class names, and, in files such as RegFT's, class lists.

A prompt-style file is JSON, ``{style: {"template": ..., "classnames": [...], "save_subdir": [...]}}``. ``template`` is
a template or a list of them, with ``{}`` for the class name. ``classnames`` and ``save_subdir`` (a folder for each
class) are optional. RegFT's ``prompt_styles.json`` is such a file; ``styles.json`` has its templates without the class
lists.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import DatasetError, PromptError
from featcache.prompts.templates import PLACEHOLDER
from featcache.prompts.text_files import read_lines

STYLES = Path(__file__).parent / "styles.json"
EXPECTED = '{style: {"template": text or list, "classnames": [...], "save_subdir": [...]}}, the last two optional'


@dataclass(frozen=True)
class Style:
    """T templates with ``{}`` for the class name, and C pairs (folder, class name), if the file lists classes."""

    templates: tuple[str, ...]
    classes: tuple[tuple[str, str], ...] = ()


def load_style(name: str, path: str | Path | None = None) -> Style:
    """Read one style of a prompt-style file, by default ``styles.json`` of this package.

    Raises PromptError if there is no such file or entry, a template has no ``{}``, or an entry has another form.

    >>> load_style("imagenet")
    Style(templates=('a photo of a {}.',), classes=())
    >>> len(load_style("varied").templates)
    8
    """
    path = STYLES if path is None else Path(path).expanduser()
    try:
        held = json.loads("\n".join(read_lines(path)))
    except (DatasetError, ValueError, RecursionError) as error:
        raise PromptError(f"prompt-style file {path}: {error}; expected JSON, {EXPECTED}") from error
    if not isinstance(held, dict) or not held:
        raise PromptError(f"prompt-style file {path}: got {type(held).__name__}; expected {EXPECTED}")
    if name not in held:
        raise PromptError(f"{path}: no style {name!r}; expected one of {', '.join(held)}")
    return _style(held[name], f"{path}: style {name!r}")


def _style(entry: object, where: str) -> Style:
    entry = entry if isinstance(entry, dict) else {}
    template = entry.get("template")
    templates = _texts([template] if isinstance(template, str) else template, f"{where}: template")
    if not templates:
        raise PromptError(f"{where}: no template; expected {EXPECTED}")
    for text in templates:
        if not PLACEHOLDER.search(text):
            raise PromptError(f"{where}: template {text!r} has no {{}} for the class name; add it")
    names = _texts(entry.get("classnames"), f"{where}: classnames")
    folders = _texts(entry.get("save_subdir"), f"{where}: save_subdir") or names
    if len(folders) != len(names):
        raise PromptError(f"{where}: {len(names)} classnames and {len(folders)} save_subdir; expected equal numbers")
    return Style(tuple(templates), tuple(zip(folders, names, strict=True)))


def _texts(value: object, where: str) -> Sequence[str]:
    if value is None:
        return []
    odd = value if not isinstance(value, list) else next((v for v in value if not isinstance(v, str) or not v), None)
    if odd is not None:
        raise PromptError(f"{where}: got {odd!r}; expected a list of texts")
    return value if isinstance(value, list) else []
