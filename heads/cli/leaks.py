"""The command ``featcache leaks``: near-duplicates between a train and a test split."""

import argparse

from featcache.cli.arguments import show
from heads.cli.arguments import open_images, store_arguments

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache leaks``."""
    add = parser.add_argument
    add("train", metavar="TRAIN", help="image store that heads are fitted on")
    add("test", metavar="TEST", help="image store that heads are evaluated on")
    add(
        "--threshold",
        type=float,
        help="smallest cosine of a pair (default: closer than a quarter of the median distance, 1 - cosine, between a "
        "training image and its nearest neighbour)",
    )
    add("--per-row", type=int, default=5, metavar="K", help="most pairs per test image (default: 5)")
    store_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache leaks TRAIN TEST``."""
    from heads import leaks
    from heads.search.leaks import near_threshold

    train, test = (open_images(reference, args) for reference in (args.train, args.test))
    threshold = near_threshold(train) if args.threshold is None else args.threshold
    pairs = leaks(train, test, threshold=threshold, per_row=args.per_row)
    images = len({pair["test_row"] for pair in pairs})
    near = f"near-duplicate in {args.train} (cosine >= {threshold:.4g})"
    lines = [f"{images:,} of {len(test):,} test images have a {near}"]
    if pairs:
        lines.append("  cosine  test image  training image  class")
    for pair in pairs[:SHOWN]:
        same = pair["test_class"] == pair["train_class"]
        classes = pair["test_class"] if same else f"{pair['test_class']} against {pair['train_class']}"
        lines.append(f"  {pair['similarity']:.4f}  {pair['test_id']}  {pair['train_id']}  {classes}")
    if len(pairs) > SHOWN:
        lines.append(f"  ... and {len(pairs) - SHOWN:,} more pairs: --json lists all")
    show(pairs, "\n".join(lines), args.json)
    return 0
