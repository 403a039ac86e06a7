"""The verb ``featcache verify``: check a store against its checksums, and against its source images."""

import argparse
import time

from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.datasets import open_dataset
from featcache.errors import ContentChangedError, StoreCorruptError
from featcache.progress import format_bytes, format_seconds
from featcache.store import find_path, open_image_store, repair, resolve_root, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache verify``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument("--deep", action="store_true", help="hash every file instead of comparing sizes")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="like --deep; also rewrite derived files and drop damaged chunks (encode redoes them)",
    )
    parser.add_argument("--against", metavar="DATA", help="also read and hash every image of the source data set")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache verify STORE``: exit code 4 for damaged files, 5 for changed images."""
    path = find_path(args.store, resolve_root(args.root))
    began = time.perf_counter()
    deep = args.deep or args.repair
    report = verify(path, deep=deep)
    seconds = time.perf_counter() - began
    if args.repair and not report.ok:
        repair(report)
    changed = []
    if args.against:
        from featcache.encoding.changes import check_source

        store = open_image_store(path)
        changed = check_source(open_dataset(args.against, store.split), store)
    facts = {"ok": report.ok, "files": report.files, "problems": report.problems, "changed": changed}
    lines = [f"{path}: {report.files} files, {format_bytes(report.nbytes)} in {format_seconds(seconds)}"]
    lines += [f"  damaged: {problem}" for problem in report.problems]
    if report.ok:
        lines.append("  checksums agree" if deep else "  sizes and keys agree; contents were not hashed (--deep)")
    elif args.repair and not report.encode_again:
        lines.append("  repaired: damaged files were written again; no chunk was damaged")
    elif args.repair:
        lines.append("  damaged chunks dropped; run the command that made the store: it redoes only these")
    elif report.encode_again:
        lines.append("  run again with --repair, then the command that made the store: it redoes damaged chunks only")
    else:
        lines.append("  run again with --repair to write these files again; no chunk is damaged")
    lines += [f"  source changed: {name}" for name in changed]
    if args.against:
        now = "  run encode to update the store; it says before it replaces features"
        lines.append(now if changed else "  the source is unchanged")
    show({"store": str(path), **facts}, "\n".join(lines), args.json)
    return StoreCorruptError.exit_code if not report.ok else ContentChangedError.exit_code if changed else 0
