"""The verb ``featcache rm``: delete finished stores by name, with ``--yes``."""

import argparse

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.progress import format_bytes
from featcache.store import find_path, resolve_root
from featcache.store.upkeep.deletion import delete, stores_to_delete


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache rm``."""
    parser.add_argument("store", nargs="+", metavar="STORE", help=STORE_HELP)
    parser.add_argument("--yes", action="store_true", help="delete what is listed; without it, nothing is deleted")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache rm STORE... [--yes]``."""
    root = resolve_root(args.root)
    paths = dict.fromkeys(find_path(name, root, suggest=False, only=True) for name in args.store)
    found = stores_to_delete(list(paths), root)
    for item in found if args.yes else []:
        delete(item)
    total = format_bytes(sum(item.nbytes for item in found))
    lines = [f"  {format_bytes(item.nbytes):>8}  {item.path}: {item.why}" for item in found]
    lines.append(f"{total} deleted" if args.yes else f"{total}; nothing deleted: add --yes to delete it")
    records = [{"path": str(item.path), "what": item.why, "nbytes": item.nbytes} for item in found]
    show({"deleted": args.yes, "stores": records}, "\n".join(lines), args.json)
    return 0
