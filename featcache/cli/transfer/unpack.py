"""The verb ``featcache unpack``: check a packed store and add it to the root."""

import argparse

from featcache.cli.arguments import root_argument, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache unpack``."""
    parser.add_argument("file", metavar="FILE", help="file written by `featcache pack`")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache unpack FILE``."""
    from featcache.transfer.archive import unpack

    store, there = unpack(args.file, args.root)
    how = "already exists" if there else "checked and unpacked"
    text = f"{store.name}@{store.encoder_name}: {how}\n  {store.path}"
    show({"store": str(store.path), "there": there}, text, args.json)
    return 0
