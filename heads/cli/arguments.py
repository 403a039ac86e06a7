"""Arguments that several verbs of heads share, and the stores and heads that they name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.cli.arguments import root_argument
from featcache.errors import HeadError
from featcache.store import ImageStore, TextStore, check_deep, find_store, resolve_root
from featcache.store.images import ImageFeatures
from heads import LogitHead, load
from heads.estimators.fit import Material
from heads.fitted.linear import as_linear
from heads.rows.in_memory import ResidentStore, resident


def device_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of verbs that can work on a GPU."""
    parser.add_argument(
        "--device",
        dest="rows_device",  # other verbs have a device for the encoder
        help="hold features in the memory of this device, such as cuda, and work there (default: stream, on the CPU)",
    )


def store_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every verb that reads stores."""
    parser.add_argument("--no-verify", action="store_true", help="do not check the stores' checksums first")
    root_argument(parser)


def json_setting(setting: str, known: Sequence[str]) -> tuple[str, Any]:
    """Name and value of ``NAME=JSON``.

    Raises
    ------
    HeadError
        For another form, a name that is not known, or no JSON value.
    """
    name, equals, value = setting.partition("=")
    if not equals or name not in known:
        raise HeadError(f"--set {setting}: expected NAME=VALUE with one of the names {', '.join(known)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise HeadError(f"--set {setting}: {value!r} is no JSON value; quote texts twice: '\"text\"'") from None


def open_reference(reference: str, args: argparse.Namespace) -> Any:
    """The store that a reference means, verified unless ``--no-verify``; with ``--device``, features in its memory."""
    store = find_store(reference, resolve_root(args.root))
    if not args.no_verify:
        check_deep(store.path)
    device = getattr(args, "rows_device", None)
    if device is None or not isinstance(store, ImageFeatures):
        return store
    if store.groups is not None:
        raise HeadError(f"--device {device}: {reference} stacks views, which are streamed; leave --device out")
    return resident(store, device)


def prior_head(reference: str, args: argparse.Namespace) -> Any:
    """The linear head in a file, or the zero-shot head of a text store."""
    if Path(reference).is_file():
        return as_linear(load(reference))
    store = open_reference(reference, args)
    if not isinstance(store, TextStore):
        raise HeadError(f"--prior {reference}: a store of images; give a head's file, or a store of texts")
    return Material(texts=[store]).text_head()


def open_images(reference: str, args: argparse.Namespace) -> ImageStore | ResidentStore:
    """The image store that a reference means; HeadError for a store of texts."""
    store = open_reference(reference, args)
    if not isinstance(store, ImageStore | ResidentStore):
        what = "a store of texts, or several views as one"
        raise HeadError(f"{reference}: {what}; expected a store of images, made by `featcache encode`")
    return store


def load_heads(paths: Sequence[str]) -> list[LogitHead]:
    """The heads, those of one kind told apart by their files' names."""
    heads = [load(path) for path in paths]
    names = [head.name for head in heads]
    return [
        replace(head, name=f"{head.name}:{Path(path).stem}") if names.count(head.name) > 1 else head  # type: ignore[type-var]
        for head, path in zip(heads, paths, strict=True)
    ]
