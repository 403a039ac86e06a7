"""The verb ``featcache export``: the valid rows of an image store, for other programs."""

import argparse

import numpy as np

from featcache.cli.arguments import IMAGES_HELP, root_argument, show
from featcache.errors import MismatchError
from featcache.store import ImageStore, find_store, resolve_root
from featcache.transfer.export import FORMATS, export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache export``."""
    parser.add_argument("store", metavar="STORE", help=IMAGES_HELP)
    parser.add_argument("target", metavar="TARGET", help="file, - for standard output; or, for npy, a folder")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: by the ending of TARGET, else npy")
    parser.add_argument("--dtype", default="float32", choices=("float16", "float32", "float64"))
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache export STORE TARGET``."""
    store = find_store(args.store, resolve_root(args.root))
    if not isinstance(store, ImageStore):
        raise MismatchError(
            f"{args.store}: a store of {store.kind}; only stores of images can be exported; name one as NAME/SPLIT "
            "(`featcache list` shows them)"
        )
    target = export(store, args.target, args.format, np.dtype(args.dtype))
    rows = int(store.valid.sum())
    record = {"target": str(target), "rows": rows, "dim": store.dim}
    show(record, f"{target}: {rows:,} x {store.dim} {args.dtype} of {store.name}/{store.split}", args.json, args.target)
    return 0
