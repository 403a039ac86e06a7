"""The verbs that make stores: encode, text."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.augment import AUGMENTATIONS
from featcache.datasets import COLLECTION, DATASETS, Dataset, open_datasets
from featcache.embed_text import TextResult, embed_prompts
from featcache.encode import EncodeOptions, EncodeResult, Share, encode_dataset
from featcache.encoders import PREPARATIONS, Encoder, load_encoder
from featcache.errors import PromptError, ShardDoneError
from featcache.progress import Printed, Progress, Silent, format_seconds
from featcache.prompts import load_classnames, load_prompt_file, load_templates
from featcache.store import TextStore
from featcache.store.names import other_names
from featcache.store.opened import Store
from featcache.store.parts import parts_of
from featcache.text_bank import LENGTH, embed_random_texts


def root_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--root``."""
    parser.add_argument(
        "--root", help="folder, or s3://bucket/prefix, of all stores (default: $FEATCACHE_ROOT, else ./cache)"
    )


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names an encoder."""
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny, an open_clip architecture, local-dir:FOLDER, hf-hub:NAME, timm:NAME[,FILE], python:MODULE:FUNCTION",
    )
    parser.add_argument("--pretrained", help="open_clip tag, checkpoint file, or `random`")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the model's products")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    root_argument(parser)


def preprocess_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--preprocess``."""
    parser.add_argument(
        "--preprocess",
        choices=sorted(PREPARATIONS),
        help="prepare pictures otherwise than the model says: central-crop takes the central 7/8, as Lipsum-FT does",
    )


def show(value: Any, text: str, as_json: bool) -> None:
    """Print a result: one JSON value, or text for people."""
    print(json.dumps(value) if as_json else text)


def _progress(args: argparse.Namespace) -> Progress:
    return Silent() if args.quiet else Printed()


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache encode``."""
    sources = ", ".join(sorted(DATASETS))
    parser.add_argument("data", metavar="DATA", help=f"SOURCE:ARGUMENT, with one of the sources {sources}")
    parser.add_argument("--split", nargs="+", default=["train"], metavar="S", help="splits to encode (default: train)")
    parser.add_argument("--name", help="what the data set is called in listings and results")
    parser.add_argument("--labels", default="names", choices=("names", "int"), help="what labels of a list file are")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a forward pass (default: 64)")
    parser.add_argument("--chunk-rows", type=int, metavar="N", help="rows of a chunk (default: 4096)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one a core)")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="unreadable images to put up with")
    parser.add_argument("--update-labels", action="store_true", help="take changed labels over; features are kept")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only every N-th chunk from the I-th on, I from 0 (a job array); without it, runs share the work, as do "
        "the ranks of torchrun",
    )
    parser.add_argument("--refresh", action="store_true", help="encode chunks again whose source files changed")
    parser.add_argument("--no-reuse", action="store_true", help="copy no row of the same content from other stores")
    _part_arguments(parser)
    model_arguments(parser)
    preprocess_argument(parser)


def _part_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is stored besides the features."""
    parser.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="NAME",
        help="store another output of the encoder, too: pre_projection (may be given again; joins a finished store)",
    )
    parser.add_argument("--views", type=int, default=0, metavar="K", help="store K augmented views of every image, too")
    parser.add_argument(
        "--augmentation", default="plain", choices=sorted(AUGMENTATIONS), help="how views are made (default: plain)"
    )
    parser.add_argument("--view-seed", type=int, default=0, metavar="S", help="of the views (default: 0)")


def encode(args: argparse.Namespace) -> int:
    """``featcache encode DATA --split S...``."""
    names = ["batch_size", "chunk_rows", "workers", "max_bad", "update_labels", "refresh"]
    names += ["views", "augmentation", "view_seed"]
    share = Share.parse(args.shard) if args.shard else None
    chosen = {name: getattr(args, name) for name in names}
    options = EncodeOptions(**chosen, share=share, taps=args.tap, reuse=not args.no_reuse)
    datasets = [
        dataset
        for split in args.split
        for dataset in open_datasets(args.data, split, labels=args.labels, name=args.name)
    ]
    place = {"device": args.device, "precision": args.precision}
    encoder = load_encoder(args.model, args.pretrained, **place, preprocess=args.preprocess)
    records, lines = [], []
    for dataset in datasets:
        try:
            result = encode_dataset(dataset, encoder, root=args.root, options=options, progress=_progress(args))
        except ShardDoneError as done:
            records.append({"name": dataset.name, "split": dataset.split, "unfinished": str(done)})
            lines.append(str(done))
            continue
        records.append(_encoded(result))
        lines.append(describe_encoded(result) + _known_as(result, dataset) + _also_of(result.store, encoder))
    show(records, "\n".join(lines), args.json)
    return 0


def _encoded(result: EncodeResult) -> dict[str, Any]:
    store = result.store
    return {
        "store": str(store.path),
        "name": store.name,
        "split": store.split,
        "rows": len(store),
        "dim": store.dim,
        "bad": len(store.bad),
        "hit": result.hit,
        "encoded_rows": result.encoded_rows,
        "copied_rows": result.copied_rows,
        "parts": [part.label for part in parts_of(store)],
        "relabelled": result.relabelled,
        "seconds": result.seconds,
    }


def describe_encoded(result: EncodeResult) -> str:
    """One line on what an encode run did."""
    store = result.store
    what = f"{store.name}/{store.split}@{store.encoder_name}: {len(store):,} x {store.dim}"
    bad = f", {len(store.bad)} unreadable" if store.bad else ""
    if result.hit:
        how = "cache hit, labels rewritten" if result.relabelled else "cache hit, no image opened"
    else:
        copied = f", {result.copied_rows:,} copied from other stores" if result.copied_rows else ""
        how = f"{result.encoded_rows:,} rows encoded{copied} in {format_seconds(result.seconds)}"
    parts = ", ".join(part.label for part in parts_of(store))
    return f"{what}{bad}, {how}\n  {store.path}" + (f"\n  with {parts}" if parts else "")


def _known_as(result: EncodeResult, dataset: Dataset) -> str:
    """A remark where the same samples were encoded before under another name."""
    store = result.store
    if (store.name, store.split) == (dataset.name, dataset.split):
        return ""
    return (
        f"\n  {dataset.name}/{dataset.split} holds the same samples: the store keeps the name "
        f"{store.name}/{store.split} (delete its folder to encode under the new one)"
    )


def _also_of(store: Store, encoder: Encoder) -> str:
    """A remark where an encoder of another name made the store."""
    if store.encoder_name == encoder.name or encoder.name not in other_names(store.path):
        return ""
    return f"\n  the tower of {encoder.name} equals that of {store.encoder_name}: @{encoder.name} finds this store, too"


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
