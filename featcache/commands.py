"""The verbs that need no head: encode, text, list, info, verify."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.content import check_source
from featcache.datasets import DATASETS, Dataset, open_dataset
from featcache.embed_text import TextResult, embed_prompts
from featcache.encode import EncodeOptions, EncodeResult, encode_dataset
from featcache.encoders import load_encoder
from featcache.errors import ContentChangedError, PromptError, StoreCorruptError
from featcache.progress import Printed, Progress, Silent, format_seconds
from featcache.prompts import load_classnames, load_prompt_file, load_templates
from featcache.store import ImageStore, find_path, find_store, list_stores, open_image_store, repair, resolve_root
from featcache.store import verify as verify_store
from featcache.store.places import StorePath
from featcache.text_bank import LENGTH, embed_random_texts


def root_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--root``."""
    parser.add_argument("--root", help="folder of all stores (default: $FEATCACHE_ROOT, else ./cache)")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names an encoder."""
    parser.add_argument(
        "--model", default="tiny", help="tiny, an open_clip architecture, local-dir:FOLDER, hf-hub:NAME"
    )
    parser.add_argument("--pretrained", help="open_clip tag, checkpoint file, or `random`")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the model's products")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    root_argument(parser)


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
    parser.add_argument("--refresh", action="store_true", help="encode chunks again whose source files changed")
    model_arguments(parser)


def encode(args: argparse.Namespace) -> int:
    """``featcache encode DATA --split S...``."""
    names = ("batch_size", "chunk_rows", "workers", "max_bad", "update_labels", "refresh")
    options = EncodeOptions(**{name: getattr(args, name) for name in names})
    datasets = [open_dataset(args.data, split, labels=args.labels, name=args.name) for split in args.split]
    encoder = load_encoder(args.model, args.pretrained, device=args.device, precision=args.precision)
    results = [
        encode_dataset(dataset, encoder, root=args.root, options=options, progress=_progress(args))
        for dataset in datasets
    ]
    lines = [
        describe_encoded(result) + _known_as(result, dataset) for result, dataset in zip(results, datasets, strict=True)
    ]
    show([_encoded(result) for result in results], "\n".join(lines), args.json)
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
        how = f"{result.encoded_rows:,} rows encoded in {format_seconds(result.seconds)}"
    return f"{what}{bad}, {how}\n  {store.path}"


def _known_as(result: EncodeResult, dataset: Dataset) -> str:
    """A remark where the same samples were encoded before under another name."""
    store = result.store
    if (store.name, store.split) == (dataset.name, dataset.split):
        return ""
    return (
        f"\n  {dataset.name}/{dataset.split} holds the same samples: the store keeps the name "
        f"{store.name}/{store.split} (delete its folder to encode under the new one)"
    )


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
    same = f"\n  the same texts were embedded as texts/{store.name}; the store keeps that name"
    show(record, describe_text(result) + ("" if store.name == (args.name or name) else same), args.json)
    return 0


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
    if classes.partition(":")[0] in DATASETS:
        dataset = open_dataset(classes, split)
        return dataset.index.classnames, dataset.name
    return load_classnames(classes), Path(classes).stem


def list__arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache list``."""
    root_argument(parser)


def list_(args: argparse.Namespace) -> int:
    """``featcache list``: every store below the root."""
    root = resolve_root(args.root)
    entries = list_stores(root)
    lines = [f"{len(entries)} store(s) in {root}"]
    for entry in entries:
        state = "" if entry.finished else "  NOT FINISHED"
        lines.append(
            f"  {entry.reference:<40} {entry.rows:>10,} rows {entry.nbytes / 1e6:>9,.1f} MB  {entry.key}{state}"
        )
    show([entry.to_json() for entry in entries], "\n".join(lines), args.json)
    return 0


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache info``."""
    parser.add_argument("store", metavar="STORE", help="folder, key, NAME/SPLIT[@MODEL] or texts/NAME[@MODEL]")
    root_argument(parser)


def info(args: argparse.Namespace) -> int:
    """``featcache info STORE``: what it holds and where it comes from."""
    store = find_store(args.store, resolve_root(args.root))
    arrays = {name: spec.to_json() for name, spec in store.manifest.all_arrays.items()}
    record = {
        "store": str(store.path),
        "kind": store.kind,
        "key": store.manifest.key,
        "info": store.info,
        "identity": store.manifest.identity,
        "arrays": arrays,
        "provenance": store.provenance,
    }
    show(record, _describe(store, record), args.json)
    return 0


def _describe(store: Any, record: dict[str, Any]) -> str:
    lines = [repr(store), f"  key          {record['key']}"]
    classes = store.classnames
    lines.append(f"  classes      {len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}")
    lines += [f"  {name:<12} {spec['dtype']} {tuple(spec['shape'])}" for name, spec in record["arrays"].items()]
    if isinstance(store, ImageStore):
        lines.append(f"  unreadable   {len(store.bad)}")
        lines += [f"    {bad.sample_id}: {bad.error}" for bad in store.bad[:10]]
        lines.append(f"  label digest {store.labels_digest}")
    lines += [f"  logit scale  {store.logit_scale}", f"  text tower   {store.text_digest}"]
    lines += [f"  {name:<12} {value}" for name, value in record["provenance"].items()]
    return "\n".join(lines)


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache verify``."""
    parser.add_argument("store", metavar="STORE", help="folder, key, NAME/SPLIT[@MODEL] or texts/NAME[@MODEL]")
    parser.add_argument("--deep", action="store_true", help="hash every file, not only sizes")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="hash every file and drop damaged chunks, so that encode makes them again",
    )
    parser.add_argument(
        "--against", metavar="DATA", help="also read and hash every image of the data set it was made from"
    )
    root_argument(parser)


def verify(args: argparse.Namespace) -> int:
    """``featcache verify STORE [--deep] [--repair]``: exit code 4 where something is damaged."""
    path = find_path(args.store, resolve_root(args.root))
    began = time.perf_counter()
    deep = args.deep or args.repair
    report = verify_store(path, deep=deep)
    seconds = time.perf_counter() - began
    if args.repair and not report.ok:
        repair(report)
    changed = _changed_sources(path, args.against) if args.against else []
    record = {
        "store": str(path),
        "ok": report.ok,
        "files": report.files,
        "problems": report.problems,
        "changed": changed,
    }
    lines = [f"{path}: {report.files} files, {report.nbytes / 1e6:,.1f} MB in {format_seconds(seconds)}"]
    lines += [f"  damaged: {problem}" for problem in report.problems]
    if report.ok:
        lines.append("  checksums agree" if deep else "  sizes and keys agree; contents were not hashed (--deep)")
    elif args.repair:
        lines.append(
            "  damaged chunks dropped; run the command that made the store: it redoes them and keeps the others"
        )
    else:
        lines.append("  run again with --repair, then the command that made the store: it redoes damaged chunks only")
    lines += [f"  source changed: {name}" for name in changed]
    if args.against:
        lines.append("  run encode with --refresh to take them over" if changed else "  the source is what was encoded")
    show(record, "\n".join(lines), args.json)
    return StoreCorruptError.exit_code if not report.ok else ContentChangedError.exit_code if changed else 0


def _changed_sources(path: StorePath, data: str) -> list[str]:
    store = open_image_store(path)
    return check_source(open_dataset(data, store.split), store)
