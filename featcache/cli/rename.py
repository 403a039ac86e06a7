"""The verb ``featcache rename``: rename a store."""

import argparse

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.store import find_path, resolve_root
from featcache.store.upkeep.edits import rename


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache rename``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument("name", metavar="NAME", help="NAME/SPLIT, or NAME to keep the split")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache rename STORE NAME[/SPLIT]``."""
    root = resolve_root(args.root)
    old, new = rename(find_path(args.store, root, only=True), args.name, root)
    show({"old": old, "new": new}, f"{old} is now {new}", args.json)
    return 0
