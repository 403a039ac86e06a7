"""The verb ``featcache import``: make a store from features or class vectors computed by another program."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import repeated, repeated_note, root_argument, show, update_labels_argument
from featcache.errors import DatasetError

if TYPE_CHECKING:
    from featcache.store import ImageStore, TextStore
    from featcache.transfer.formats import Foreign
    from featcache.transfer.import_features import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache import``."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="npz, npy, pt, safetensors, parquet or csv file, or a folder of features")
    add("--encoder-name", required=True, metavar="NAME", help="the model that computed the features")
    add("--digest", help="identifies its weights among others with the same name (a checksum or date)")
    add("--texts", action="store_true", help="SOURCE holds one vector per class, (C, D) or (D, C): make a text store")
    add("--labels", metavar="FILE", help="labels, if they are not found with the features")
    add(
        "--classes", metavar="FILE", help="class names, one per line (with --texts, default: classes.txt beside SOURCE)"
    )
    add("--name", required=True, help="name of the data set in listings and results")
    add("--split", default="train", help="split of the data set (default: train)")
    add(
        "--text-digest",
        metavar="DIGEST|STORE",
        help="digest of the matching text tower, or a store of its model; not needed if texts are imported with the "
        "same name and digest",
    )
    add("--logit-scale", type=float, help="factor on cosine similarities, already exponentiated (about 100)")
    update_labels_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache import SOURCE --encoder-name E --name N``."""
    from featcache.transfer.foreign import read_array, read_classes, read_foreign, read_texts

    if args.texts and (args.labels or args.update_labels):
        raise DatasetError("--texts: class vectors have no labels; omit --labels and --update-labels")
    found = read_texts(args.source) if args.texts else read_foreign(args.source, args.split)
    if args.labels:
        found.labels = read_array(args.labels)
    classnames = read_classes(args.classes) if args.classes else None
    return _texts(args, found, classnames) if args.texts else _images(args, found, classnames)


def _source(args: argparse.Namespace) -> "Source":
    from featcache.store import find_store
    from featcache.transfer.import_features import Source

    digest, scale = args.text_digest, args.logit_scale
    if digest and "/" in digest:  # a store
        store = find_store(digest, args.root)
        if store.text_digest is None:
            raise DatasetError(f"--text-digest {digest}: its model has no text tower; name a store of one that has")
        digest, scale = store.text_digest, store.logit_scale if scale is None else scale
    return Source(args.encoder_name, args.digest, digest, scale)


def _images(args: argparse.Namespace, found: "Foreign", classnames: list[str] | None) -> int:
    from featcache.transfer.import_features import import_features

    where = {"name": args.name, "split": args.split, "root": args.root}
    store = import_features(found, _source(args), classnames=classnames, update_labels=args.update_labels, **where)
    what = f"{store.name}/{store.split}@{store.encoder_name}: {len(store):,} x {store.dim}"
    return _show(args, store, {"split": store.split, "rows": len(store), "dim": store.dim}, what)


def _texts(args: argparse.Namespace, found: "Foreign", classnames: list[str] | None) -> int:
    from featcache.transfer.import_texts import import_texts

    store = import_texts(found, _source(args), name=args.name, classnames=classnames, root=args.root)
    classes, prompts, _ = store.manifest.arrays["raw"].shape
    record = {"classes": classes, "prompts": prompts, "dim": store.dim, "logit_scale": store.logit_scale}
    what = f"texts/{store.name}@{store.encoder_name}: {store.counted} x {store.dim}"
    return _show(args, store, record, f"{what}, logit scale {store.logit_scale:.6g}")


def _show(args: argparse.Namespace, store: "ImageStore | TextStore", facts: Mapping[str, object], what: str) -> int:
    record = {"store": str(store.path), "name": store.name, **facts, "repeated_classnames": repeated(store.classnames)}
    note = repeated_note(store.classnames)
    show(record, f"{what}, imported from {Path(args.source).name}\n  {store.path}{note}", args.json)
    return 0
