"""The command ``featcache leaks``: near-duplicates between a train and a test split."""

import argparse

from featcache.cli.arguments import show
from featcache.errors import HeadError
from featcache.store import ImageStore
from heads.cli.arguments import open_reference, store_arguments

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache leaks``."""
    parser.add_argument("train", metavar="TRAIN", help="image store that heads are fitted on")
    parser.add_argument("test", metavar="TEST", help="image store that heads are evaluated on")
    parser.add_argument(
        "--threshold",
        type=float,
        help="smallest cosine of a pair (default: closer than a quarter of the median distance, 1 - cosine, between a "
        "training image and its nearest neighbour)",
    )
    parser.add_argument("--per-row", type=int, default=5, metavar="K", help="most pairs per test image (default: 5)")
    store_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache leaks TRAIN TEST``."""
    from heads import leaks
    from heads.search.leaks import near_threshold

    stores = []
    for reference in (args.train, args.test):
        store = open_reference(reference, args)
        if not isinstance(store, ImageStore):
            raise HeadError(f"{store.name}: a store of texts; expected stores of images")
        stores.append(store)
    threshold = near_threshold(stores[0]) if args.threshold is None else args.threshold
    pairs = leaks(stores[0], stores[1], threshold=threshold, per_row=args.per_row)
    images = len({pair["test_row"] for pair in pairs})
    near = f"near-duplicate in {args.train} (cosine >= {threshold:.4g})"
    lines = [f"{images:,} of {len(stores[1]):,} test images have a {near}"]
    for pair in pairs[:SHOWN]:
        same = pair["test_class"] == pair["train_class"]
        classes = pair["test_class"] if same else f"{pair['test_class']} against {pair['train_class']}"
        lines.append(f"  {pair['similarity']:.4f}  {pair['test_id']}  {pair['train_id']}  {classes}")
    if len(pairs) > SHOWN:
        lines.append(f"  ... and {len(pairs) - SHOWN:,} more pairs: --json lists all")
    show(pairs, "\n".join(lines), args.json)
    return 0
