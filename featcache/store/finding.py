"""Finding and opening stores by path, key or short name."""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from featcache.errors import FeatcacheWarning, MismatchError, StoreCorruptError, StoreNotFoundError
from featcache.store.catalogue import KINDS, Entry, list_stores
from featcache.store.key import Json, resolve_root
from featcache.store.layout import HEADER, HIT, MANIFEST
from featcache.store.manifest import manifest_or_none, read_header, read_manifest
from featcache.store.places import StorePath, location, read_or_none, stat
from featcache.store.reading.base import Store, read_provenance
from featcache.store.reading.checks import remedy
from featcache.store.reading.images import ImageStore, find_part
from featcache.store.reading.texts import BankStore, PriorStore, TextStore

S = TypeVar("S", bound=Store)
NEAREST, CUTOFF = 5, 0.75
KEY = re.compile(r"[0-9a-f]{4,24}(?:/[0-9a-f]{0,24})?")
SHOWN_KEY = 8
ASIDE = re.compile(r"(?:.*/)?(?:alpha=[0-9.]+|\.[^/]*)")
"""Intermediate models of a command (interpolations of `wise`, soups); a reference without a model skips them."""


def open_store(path: str | StorePath, reader: str = "mapped", verify: str = "read") -> Store:
    """Open a finished store of any kind; `open_image_store` and `open_text_store` also declare its type.

    Parameters
    ----------
    path : the store's folder, or a str that `find_store` finds below the default root, such as ``"digits/test"``
    reader : "mapped" reads chunk files directly, "zarr" uses zarr-python; the rows are equal
    verify : "read" compares each chunk with its checksum when it is first read, once per process; "never" trusts the
        disk

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreCorruptError
        There is no such store; encoding has not finished; a file is missing or has the wrong size (when the store is
        opened), or differs from its checksum (when it is read).
    """
    folder = location(path)
    try:
        manifest = read_manifest(folder)
    except StoreNotFoundError:
        if not isinstance(path, str) or (isinstance(folder, Path) and folder.is_absolute()):
            raise
        return find_store(path, reader=reader, verify=verify)
    header = read_header(folder)
    if manifest.kind not in KINDS:
        raise StoreCorruptError(
            f"{folder / MANIFEST}: of kind {manifest.kind!r}, expected one of {', '.join(KINDS)}; open a tap or view "
            "through its store"
        )
    if header is not None and header.key != manifest.key:
        raise StoreCorruptError(
            f"{folder}: {MANIFEST} belongs to the store {manifest.key}, {HEADER} to {header.key}; {remedy(folder)}"
        )
    return KINDS[manifest.kind](folder, manifest, reader, verify)


def open_as(expected: type[S], path: str | StorePath, reader: str = "mapped", verify: str = "read") -> S:
    """`open_store` for one kind of store; MismatchError if it holds something else."""
    store = open_store(path, reader, verify)
    if not isinstance(store, expected):
        raise MismatchError(
            f"{path}: a store of {store.kind}; expected a store of {expected.kind}, made by `{expected.made_by}`"
        )
    return store


open_image_store = partial(open_as, ImageStore)
open_text_store = partial(open_as, TextStore)
open_bank_store = partial(open_as, BankStore)
open_prior_store = partial(open_as, PriorStore)


def find_store(
    reference: str | StorePath,
    root: str | StorePath | None = None,
    *,
    reader: str = "mapped",
    verify: str = "read",
    **search: Any,
) -> Store:
    """Open the store that `find_path` finds, or one of its taps or views, given after ``#``.

    ``NAME/SPLIT@MODEL#pre_projection`` is a tap, ``...#view-plain-0-3`` view 3 of the augmentation `plain` with seed 0,
    ``...#views`` all views (if they have one augmentation and seed), ``...#views:pre_projection`` a tap of all views.
    See `find_path` for `root` and **search, and `open_store` for `reader` and `verify`.

    Examples
    --------
    >>> import featcache, tempfile
    >>> root = tempfile.mkdtemp()
    >>> _ = featcache.encode("digits", "test", root=root)
    >>> find_store("digits/test", root).dim
    128
    """
    whole, mark, part = reference.rpartition("#") if isinstance(reference, str) else ("", "", "")
    if not mark or KEY.fullmatch(part) or stat(location(str(reference)) / MANIFEST) is not None:
        return open_store(find_path(reference, root, **search), reader, verify)
    store = open_store(find_path(whole, root, **search), reader, verify)
    if not isinstance(store, ImageStore):
        raise StoreNotFoundError(f"{reference}: only stores of images have taps and views")
    return find_part(store, part)


def find_path(
    reference: str | StorePath,
    root: str | StorePath | None = None,
    *,
    suggest: bool = True,
    fits: Callable[[Entry], bool] | None = None,
    only: bool = False,
) -> StorePath:
    """Folder of a store, given its folder, its key (or the beginning of it), or its short name.

    If several stores have that name (a data set that grew, another training run), the newest is taken, and of texts the
    one that `featcache text` wrote or found last, with a `FeatcacheWarning` that names the others. StoreNotFoundError,
    which lists references that work, if no store matches, or stores of several models do.

    Parameters
    ----------
    reference
        A folder; ``<encoder_key>/<dataset_key>`` or the beginnings of both; ``NAME/SPLIT[@MODEL][#KEY]`` for images;
        ``texts/NAME[@MODEL][#KEY]`` for texts. A model loaded from a folder can be given by the end of its path, as in
        ``@RUN2/best``. KEY is the beginning of either half of the store's key.
    root : default: ``$FEATCACHE_ROOT``, else ``./cache``
    suggest : whether the error message suggests similar names; False if the store is to be deleted
    fits : preferred stores if several have the name, such as those of a head's encoder
    only : raise an error if several stores have the name, instead of taking the latest
    """
    folder, root = location(reference), resolve_root(root)
    if stat(folder / MANIFEST) is not None or read_header(folder) is not None:
        return folder
    wanted = str(reference)
    entries = list_stores(root)
    matches = _of_name(wanted, entries)
    if len(matches) > 1 and fits is not None:
        matches = list(filter(fits, matches)) or matches
    if len(matches) > 1 and not only:
        matches = _latest(wanted, matches, entries)
    matches = matches or [entry for entry in entries if _has_key(entry, wanted)]
    if len(matches) == 1:
        return matches[0].path
    raise _several_match(wanted, matches, entries) if matches else _none_matches(wanted, root, entries, suggest)


def _of_name(wanted: str, entries: Sequence[Entry]) -> list[Entry]:
    """The finished stores with a short name."""
    name, mark, key = wanted.rpartition("#")
    if not mark or not KEY.fullmatch(key):
        name, key = wanted, ""
    short, _, model = name.partition("@")
    return [
        entry
        for entry in entries
        if entry.finished
        and (name in (entry.short, *entry.references) or (model and entry.short == short and _is_model(entry, model)))
        and (not key or _has_key(entry, key, either=True))
    ]


def _is_model(entry: Entry, model: str) -> bool:
    """Whether a name of the encoder, or the folder it was loaded from, ends in the path `model`."""
    ends = f"/{model}"
    if any(name.endswith(ends) or name == openai_name(model) for name in entry.models):
        return True
    if not any(ends.endswith(f"/{name}") for name in entry.models):
        return False  # the folder ends in the model's name, so the provenance need not be read
    source = _provenance(entry).get("source")
    loaded = source.get("model") if isinstance(source, dict) else None
    return isinstance(loaded, str) and loaded.replace(":", "/").endswith(ends)


def openai_name(model: str) -> str:
    """Name in stores of one of OpenAI's models, given OpenAI's name for it.

    >>> openai_name("ViT-L/14@336px")
    'ViT-L-14-336-quickgelu/openai'
    """
    return f"{model.replace('/', '-').replace('@', '-').removesuffix('px')}-quickgelu/openai"


def _has_key(entry: Entry, wanted: str, *, either: bool = False) -> bool:
    """Whether a store's key, or with `either` one half of it, starts with `wanted`."""
    encoder, _, dataset = wanted.partition("/")
    own_encoder, _, own_dataset = entry.key.partition("/")
    if either and not dataset and own_dataset.startswith(encoder):
        return True
    return len(encoder) >= 4 and own_encoder.startswith(encoder) and own_dataset.startswith(dataset)


def _latest(wanted: str, matches: list[Entry], entries: Sequence[Entry]) -> list[Entry]:
    """The latest of several stores of one model, with a warning; all of them if they are of different models."""
    if "@" not in wanted:
        matches = [entry for entry in matches if not _is_aside(entry)] or matches
        if not set.intersection(*(set(entry.models) for entry in matches)):
            return matches
    first, *others = sorted(matches, key=_written, reverse=True)
    if others:
        named = ", ".join(address(entry, entries) for entry in others)
        warnings.warn(
            f"{wanted}: {len(matches)} stores have this name; the latest is used, {address(first, entries)} "
            f"(written or found again {_written(first)[0]}); to use another, write {named}",
            FeatcacheWarning,
            stacklevel=4,
        )
    return [first]


def _is_aside(entry: Entry) -> bool:
    """Whether all names of a model match `ASIDE`, or are the ``best`` of a folder that also holds an ``alpha=...``."""
    aside = {name for name in entry.models if ASIDE.fullmatch(name)}
    chosen = {f"{folder}{slash}best" for folder, slash, _ in (name.rpartition("/") for name in aside)}
    return set(entry.models) <= aside | chosen


def _written(entry: Entry) -> tuple[str, float]:
    """Sort key: when a store was written, or texts were found again, by its own records and then by its file times."""
    hit = (read_or_none(entry.path / HIT) or b"").decode(errors="replace")
    return max(str(_provenance(entry).get("written", "")), hit), entry.modified


def address(entry: Entry, entries: Sequence[Entry]) -> str:
    """The shortest reference that only this store matches: one of its names, with part of its key if necessary."""
    rivals = [other for other in entries if other.short == entry.short and other.finished and other is not entry]
    for reference in entry.references:
        if not _of_name(reference, rivals):
            return reference
    rivals = _of_name(entry.reference, rivals)
    encoder, _, dataset = (half[:SHOWN_KEY] for half in entry.key.partition("/"))
    for key in (dataset, encoder):
        if not any(_has_key(other, key, either=True) for other in rivals):
            return f"{entry.reference}#{key}"
    return f"{entry.reference}#{encoder}/{dataset}"


def _several_match(wanted: str, matches: list[Entry], entries: Sequence[Entry]) -> StoreNotFoundError:
    what, shown = "write one of", [address(entry, entries) for entry in matches]
    if not all(entry.finished for entry in matches):
        what, shown = "give the folder of one", [f"{entry.path} ({entry.reference})" for entry in matches]
    return StoreNotFoundError(f"{wanted}: {len(matches)} stores match; {what}: {', '.join(shown)}")


def _none_matches(wanted: str, root: StorePath, entries: list[Entry], suggest: bool) -> StoreNotFoundError:
    what = "holds no store" if Path(wanted).is_dir() else "no such folder"
    near = _nearest(wanted, [entry for entry in entries if entry.finished]) if suggest else []
    hint = f"; similar: {', '.join(near)}" if near else ""
    waiting = sum(not entry.finished for entry in entries)
    unfinished = f" ({waiting} unfinished or damaged: run the command that made it again)" if waiting else ""
    there = f"`featcache list` shows all {len(entries)}{unfinished}" if entries else "there is none at all"
    return StoreNotFoundError(f"{wanted}: {what}, and no store of that name below {root}{hint}; {there}")


def _nearest(wanted: str, entries: list[Entry]) -> list[str]:
    """References similar to the wanted one, then those of the same data set."""
    names = {name: entry.reference for entry in entries for name in (entry.short, *entry.references)}
    alike = [names[name] for name in difflib.get_close_matches(wanted, names, n=NEAREST, cutoff=CUTOFF)]
    data, slash, _ = wanted.partition("/")
    same = [entry.reference for entry in entries if slash and entry.short.startswith(f"{data}/")]
    return list(dict.fromkeys(alike + same))[:NEAREST]


def _provenance(entry: Entry) -> Json:
    """Provenance of a store; empty if it is not finished."""
    manifest = manifest_or_none(entry.path)
    return {} if manifest is None else read_provenance(entry.path, manifest)
