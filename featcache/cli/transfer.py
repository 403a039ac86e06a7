"""The verbs that carry features out of stores and into them: export, import."""

import argparse
from pathlib import Path

import numpy as np

from featcache.cli.arguments import root_argument, show
from featcache.errors import MismatchError
from featcache.store import ImageStore, find_store, resolve_root
from featcache.transfer.export import FORMATS
from featcache.transfer.export import export as export_store
from featcache.transfer.foreign import read_array, read_foreign
from featcache.transfer.import_features import Source, import_features, read_classes

IMAGES_HELP = "store of images: folder, s3:// URL, key or NAME/SPLIT[@MODEL]; #TAP behind it for a tap or view"


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache export``."""
    parser.add_argument("store", metavar="STORE", help=IMAGES_HELP)
    parser.add_argument("target", metavar="TARGET", help="file; or, for npy, a folder")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: by the ending of TARGET, else npy")
    parser.add_argument("--dtype", default="float32", choices=("float16", "float32", "float64"))
    root_argument(parser)


def export(args: argparse.Namespace) -> int:
    """``featcache export STORE TARGET``: the valid rows, for other programs."""
    store = find_store(args.store, resolve_root(args.root))
    if not isinstance(store, ImageStore):
        raise MismatchError(
            f"{args.store}: a store of {store.kind}; only stores of images can be exported; name one as NAME/SPLIT "
            "(`featcache list` shows them)"
        )
    target = export_store(store, args.target, args.format, np.dtype(args.dtype))
    rows = int(store.valid.sum())
    record = {"target": str(target), "rows": rows, "dim": store.dim}
    show(record, f"{target}: {rows:,} x {store.dim} {args.dtype} of {store.name}/{store.split}", args.json)
    return 0


def import__arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache import``."""
    parser.add_argument(
        "source", metavar="SOURCE", help="npz, npy, pt, safetensors, parquet or csv file, or a folder of features"
    )
    parser.add_argument("--encoder-name", required=True, metavar="NAME", help="the model that computed them")
    parser.add_argument("--digest", help="what tells its weights from others of that name (checksum, date)")
    parser.add_argument("--labels", metavar="FILE", help="labels, where they do not lie beside the features")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line")
    parser.add_argument("--name", required=True, help="what the data set is called")
    parser.add_argument("--split", default="train", help="which split it is (default: train)")
    parser.add_argument("--text-digest", help="digest of the text tower that belongs to it, for zero-shot heads")
    parser.add_argument("--logit-scale", type=float, help="exponentiated factor on cosine similarities")
    parser.add_argument("--update-labels", action="store_true", help="take changed labels over; features are kept")
    root_argument(parser)


def import_(args: argparse.Namespace) -> int:
    """``featcache import SOURCE --encoder-name E --name N``: a store of anybody's features."""
    found = read_foreign(args.source, args.split)
    if args.labels:
        found.labels = read_array(args.labels)
    classnames = read_classes(args.classes) if args.classes else None
    source = Source(args.encoder_name, args.digest, args.text_digest, args.logit_scale)
    where = {"name": args.name, "split": args.split, "root": args.root}
    store = import_features(found, source, classnames=classnames, update_labels=args.update_labels, **where)
    record = {"store": str(store.path), "name": store.name, "split": store.split, "rows": len(store), "dim": store.dim}
    what = f"{store.name}/{store.split}@{store.encoder_name}: {len(store):,} x {store.dim}, imported from"
    show(record, f"{what} {Path(args.source).name}\n  {store.path}", args.json)
    return 0
