"""The command ``featcache compare``: two heads on the same rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcache.cli.arguments import show
from heads.cli.arguments import HEAD_HELP, group_argument, load_heads, open_images, seen_arguments, store_arguments
from heads.cli.classes import class_arguments, class_subset
from heads.evaluation.bootstrap import DRAWS

if TYPE_CHECKING:
    from heads.evaluation.metrics import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache compare``."""
    add = parser.add_argument
    add("head_a", metavar="HEAD_A", help=HEAD_HELP)
    add("head_b", metavar="HEAD_B", help="another head; differences are B minus A")
    add("stores", metavar="STORE", nargs="+", help="image stores to compare them on")
    group_argument(parser)
    add("--cluster", nargs="+", metavar="COLUMN", help="resample rows with equal values in these columns together")
    add("--draws", type=int, default=DRAWS, metavar="N", help=f"bootstrap draws (default: {DRAWS})")
    add("--level", type=float, default=0.95, metavar="P", help="confidence level of the intervals (default: 0.95)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (default: 0)")
    seen_arguments(parser)
    class_arguments(parser)
    store_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache compare HEAD_A HEAD_B STORE...``."""
    from heads import compare

    head_a, head_b = load_heads([args.head_a, args.head_b], args)
    stores = [open_images(reference, args) for reference in args.stores]
    records = compare(
        head_a,
        head_b,
        stores,
        class_subset=class_subset(args, head_a.classnames, [store.name for store in stores], head_a.name),
        seen=args.seen,
        groups=args.group,
        clusters=args.cluster,
        draws=args.draws,
        level=args.level,
        seed=args.seed,
    )
    show(records, "\n\n".join(map(_describe, records)), args.json)
    return 0


def _describe(record: Row) -> str:
    """The comparison on one store, in a few lines."""
    a, b = record["heads"]
    less = f" ({record['n_excluded']:,} seen rows left out)" if record.get("n_excluded") else ""
    lines = [f"{record['store']}, {record['n']:,} rows{less}; {100 * record['level']:g} % intervals of {b} minus {a}"]
    for metric, factor, digits, unit in (("top1", 100, 1, " %"), ("nll", 1, 3, "")):
        cells = [f"{who} {factor * record[metric][key][0]:.{digits}f}{unit}" for who, key in ((a, "a"), (b, "b"))]
        difference = _interval(record[metric]["difference"], factor, digits)
        lines.append(f"  {metric:4} {', '.join(cells)}; difference {difference}{' points' if unit else ''}")
    tested = record["mcnemar"]
    alone = f"only {a} right {tested['only_a']:,}, only {b} right {tested['only_b']:,}"
    lines.append(f"  {alone}; McNemar's exact p = {tested['p']:.3g}")
    for name, group in record.get("groups", {}).items():
        lines.append(f"  {name}: {group['rows']:,} rows, top1 {_interval(group['top1_difference'], 100, 1)} points")
    return "\n".join(lines)


def _interval(ends: Sequence[float], factor: float, digits: int) -> str:
    value, low, high = (f"{factor * end:+.{digits}f}" for end in ends)
    return f"{value} [{low}, {high}]"
