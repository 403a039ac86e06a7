"""The verbs that make stores: encode, text."""

import argparse
from typing import Any

from featcache.cli.arguments import _progress, model_arguments, preprocess_argument, show
from featcache.datasets import DATASETS, Dataset, open_datasets
from featcache.encoders import Encoder, load_encoder
from featcache.encoding.augment import AUGMENTATIONS
from featcache.encoding.images import EncodeResult, encode_dataset
from featcache.encoding.options import EncodeOptions, Share
from featcache.errors import ShardDoneError
from featcache.progress import format_seconds
from featcache.store.base import Store
from featcache.store.catalogue import other_names
from featcache.store.images import parts_of


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
