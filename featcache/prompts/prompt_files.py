"""Prompt files: sentences for each class, often written by a language model (RegFT, arXiv:2406.05432; CuPL).

JSON, ``{class name: [sentence, ...]}``. The number of sentences may differ from class to class.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.errors import DatasetError, PromptError
from featcache.progress import first_few
from featcache.prompts.templates import PLACEHOLDER
from featcache.prompts.text_files import read_lines


def load_prompt_file(path: str | Path) -> dict[str, list[str]]:
    """Read a prompt file: class name, as written in the file, -> sentences. `prompts_of` gives those of a class list.

    PromptError if the file is not JSON, a class occurs twice or has no sentence, or a sentence is not a string, is
    empty, or is a template (``{}``). The error names the line or the class.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(f"{folder}/p.json").write_text('{"tree frog": ["A tree frog is green.", "It sits on leaves."]}')
    ...     load_prompt_file(f"{folder}/p.json")
    {'tree frog': ['A tree frog is green.', 'It sits on leaves.']}
    """
    path = Path(path)
    try:
        pairs = json.loads("\n".join(read_lines(path)), object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); expected {{class name: [sentence, ...]}}"
        ) from error
    except (DatasetError, ValueError, RecursionError) as error:
        raise PromptError(f"{path}: not a prompt file: {error}") from error
    if not isinstance(pairs, _Pairs) or not pairs:
        raise PromptError(f"{path}: got {type(pairs).__name__}; expected {{class name: [sentence, ...]}}")
    prompts: dict[str, list[str]] = {}
    for name, sentences in pairs:
        if name in prompts:
            raise PromptError(f"{path}: class {name!r} occurs twice; put its sentences into one list")
        _check_sentences(sentences, f"{path}: class {name!r}")
        prompts[name] = sentences
    return prompts


def prompts_of(prompts: Mapping[str, Sequence[str]], classnames: Sequence[str]) -> list[list[str]]:
    """The sentences of each class, in the order of `classnames`.

    A class is looked up as written, and then with ``_`` and spaces taken as equal, since class lists often come from
    folder names.

    PromptError if classes have no entry (the error counts them and names some), or two entries differ in ``_`` alone.

    >>> prompts_of({"tree frog": ["It is green."], "owl": ["It flies."]}, ["owl", "tree_frog"])
    [['It flies.'], ['It is green.']]
    """
    spaced: dict[str, list[str]] = {}
    for key in prompts:
        spaced.setdefault(key.replace("_", " "), []).append(key)
    found: list[list[str]] = []
    missing: list[str] = []
    for name in classnames:
        keys = [name] if name in prompts else spaced.get(name.replace("_", " "), [])
        if len(keys) > 1:
            raise PromptError(f"class {name!r} fits the entries {keys}; keep one of them")
        if keys:
            found.append(list(prompts[keys[0]]))
        else:
            missing.append(name)
    if missing:
        raise PromptError(
            f"no sentences for {len(missing)} of {len(classnames)} classes: {first_few(map(repr, missing))}; the "
            f"prompt file has {len(prompts)} classes, such as {', '.join(map(repr, list(prompts)[:3]))}: add the "
            "missing ones"
        )
    return found


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as pairs, in which repeated keys can be found."""


def _check_sentences(sentences: object, where: str) -> None:
    if isinstance(sentences, _Pairs) or not isinstance(sentences, list) or not sentences:
        raise PromptError(f"{where}: got {sentences!r:.60}; expected a list with at least one sentence")
    for number, sentence in enumerate(sentences, start=1):
        if not isinstance(sentence, str) or not sentence.strip():
            raise PromptError(f"{where}, sentence {number}: got {sentence!r:.60}; expected a string")
        if PLACEHOLDER.search(sentence):
            raise PromptError(
                f"{where}, sentence {number}: got the template {sentence!r}; prompt files hold whole sentences: "
                "write the class name, or use templates"
            )
