"""Merging model folders, and their heads, by any method of `MERGES`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from featcache import __version__
from featcache.encoders.openclip import OpenClipEncoder
from featcache.errors import EncoderError, MismatchError, TrainingError
from featcache.parameters import Parameter, parameters_of
from ft.checkpoints.folder import check_targets, read_state, write_model_folder
from ft.checkpoints.parents import Parent, account_of, parent_of
from ft.checkpoints.state import State
from ft.merging import INGREDIENTS, MERGES
from ft.merging.moments import moments_path, read_moments
from ft.merging.wise import HEAD_WEIGHT, head_part, head_state, read_tuned, recorded_head, tower_part, weights_of
from heads import LinearHead


def merge(
    method: str,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | Parent | None = None,
    fishers: Sequence[str | Path] = (),
    moments: Sequence[str | Path] = (),
    overwrite: bool = False,
    **settings: object,
) -> Path:
    """Merge models into one model folder, ready to encode. All checks run before anything is written.

    Parameters
    ----------
    method : name in `ft.merging.MERGES`
    models : K model folders or checkpoint files
    out : the new folder
    base
        Model that the others were fine-tuned from, see `ft.checkpoints.parents.parent_of`. Configuration and tokenizer
        come from it, or by default from the first of `models`.
    fishers : K files of ``featcache fisher``, for the method ``fisher``
    moments : K files of ``featcache moments``, for ``regmean``; default: those beside the model folders
    overwrite : replace an existing folder
    **settings : parameters of the method, such as ``scale=0.4``

    Raises
    ------
    TrainingError
        The method or a setting is unknown, or the method needs a base or Fisher information that is not given.
    EncoderError
        A model cannot be read, or the folder exists.
    MismatchError
        Models differ in keys, shapes, architecture or preprocessing; or moments belong to other weights.
    """
    check_settings(method, settings)
    _check_number(method, "models", len(models), None)
    target = Path(out).expanduser()
    check_targets([target], overwrite)
    needs = needs_of(method)
    parent = parent_of(models[0] if base is None else base)
    if "base" in needs and base is None:
        raise TrainingError(f"{method} starts from the model that the others were fine-tuned from; give it (--base)")
    files = [weights_of(parent, name) for name in models]
    ingredients: dict[str, object] = {}
    if "fishers" in needs:
        _check_number(method, "Fisher files (--fisher)", len(fishers), len(models))
        ingredients["fishers"] = [tower_part(read_state(path)) for path in fishers]
    if "moments" in needs:
        found = [Path(path) for path in moments] or [moments_path(file.parent) for file in files]
        _check_number(method, "moment files (--moments)", len(found), len(models))
        if missing := [path for path in found if not path.is_file()]:
            raise EncoderError(
                f"{missing[0]}: no such file; make it with `featcache moments DATASET:SPLIT --model local-dir:FOLDER`"
            )
        ingredients["moments"] = [read_moments(path, file) for path, file in zip(found, files, strict=True)]
    start = parent.state()
    ingredients |= {"states": [read_tuned(file, start) for file in files], "base": start}
    merged = MERGES[method](**{name: ingredients[name] for name in needs}, **settings)
    record = {
        "featcache": __version__,
        "method": method,
        "settings": settings,
        "base": None if base is None else parent.account(),
        "models": [account_of(file) for file in files],
    }
    return write_model_folder(parent.source, merged, target, record, overwrite=overwrite)


def merge_heads(
    method: str,
    heads: Sequence[LinearHead],
    encoder: OpenClipEncoder,
    *,
    base: LinearHead | None = None,
    fishers: Sequence[State] = (),
    moments: Sequence[State] = (),
    **settings: object,
) -> LinearHead:
    """Merge the heads of merged models by the same formula: the classifier is a layer of the model.

    Parameters
    ----------
    method, **settings : see `merge`
    heads : K heads
    encoder : the merged model
    base : head of the base, for methods that need one
    fishers, moments : K state dicts, contents of the files that `merge` reads; the keys of the head are used

    Raises
    ------
    TrainingError
        The method needs the head of a base, and there is none.
    MismatchError
        Classes or widths of the heads differ.
    """
    check_settings(method, settings)
    every = [*heads, *([] if base is None else [base])]
    if len({head.classnames for head in every}) > 1:
        raise MismatchError(f"heads {', '.join(head.name for head in every)} have different classes; expected the same")
    needs = needs_of(method)
    if "base" in needs and base is None:
        raise TrainingError(f"{method} starts from the base's head; give it first, as in --heads START A B")
    ingredients: dict[str, object] = {
        "states": [head_state(head) for head in heads],
        "base": None if base is None else head_state(base),
        "fishers": [head_part(found) for found in fishers],
        "moments": [{key: v for key, v in found.items() if key.rpartition("@")[0] == HEAD_WEIGHT} for found in moments],
    }
    merged = MERGES[method](**{name: ingredients[name] for name in needs}, **settings)
    used = every if "base" in needs else heads
    params = {"method": method, **settings, "heads": [head.name for head in used]}
    return recorded_head(merged, used, encoder, "merged", params)


def needs_of(method: str) -> list[str]:
    """Inputs that a method takes, of `INGREDIENTS`."""
    return [name for name in _declared(method) if name in INGREDIENTS]


def settings_of(method: str) -> dict[str, Parameter]:
    """The parameters of a method, by name."""
    return {name: found for name, found in _declared(method).items() if name not in INGREDIENTS}


def check_settings(method: str, settings: Mapping[str, object]) -> None:
    """Raise TrainingError for settings that a method does not have, and for values that are not allowed."""
    declared = settings_of(method)
    for name, value in settings.items():
        if name not in declared:
            raise TrainingError(f"{method} has no parameter {name!r}; it has {', '.join(declared) or 'none'}")
        try:
            declared[name].check(value)
        except ValueError as error:
            raise TrainingError(f"{method}: {error}") from None


def _declared(method: str) -> dict[str, Parameter]:
    if method not in MERGES:
        raise TrainingError(f"merge {method!r}: expected one of {', '.join(MERGES)}")
    return parameters_of(MERGES[method])


def _check_number(method: str, what: str, found: int, expected: int | None) -> None:
    if found != expected if expected is not None else not found:
        raise TrainingError(f"{method}: {found} {what}; expected {expected or 'at least one'}, one for each model")
