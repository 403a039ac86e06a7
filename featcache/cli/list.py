"""The verb ``featcache list``: every store below the root, with its size, age and model."""

import argparse

from featcache.cli.arguments import root_argument, show
from featcache.progress import format_age
from featcache.store import list_stores, resolve_root
from featcache.store.catalogue import address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache list``."""
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache list``."""
    root = resolve_root(args.root)
    entries = list_stores(root)
    lines = [f"{len(entries)} store(s) in {root}"]
    for entry in entries:
        state = "" if entry.finished else "  NOT FINISHED"
        size = f"{entry.rows:>10,} rows {entry.nbytes / 1e6:>9,.1f} MB {format_age(entry.age):>8}"
        parts = f"  # {', '.join(entry.parts)}" if entry.parts else ""
        also = "".join(f"  = @{model}" for model in entry.other_models)
        lines.append(f"  {address(entry, entries):<40} {size}  {entry.key}{state}{parts}{also}")
    show([entry.to_json() for entry in entries], "\n".join(lines), args.json)
    return 0
