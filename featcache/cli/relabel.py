"""The verb ``featcache relabel``: rename the classes of a store; features and label indices stay the same."""

import argparse

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.errors import DatasetError
from featcache.progress import counted
from featcache.prompts import load_classnames
from featcache.store import find_path, resolve_root
from featcache.store.upkeep.edits import relabel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache relabel``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument("renamed", metavar="OLD=NEW", nargs="*", help="classes to rename")
    parser.add_argument(
        "--classes", metavar="FILE", help="all class names in label order, one per line, instead of OLD=NEW"
    )
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache relabel STORE OLD=NEW...``, ``featcache relabel STORE --classes FILE``."""
    if bool(args.classes) == bool(args.renamed):
        raise DatasetError("featcache relabel: expected OLD=NEW for some classes, or --classes FILE with all of them")
    names = load_classnames(args.classes) if args.classes else dict(map(_pair, args.renamed))
    path = find_path(args.store, resolve_root(args.root), only=True)
    changed = relabel(path, names)
    lines = [f"  {old} -> {new}" for old, new in changed]
    if changed:
        lines.append("heads fitted before have the old names: fit them again (features are unchanged)")
    text = "\n".join([f"{path}: {counted(len(changed), 'class name')} changed", *lines])
    show({"store": str(path), "changed": [list(pair) for pair in changed]}, text, args.json)
    return 0


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or not new.strip():
        raise DatasetError(f'{text!r}: expected OLD=NEW, such as "n01440764=tench"; quote names with spaces')
    return old, new
