"""The verb ``featcache text``: embed class names times templates, or a prompt file, into a text store."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import alias_note, encoder_of, model_arguments, progress_of, repeated_note, show, typed
from featcache.datasets import DATASETS, Dataset, open_datasets
from featcache.datasets.options import WHOLE
from featcache.encoders.published import check_reachable
from featcache.errors import DatasetError, PromptError, StoreNotFoundError
from featcache.parameters import Count
from featcache.progress import format_seconds
from featcache.prompts import class_list_names, load_classnames, load_prompt_file, load_templates
from featcache.store import ImageStore, TextStore, find_store

if TYPE_CHECKING:
    from featcache.encoding.store_job import JobResult, S
    from featcache.encoding.texts import TextResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache text``."""
    add = parser.add_argument
    add(
        "classes",
        metavar="CLASSES",
        nargs="?",
        help="source of the class names: a data set (digits, imagefolder:DIR), a store (NAME/SPLIT), a built-in list ("
        f"{', '.join(class_list_names())}), or a file with one name per line",
    )
    add("--split", help="split of the data set (default: train, or all if it has no splits)")
    add("--templates", default="simple", help="template set, file, or one with {} (default: simple)")
    add("--prompts", metavar="FILE", help="JSON {class: [sentence, ...]} instead of templates")
    add("--name", help="name of the store in listings")
    add("--random", type=typed(Count), metavar="M", help="a bank of M random texts instead of classes (Lipsum)")
    add("--length", type=typed(Count), default=8, metavar="L", help="tokens per random text (default: 8)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the random texts (default: 0)")
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache text CLASSES --templates T``, or ``featcache text --random M``."""
    if (args.random is None) == (args.classes is None):
        raise PromptError("featcache text: expected class names (digits, imagefolder:DIR, FILE), or --random M")
    check_reachable(args.model, args.pretrained)  # before class lists, some of which import open_clip
    return _class_texts(args) if args.random is None else _random_texts(args)


def _class_texts(args: argparse.Namespace) -> int:
    classnames, name = classnames_of(args.classes, args.split, args.root)
    name = args.name or name
    prompts = load_prompt_file(args.prompts) if args.prompts else None
    templates = None if prompts is not None else load_templates(args.templates)
    encoder = encoder_of(args)
    from featcache.encoding.texts import embed_prompts  # last, so that errors about the model come early

    where = {"name": name, "root": args.root}
    result = embed_prompts(classnames, templates, encoder, prompts=prompts, progress=progress_of(args), **where)
    store = result.store
    record = {"store": str(store.path), "classes": len(store), "prompts": store.raw.shape[1], "hit": result.hit}
    other = repeated_note(store.classnames)
    if store.name != name:
        other += (
            f"\n  same texts as texts/{store.name}: the store keeps that name; to change it: "
            f"featcache rename texts/{store.name}@{store.encoder_name} {name}"
        )
    show(record, describe_text(result) + other + alias_note(store, encoder), args.json)
    return 0


def _random_texts(args: argparse.Namespace) -> int:
    encoder = encoder_of(args)
    from featcache.encoding.banks import embed_random_texts

    settings = {"length": args.length, "seed": args.seed, "name": args.name, "root": args.root}
    result = embed_random_texts(args.random, encoder, **settings, progress=progress_of(args))
    store = result.store
    record = {"store": str(store.path), "texts": len(store), "dim": store.dim, "error": store.error, "hit": result.hit}
    shape = f"{len(store):,} random texts x {store.dim}, second moment within {store.error:.2%}"
    show(record, f"banks/{store.name}@{store.encoder_name}: {shape}, {_how(result)}\n  {store.path}", args.json)
    return 0


def describe_text(result: TextResult) -> str:
    """Summary of a text run: one line, and the store's path."""
    store = result.store
    return f"texts/{store.name}@{store.encoder_name}: {store.counted} x {store.dim}, {_how(result)}\n  {store.path}"


def _how(result: JobResult[S]) -> str:
    return "cache hit, no text encoded" if result.hit else f"encoded in {format_seconds(result.seconds)}"


def classnames_of(classes: str, split: str | None, root: str | None = None) -> tuple[Sequence[str], str]:
    """Class names from a data set, a built-in list, a store or a file; and the default name of the store."""
    if classes in class_list_names():
        return load_classnames(classes), classes
    source = classes.partition(":")[0]
    if source in DATASETS:
        dataset = _opened(classes, split)
        return dataset.index.classnames, classes.split(":")[1] if source == "collection" else dataset.name
    if "/" in classes and not Path(classes).exists():
        try:
            store = find_store(classes, root)
            if isinstance(store, ImageStore | TextStore):
                return store.classnames, store.info["name"]
        except StoreNotFoundError:
            if not Path(classes).suffix:
                raise
    return load_classnames(classes), Path(classes).stem


def _opened(spec: str, split: str | None) -> Dataset:
    """The split of a data set; default: ``train``, or ``all`` if it has no splits."""
    try:
        return open_datasets(spec, split or "train")[0]
    except DatasetError:
        if split is not None:
            raise
        with contextlib.suppress(DatasetError):
            return open_datasets(spec, WHOLE)[0]
        raise
