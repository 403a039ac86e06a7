"""The verb ``featcache export``: write the valid rows of an image store, or a text store, for other programs."""

import argparse

import numpy as np

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.errors import MismatchError
from featcache.store import ImageStore, TextStore, find_store, resolve_root
from featcache.transfer.export import FORMATS, export
from featcache.transfer.formats import FOLDERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache export``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="file (- for standard output), or a folder for npy and other programs' formats; a text store "
        "goes to a .ckpt, as Lipsum-FT's setup.py writes it",
    )
    parser.add_argument(
        "--format",
        choices=(*FORMATS, *FOLDERS),
        help="default: from the ending of TARGET, else npy; npz: as open_clip's linear probe; fe: "
        "transferlearning's text file, features before normalisation, label last",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float16", "float32", "float64"),
        help="type of the features (default: float32)",
    )
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache export STORE TARGET``."""
    store = find_store(args.store, resolve_root(args.root))
    if isinstance(store, TextStore):
        return _export_texts(store, args)
    if not isinstance(store, ImageStore):
        raise MismatchError(
            f"{args.store}: a store of {store.kind}; only stores of images and texts can be exported; name one as "
            "NAME/SPLIT or texts/NAME (`featcache list` shows them)"
        )
    target = export(store, args.target, args.format, np.dtype(args.dtype))
    rows = int(store.valid.sum())
    record = {"target": str(target), "rows": rows, "dim": store.dim}
    show(record, f"{target}: {rows:,} x {store.dim} {args.dtype} of {store.name}/{store.split}", args.json, args.target)
    return 0


def _export_texts(store: TextStore, args: argparse.Namespace) -> int:
    from featcache.transfer.flax import write_text_store

    target = write_text_store(store, args.target)
    record = {"target": str(target), "classes": len(store), "dim": store.dim}
    what = "cls" if store.ctx is None else "cls, ctx and raw"
    show(record, f"{target}: {what} of {len(store):,} classes x {store.dim} of texts/{store.name}", args.json)
    return 0
