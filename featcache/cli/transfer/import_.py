"""The verb ``featcache import``: a store of features that another program computed."""

import argparse
from collections import Counter
from pathlib import Path

from featcache.cli.arguments import root_argument, show, update_labels_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache import``."""
    parser.add_argument(
        "source", metavar="SOURCE", help="npz, npy, pt, safetensors, parquet or csv file, or a folder of features"
    )
    parser.add_argument("--encoder-name", required=True, metavar="NAME", help="the model that computed the features")
    parser.add_argument("--digest", help="distinguishes its weights from others of that name (checksum, date)")
    parser.add_argument("--labels", metavar="FILE", help="labels, where they are not beside the features")
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line")
    parser.add_argument("--name", required=True, help="name of the data set in listings and results")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument("--text-digest", help="digest of the matching text tower, for zero-shot heads")
    parser.add_argument("--logit-scale", type=float, help="exponentiated factor on cosine similarities")
    update_labels_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache import SOURCE --encoder-name E --name N``."""
    from featcache.transfer.foreign import read_array, read_foreign
    from featcache.transfer.import_features import Source, import_features, read_classes

    found = read_foreign(args.source, args.split)
    if args.labels:
        found.labels = read_array(args.labels)
    classnames = read_classes(args.classes) if args.classes else None
    source = Source(args.encoder_name, args.digest, args.text_digest, args.logit_scale)
    where = {"name": args.name, "split": args.split, "root": args.root}
    store = import_features(found, source, classnames=classnames, update_labels=args.update_labels, **where)
    record = {"store": str(store.path), "name": store.name, "split": store.split, "rows": len(store), "dim": store.dim}
    twice = [name for name, uses in Counter(store.classnames).items() if uses > 1]
    record["repeated_classnames"] = twice
    note = f"\n  note: classes of the same name: {', '.join(twice)}" if twice else ""
    what = f"{store.name}/{store.split}@{store.encoder_name}: {len(store):,} x {store.dim}, imported from"
    show(record, f"{what} {Path(args.source).name}\n  {store.path}{note}", args.json)
    return 0
