"""Prompt templates: named sets, and files."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from featcache.errors import DatasetError, PromptError
from featcache.prompts.imagenet import openai_imagenet_templates
from featcache.prompts.text_files import packaged_json, read_lines

PLACEHOLDER = re.compile(r"\{[ac]?\}")
ARTICLE = "{a}"
OPENAI = "openai-imagenet"


def load_templates(name_or_file: str | Path) -> tuple[str, ...]:
    """Load a named set of templates or a file, or take a single template.

    Parameters
    ----------
    name_or_file : one of `template_names`; or a file: ``.json`` with a list of strings, else text with one template per
        line (blank lines and lines that start with ``#`` are skipped); or one template. A name wins over a file of that
        name, and a file over a template.

    Returns
    -------
    tuple of T str
        Each with ``{}`` or ``{c}`` for the class name, or ``{a}`` for the class name `with_article`.

    PromptError if there is no such set or file, or a template has no ``{}`` for the class name.

    >>> load_templates("clip-example"), load_templates("a sketch of a {}.")
    (('a photo of the number: "{}".',), ('a sketch of a {}.',))
    """
    if name_or_file == OPENAI:
        return openai_imagenet_templates()
    if str(name_or_file) in _named():
        return _named()[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        if PLACEHOLDER.search(str(name_or_file)):
            return (str(name_or_file),)
        raise PromptError(
            f"templates {str(name_or_file)!r}: neither a named set, nor a file, nor a template with {{}}; "
            f"the named sets are {', '.join(template_names())}"
        )
    return _templates_of(path)


def template_names() -> list[str]:
    """Names of the template sets, sorted; ``openai-imagenet`` is CLIP's set of 80, from open_clip.

    >>> template_names()
    ['bare', 'clip-example', 'digits', 'fmow', 'iwildcam', 'openai-imagenet', 'picture', 'simple']
    """
    return sorted([*_named(), OPENAI])


def fill(templates: Sequence[str], classnames: Sequence[str], *, replace_underscores: bool = False) -> list[list[str]]:
    """Put every class name into every template.

    Parameters
    ----------
    templates : T templates
    classnames : C names, inserted unchanged; they may repeat
    replace_underscores : turn ``_`` in class names into spaces; the published DomainNet numbers keep them

    PromptError if there is no template or class name, or a template has no ``{}`` for the class name.

    >>> fill(["a {}.", "the {c}!"], ["ice_cream"], replace_underscores=True)
    [['a ice cream.', 'the ice cream!']]
    >>> fill(["a {}.", "{a}."], ["ice_cream"])
    [['a ice_cream.', 'an ice cream.']]
    """
    if not templates or not classnames:
        raise PromptError(
            f"got {len(templates)} templates and {len(classnames)} class names; expected at least one of each"
        )
    for template in templates:
        _check(template, "template")
    if replace_underscores:
        classnames = [name.replace("_", " ") for name in classnames]
    return [[_filled(template, name) for template in templates] for name in classnames]


def _filled(template: str, name: str) -> str:
    # A function, not a replacement string, keeps backslashes and braces of names.
    return PLACEHOLDER.sub(lambda place: with_article(name) if place[0] == ARTICLE else name, template)


def with_article(name: str) -> str:
    """A class name with its indefinite article, chosen by the first letter as in WiSE-FT, and spaces for ``_``.

    >>> with_article("airport_hangar"), with_article("zoo")
    ('an airport hangar', 'a zoo')
    """
    plain = name.replace("_", " ")
    return f"an {plain}" if plain[:1] in tuple("aeiou") else f"a {plain}"


@cache
def _named() -> dict[str, tuple[str, ...]]:
    return {name: tuple(templates) for name, templates in packaged_json("templates.json").items()}


def _templates_of(path: Path) -> tuple[str, ...]:
    try:
        lines = read_lines(path)
        if path.suffix == ".json":
            found = [(f"{path}:entry {n}", t) for n, t in enumerate(json.loads("\n".join(lines)), start=1)]
        else:
            kept = [(n, line.strip()) for n, line in enumerate(lines, start=1) if not line.startswith("#")]
            found = [(f"{path}:{n}", line) for n, line in kept if line]
    except (DatasetError, TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{path}: expected a list of templates ({error})") from error
    if not found:
        raise PromptError(f"{path}: no template in it; expected e.g. 'a photo of a {{}}.'")
    for where, template in found:
        _check(template, where)
    return tuple(template for _, template in found)


def _check(template: object, where: str) -> None:
    """PromptError unless it is a string with ``{}``, ``{c}`` or ``{a}`` and no other brace."""
    rest, places = PLACEHOLDER.subn("", template) if isinstance(template, str) else ("", 0)
    if places == 0 or "{" in rest or "}" in rest:
        raise PromptError(
            f"{where}: got {template!r}; expected a string with {{}} or {{c}} for the class name and no other brace"
        )
