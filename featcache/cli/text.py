"""The verb ``featcache text``: class names times templates, or a prompt file, into a text store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from featcache.cli.arguments import _progress, model_arguments, show
from featcache.cli.encode import _also_of
from featcache.datasets import COLLECTION, DATASETS, open_datasets
from featcache.encoders import load_encoder
from featcache.encoding.banks import LENGTH, embed_random_texts
from featcache.encoding.texts import TextResult, embed_prompts
from featcache.errors import PromptError
from featcache.progress import format_seconds
from featcache.prompts import load_classnames, load_prompt_file, load_templates
from featcache.store import TextStore


def text_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache text``."""
    parser.add_argument(
        "classes",
        metavar="CLASSES",
        nargs="?",
        help="whose class names: a data set (digits, imagefolder:DIR), `imagenet`, or a file with one name a line",
    )
    parser.add_argument("--split", default="train", help="split of the data set that is read (default: train)")
    parser.add_argument("--templates", default="simple", help="name of a template set, or a file (default: simple)")
    parser.add_argument("--prompts", help="instead of templates: a JSON file {class: [sentences]}")
    parser.add_argument("--name", help="what the store is called in listings")
    parser.add_argument("--random", type=int, metavar="M", help="instead of classes: a bank of M random texts (Lipsum)")
    parser.add_argument("--length", type=int, default=LENGTH, metavar="L", help="ids of a random text (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random texts (default: 0)")
    model_arguments(parser)


def text(args: argparse.Namespace) -> int:
    """``featcache text CLASSES --templates T``, or ``featcache text --random M``."""
    if (args.random is None) == (args.classes is None):
        raise PromptError("featcache text: expected class names (digits, imagefolder:DIR, FILE), or --random M")
    if args.random is not None:
        return _random_texts(args)
    classnames, name = _classnames(args.classes, args.split)
    prompts = load_prompt_file(args.prompts) if args.prompts else None
    templates = None if prompts is not None else load_templates(args.templates)
    encoder = load_encoder(args.model, args.pretrained, device=args.device, precision=args.precision)
    result = embed_prompts(
        classnames,
        templates,
        encoder,
        prompts=prompts,
        name=args.name or name,
        root=args.root,
        progress=_progress(args),
    )
    store = result.store
    record = {"store": str(store.path), "classes": len(store), "prompts": store.raw.shape[1], "hit": result.hit}
    show(record, describe_text(result) + _same_texts(store, args.name or name) + _also_of(store, encoder), args.json)
    return 0


def _same_texts(store: TextStore, name: str) -> str:
    """A remark where the same texts were embedded before under another name."""
    if store.name == name:
        return ""
    return f"\n  same texts as texts/{store.name}; the store keeps that name"


def _random_texts(args: argparse.Namespace) -> int:
    encoder = load_encoder(args.model, args.pretrained, device=args.device, precision=args.precision)
    settings = {"length": args.length, "seed": args.seed, "name": args.name, "root": args.root}
    result = embed_random_texts(args.random, encoder, **settings, progress=_progress(args))
    store = result.store
    record = {"store": str(store.path), "texts": len(store), "dim": store.dim, "error": store.error, "hit": result.hit}
    how = "cache hit, no text encoded" if result.hit else f"encoded in {format_seconds(result.seconds)}"
    shape = f"{len(store):,} random texts x {store.dim}, second moment within {store.error:.2%}"
    show(record, f"banks/{store.name}@{store.encoder_name}: {shape}, {how}\n  {store.path}", args.json)
    return 0


def describe_text(result: TextResult) -> str:
    """One line on what a text run did."""
    store = result.store
    how = "cache hit, no text encoded" if result.hit else f"encoded in {format_seconds(result.seconds)}"
    shape = f"{len(store):,} classes x {store.raw.shape[1]} prompts x {store.dim}"
    return f"texts/{store.name}@{store.encoder_name}: {shape}, {how}\n  {store.path}"


def _classnames(classes: str, split: str) -> tuple[Sequence[str], str]:
    source = classes.partition(":")[0]
    if source in (*DATASETS, COLLECTION):
        dataset = open_datasets(classes, split)[0]
        return dataset.index.classnames, classes.split(":")[1] if source == COLLECTION else dataset.name
    return load_classnames(classes), Path(classes).stem
