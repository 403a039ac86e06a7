"""The verb ``featcache unpack``: a packed store put among the others, after it was checked."""

import argparse

from featcache.cli.arguments import root_argument, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache unpack``."""
    parser.add_argument("file", metavar="FILE", help="what `featcache pack` wrote")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache unpack FILE``."""
    from featcache.transfer.archive import unpack

    store, there = unpack(args.file, args.root)
    how = "was there already" if there else "checked and unpacked"
    show(
        {"store": str(store.path), "there": there},
        f"{store.name}@{store.encoder_name}: {how}\n  {store.path}",
        args.json,
    )
    return 0
