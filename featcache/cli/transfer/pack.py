"""The verb ``featcache pack``: write a store to one file."""

import argparse

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.progress import format_bytes
from featcache.store import find_path, resolve_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache pack``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument("file", metavar="FILE", help="tar file to write, - for standard output")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache pack STORE FILE``."""
    from featcache.transfer.archive import pack

    path = find_path(args.store, resolve_root(args.root))
    size = pack(path, args.file)
    record = {"store": str(path), "file": args.file, "bytes": size}
    show(record, f"{args.file}: {format_bytes(size)} of {path}", args.json, args.file)
    return 0
