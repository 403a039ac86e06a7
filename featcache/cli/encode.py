"""The verb ``featcache encode``: splits of data sets into image stores."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from featcache.cli.arguments import (
    alias_note,
    data_arguments,
    decoding_arguments,
    dry_run_argument,
    encoder_of,
    flag,
    model_arguments,
    preprocess_argument,
    progress_of,
    shard_argument,
    show,
    update_labels_argument,
)
from featcache.datasets import Dataset, open_datasets
from featcache.datasets.holdout import Holdout, holdout_options
from featcache.encoding.augment import AUGMENTATIONS
from featcache.encoding.options import EncodeOptions, Share
from featcache.errors import DatasetError, ShardDoneError
from featcache.parameters import descriptions_of, parameters_of
from featcache.progress import format_bytes, format_seconds
from featcache.store.key import Json
from featcache.store.reading.images import parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from featcache.encoders import Encoder
    from featcache.encoding.images import EncodeResult


SHOWN_CLASSES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache encode``."""
    add = parser.add_argument
    data_arguments(parser, "DATA", nargs="+")
    add("--split", nargs="+", default=["train"], metavar="S", help="splits to encode (default: train)")
    add("--name", help="name of the data set in listings and results")
    for name, text in descriptions_of(Holdout).items():
        if name != "holdout_of":
            default = None if name == "holdout" else parameters_of(Holdout)[name].default
            flag(parser, parameters_of(Holdout)[name], f"data without splits: {text}", default=default)
    declared, texts = parameters_of(EncodeOptions), descriptions_of(EncodeOptions)
    for name in ("chunk_rows", "max_bad", "refresh", "pool", "views", "view_seed"):
        flag(parser, declared[name], texts[name])
    flag(parser, declared["augmentation"], "augmentation of the views", choices=sorted(AUGMENTATIONS))
    dry_run_argument(parser, "encoded")
    update_labels_argument(parser)
    shard_argument(parser, "chunks")
    add("--no-reuse", action="store_true", help="do not copy the rows of identical images from other stores")
    add(
        "--tap",
        action="append",
        default=[],
        metavar="NAME",
        help="also store another output of the encoder: pre_projection, patch, layer:-2, layer:-2:cls (repeatable; can "
        "be added to a finished store)",
    )
    decoding_arguments(parser)
    add(
        "--compile",
        action="store_true",
        help="compile the model with torch first, with CUDA graphs on a GPU; on a CPU it gained nothing when measured",
    )
    model_arguments(parser)
    preprocess_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache encode DATA --split S...``."""
    given = {field.name: getattr(args, field.name) for field in fields(EncodeOptions) if hasattr(args, field.name)}
    options = EncodeOptions(
        **given,
        share=Share.parse(args.shard) if args.shard else None,
        taps=args.tap,
        reuse=not args.no_reuse,
        compiled=args.compile,
    )
    datasets = _datasets(args)
    encoder = encoder_of(args, args.preprocess or datasets[0].prepared)
    from featcache.encoding.images import encode_dataset  # last, so that errors about the model come early

    if args.dry_run:
        return _dry_run(datasets, encoder, options, args)
    records, lines = [], []
    for dataset in datasets:
        try:
            result = encode_dataset(dataset, encoder, root=args.root, options=options, progress=progress_of(args))
        except ShardDoneError as done:
            records.append({"name": dataset.name, "split": dataset.split, "unfinished": str(done)})
            lines.append(str(done))
            continue
        records.append(_record(result))
        notes = _name_note(result, dataset) + alias_note(result.store, encoder)
        lines.append(describe_encoded(result, counts=not args.quiet) + notes)
    show(records, "\n".join([*lines, *_other_classes(datasets)]), args.json)
    return 0


def _other_classes(datasets: Sequence[Dataset]) -> list[str]:
    """A line for each split whose class list differs from that of the first split of its data set."""
    first: dict[str, Dataset] = {}
    lines = []
    for dataset in datasets:
        one = first.setdefault(dataset.name, dataset)
        ours, theirs = one.index.classnames, dataset.index.classnames
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs))
            named = f" ({', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''} in one of them alone)" if odd else ""
            lines.append(
                f"note: {one.name}/{one.split} has {len(ours)} classes and {dataset.name}/{dataset.split} "
                f"{len(theirs)}{named}: no head fits both; give them one class list, SOURCE,classes=FILE "
                "--update-labels, which keeps the features"
            )
    return lines


def _dry_run(datasets: Sequence[Dataset], encoder: Encoder, options: EncodeOptions, args: argparse.Namespace) -> int:
    """What a run would do; nothing is written."""
    from featcache.encoding.plan import plan_encoding

    plans = [plan_encoding(dataset, encoder, root=args.root, options=options) for dataset in datasets]
    lines = []
    for plan in plans:
        todo = "cache hit: nothing to encode"
        if plan.rows_to_encode:
            todo = (
                f"{plan.rows_to_encode:,} to encode; would read {format_bytes(plan.bytes_to_read)} and write "
                f"{format_bytes(plan.bytes_to_write)} in about {format_seconds(plan.seconds)}"
            )
        lines.append(f"{plan.name}/{plan.split}@{encoder.name}: {plan.rows:,} rows, {todo}\n  {plan.store}")
    show([plan.to_dict() for plan in plans], "\n".join(lines), args.json)
    return 0


def _datasets(args: argparse.Namespace) -> list[Dataset]:
    """The splits of all data sets, which one encoder is to encode."""
    if args.name == "":
        raise DatasetError("--name '': expected a name of letters, digits, '-', '_' and '.'; or leave it out")
    if args.name and len(args.data) > 1:
        raise DatasetError(f"--name {args.name}: one name for {len(args.data)} data sets; encode them one at a time")
    holdout = holdout_options(args.holdout, args.holdout_seed, args.holdout_group)
    found = [
        dataset
        for data in args.data
        for split in args.split
        for dataset in open_datasets(data + holdout, split, labels=args.labels, name=args.name)
    ]
    prepared = {dataset.prepared for dataset in found}
    if len(prepared) > 1 and not args.preprocess:
        names = ", ".join(sorted(name or "none" for name in prepared))
        raise DatasetError(
            f"the data sets were prepared in different ways ({names}); encode each kind separately, or give "
            "--preprocess for all"
        )
    return found


def _record(result: EncodeResult) -> Json:
    store = result.store
    where = {"store": str(store.path), "name": store.name, "split": store.split}
    sizes = {"rows": len(store), "dim": store.dim, "bad": len(store.bad), "classes": len(store.classnames)}
    rows = {"hit": result.hit, "encoded_rows": result.encoded_rows, "copied_rows": result.copied_rows}
    parts = [part.label for part in parts_of(store)]
    return where | sizes | rows | {"parts": parts, "relabelled": result.relabelled, "seconds": result.seconds}


def describe_encoded(result: EncodeResult, *, counts: bool = True) -> str:
    """What an encode run did: one line, the store's path, and with `counts` how many rows each class has."""
    store = result.store
    what = f"{store.name}/{store.split}@{store.encoder_name}: {len(store):,} x {store.dim}"
    bad = f", {len(store.bad)} unreadable" if store.bad else ""
    if result.hit:
        how = "cache hit, labels rewritten" if result.relabelled else "cache hit, no image opened"
    else:
        copied = f", {result.copied_rows:,} copied from other stores" if result.copied_rows else ""
        batches = f", {result.batches}" if result.batches else ""
        how = f"{result.encoded_rows:,} rows encoded{copied} in {format_seconds(result.seconds)}{batches}"
    lines = [f"{what}{bad}, {how}", f"  {store.path}"]
    if counts:
        lines.append(f"  {class_counts(store.truth, store.classnames)}")
    if parts := ", ".join(part.label for part in parts_of(store)):
        lines.append(f"  with {parts}")
    return "\n".join(lines)


def class_counts(labels: npt.NDArray[np.integer], classnames: Sequence[str]) -> str:
    """Rows per class, which reveal a misspelt folder: of every class if there are few, else of the smallest.

    >>> class_counts(np.array([0, 0, 1, -1]), ["cat", "dgo"])
    '2 classes: cat 2, dgo 1'

    For multi-label targets, the rows to which each class applies.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels[labels >= 0], minlength=len(classnames))
    else:
        counts = (labels == 1).sum(axis=0)
    order = range(len(classnames)) if len(classnames) <= SHOWN_CLASSES else np.argsort(counts, kind="stable")[:3]
    named = ", ".join(f"{classnames[c]} {counts[c]:,}" for c in order)
    if len(classnames) <= SHOWN_CLASSES:
        return f"{len(classnames)} classes: {named}"
    return f"{len(classnames):,} classes of {counts.min():,} to {counts.max():,} rows; the smallest: {named}"


def _name_note(result: EncodeResult, dataset: Dataset) -> str:
    """A note if the same samples were encoded before under another name; else empty."""
    store = result.store
    if (store.name, store.split) == (dataset.name, dataset.split):
        return ""
    return (
        f"\n  {dataset.name}/{dataset.split} holds the same samples: the store keeps the name "
        f"{store.name}/{store.split}; to change it: featcache rename {store.reference} {dataset.name}/{dataset.split}"
    )
