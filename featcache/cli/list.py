"""The verb ``featcache list``: all stores below the root, with size, age and model."""

import argparse
import difflib
from pathlib import Path

from featcache.cli.arguments import root_argument, show, terminal_width
from featcache.errors import FeatcacheError
from featcache.progress import counted, format_age, format_bytes
from featcache.store import list_stores, resolve_root
from featcache.store.catalogue import Entry
from featcache.store.finding import address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache list``."""
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache list``."""
    root = resolve_root(args.root)
    if args.root and isinstance(root, Path) and not root.exists():
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        near = difflib.get_close_matches(root.name, beside, n=1)
        hint = f"did you mean {root.parent / near[0]}?" if near else "name the folder of the stores"
        raise FeatcacheError(f"--root {args.root}: no such folder; {hint}")
    entries = list_stores(root)
    lines = [f"{counted(len(entries), 'store')} in {root}", *_table(entries, terminal_width())]
    show([entry.to_json() for entry in entries], "\n".join(lines), args.json)
    return 0


def _table(entries: list[Entry], width: int | None) -> list[str]:
    """One line per store: name, shape, classes, size, age; full keys if the output is not a terminal."""
    cells = [
        (
            address(entry, entries),
            f"{entry.rows:,} x {entry.dim or '?'}",
            f"{entry.classes:,} classes" if entry.classes else "",
            format_bytes(entry.nbytes),
            format_age(entry.age),
            "" if entry.finished else "NOT FINISHED",
        )
        for entry in entries
    ]
    if not cells:
        return []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for entry, (name, *rest) in zip(entries, cells, strict=True):
        aligned = [f"{cell:>{size}}" for cell, size in zip(rest, widths[1:], strict=True)]
        row = "  ".join([f"  {name:<{widths[0]}}", *aligned])
        key = entry.key if width is None else "/".join(half[:8] for half in entry.key.split("/"))
        parts = f"  # {', '.join(entry.parts)}" if entry.parts else ""
        also = "".join(f"  = @{model}" for model in entry.other_models)
        for more in (f"  {key}", parts, also):
            row += more if width is None or len(row) + len(more) <= width else ""
        lines.append(row.rstrip())
    return lines
