"""The verbs that look after stores: list, info, verify, gc, export, import."""

import argparse
import re
import time
from typing import Any

from featcache.cli.arguments import root_argument, show
from featcache.datasets import open_dataset
from featcache.encoding.changes import check_source
from featcache.errors import ContentChangedError, FeatcacheError, StoreCorruptError
from featcache.progress import format_age, format_seconds
from featcache.store import ImageStore, find_path, find_store, list_stores, open_image_store, repair, resolve_root
from featcache.store import verify as verify_store
from featcache.store.catalogue import other_names
from featcache.store.images import parts_of
from featcache.store.maintenance import delete, find_garbage
from featcache.store.places import StorePath

STORE_HELP = "folder, s3:// URL, key, NAME/SPLIT[@MODEL] or texts/NAME[@MODEL]; #TAP behind it for a tap or view"


def list__arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache list``."""
    root_argument(parser)


def list_(args: argparse.Namespace) -> int:
    """``featcache list``: every store below the root, with its size, age and model."""
    root = resolve_root(args.root)
    entries = list_stores(root)
    lines = [f"{len(entries)} store(s) in {root}"]
    for entry in entries:
        state = "" if entry.finished else "  NOT FINISHED"
        size = f"{entry.rows:>10,} rows {entry.nbytes / 1e6:>9,.1f} MB {format_age(entry.age):>8}"
        parts = f"  # {', '.join(entry.parts)}" if entry.parts else ""
        also = "".join(f"  = @{model}" for model in entry.other_models)
        lines.append(f"  {entry.reference:<40} {size}  {entry.key}{state}{parts}{also}")
    show([entry.to_json() for entry in entries], "\n".join(lines), args.json)
    return 0


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache info``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    root_argument(parser)


def info(args: argparse.Namespace) -> int:
    """``featcache info STORE``: what it holds and where it comes from."""
    store = find_store(args.store, resolve_root(args.root))
    arrays = {name: spec.to_json() for name, spec in store.manifest.all_arrays.items()}
    record = {
        "store": str(store.path),
        "kind": store.kind,
        "key": store.manifest.key,
        "info": store.info,
        "identity": store.manifest.identity,
        "arrays": arrays,
        "provenance": store.provenance,
        "other_models": list(other_names(store.path)),
    }
    show(record, _describe(store, record), args.json)
    return 0


def _describe(store: Any, record: dict[str, Any]) -> str:
    lines = [repr(store), f"  key          {record['key']}"]
    if record["other_models"]:
        lines.append(f"  also found   {', '.join(f'@{model}' for model in record['other_models'])}")
    classes = store.classnames
    lines.append(f"  classes      {len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}")
    lines += [f"  {name:<12} {spec['dtype']} {tuple(spec['shape'])}" for name, spec in record["arrays"].items()]
    if isinstance(store, ImageStore):
        lines.append(f"  unreadable   {len(store.bad)}")
        lines += [f"    {bad.sample_id}: {bad.error}" for bad in store.bad[:10]]
        lines.append(f"  taps, views  {', '.join(part.label for part in parts_of(store)) or 'none'}")
        lines.append(f"  label digest {store.labels_digest}")
    lines += [f"  logit scale  {store.logit_scale}", f"  text tower   {store.text_digest}"]
    lines += [f"  {name:<12} {value}" for name, value in record["provenance"].items()]
    return "\n".join(lines)


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache verify``."""
    parser.add_argument("store", metavar="STORE", help=STORE_HELP)
    parser.add_argument("--deep", action="store_true", help="hash every file, not only sizes")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="hash every file and drop damaged chunks, so that encode makes them again",
    )
    parser.add_argument(
        "--against", metavar="DATA", help="also read and hash every image of the data set it was made from"
    )
    root_argument(parser)


def verify(args: argparse.Namespace) -> int:
    """``featcache verify STORE [--deep] [--repair]``: exit code 4 where something is damaged."""
    path = find_path(args.store, resolve_root(args.root))
    began = time.perf_counter()
    deep = args.deep or args.repair
    report = verify_store(path, deep=deep)
    seconds = time.perf_counter() - began
    if args.repair and not report.ok:
        repair(report)
    changed = _changed_sources(path, args.against) if args.against else []
    record = {
        "store": str(path),
        "ok": report.ok,
        "files": report.files,
        "problems": report.problems,
        "changed": changed,
    }
    lines = [f"{path}: {report.files} files, {report.nbytes / 1e6:,.1f} MB in {format_seconds(seconds)}"]
    lines += [f"  damaged: {problem}" for problem in report.problems]
    if report.ok:
        lines.append("  checksums agree" if deep else "  sizes and keys agree; contents were not hashed (--deep)")
    elif args.repair:
        lines.append(
            "  damaged chunks dropped; run the command that made the store: it redoes them and keeps the others"
        )
    else:
        lines.append("  run again with --repair, then the command that made the store: it redoes damaged chunks only")
    lines += [f"  source changed: {name}" for name in changed]
    if args.against:
        lines.append("  run encode with --refresh to take them over" if changed else "  the source is what was encoded")
    show(record, "\n".join(lines), args.json)
    return StoreCorruptError.exit_code if not report.ok else ContentChangedError.exit_code if changed else 0


def _changed_sources(path: StorePath, data: str) -> list[str]:
    store = open_image_store(path)
    return check_source(open_dataset(data, store.split), store)


def gc_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache gc``."""
    parser.add_argument("store", nargs="*", metavar="STORE", help=f"finished stores to delete too: {STORE_HELP}")
    parser.add_argument(
        "--older-than",
        default="7d",
        metavar="AGE",
        help="spare what was written since: 30s, 10m, 12h, 7d (default: 7d)",
    )
    parser.add_argument("--delete", action="store_true", help="delete what is listed; without it nothing is touched")
    root_argument(parser)


def gc(args: argparse.Namespace) -> int:
    """``featcache gc``: unfinished and unreadable stores, partial files; deleted only with ``--delete``."""
    root = resolve_root(args.root)
    named = [find_path(name, root, suggest=not args.delete) for name in args.store]
    garbage = find_garbage(root, parse_age(args.older_than), named)
    for item in garbage if args.delete else []:
        delete(item)
    total = sum(item.nbytes for item in garbage) / 1e6
    done = "deleted" if args.delete else "nothing deleted: run again with --delete"
    lines = [f"{len(garbage)} in {root}, {total:,.1f} MB; {done}" if garbage else f"nothing to collect in {root}"]
    lines += [f"  {item.nbytes / 1e6:>9,.1f} MB  {item.path}: {item.why}" for item in garbage]
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
