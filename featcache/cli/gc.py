"""The verb ``featcache gc``: list or delete unfinished and unreadable stores and partial files."""

import argparse
import re

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.errors import FeatcacheError
from featcache.progress import format_bytes
from featcache.store import find_path, resolve_root
from featcache.store.upkeep.deletion import delete, find_garbage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache gc``."""
    parser.add_argument("store", nargs="*", metavar="STORE", help=f"also delete these finished stores: {STORE_HELP}")
    parser.add_argument(
        "--older-than", default="7d", metavar="AGE", help="keep files newer than this: 30s, 10m, 12h, 7d (default: 7d)"
    )
    parser.add_argument("--delete", action="store_true", help="delete what is listed; without it, nothing is deleted")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache gc [--delete]``."""
    root = resolve_root(args.root)
    named = [find_path(name, root, suggest=not args.delete, only=True) for name in args.store]
    garbage = find_garbage(root, parse_age(args.older_than), named)
    for item in garbage if args.delete else []:
        delete(item)
    total = format_bytes(sum(item.nbytes for item in garbage))
    done = "deleted" if args.delete else "nothing deleted: run again with --delete"
    lines = [f"{len(garbage)} in {root}, {total}; {done}" if garbage else f"nothing to collect in {root}"]
    lines += [f"  {format_bytes(item.nbytes):>8}  {item.path}: {item.why}" for item in garbage]
    records = [{"path": str(item.path), "why": item.why, "nbytes": item.nbytes} for item in garbage]
    show({"deleted": args.delete, "garbage": records}, "\n".join(lines), args.json)
    return 0


def parse_age(text: str) -> float:
    """Seconds in ``30s``, ``10m``, ``12h`` or ``7d``.

    >>> parse_age("12h")
    43200.0
    """
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        raise FeatcacheError(f"--older-than {text}: expected a number with s, m, h or d, such as 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
