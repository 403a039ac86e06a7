"""Arguments shared by the commands for heads, and loading of the stores and heads that they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import root_argument
from featcache.errors import HeadError
from featcache.parameters import json_value
from featcache.store import ImageStore, TextStore, find_store, resolve_root
from featcache.store.catalogue import Entry
from featcache.store.protocol import FeatureTable
from featcache.store.reading.features import ImageFeatures
from featcache.store.reading.images import ViewStack
from featcache.store.reading.tokens import POOLS
from heads.estimators.catalogue import parameters_of, takes_prior

if TYPE_CHECKING:
    from heads.evaluation.metrics import Row
    from heads.fitted.base import LogitHead
    from heads.report.against import Comparison
    from heads.rows.in_memory import ResidentStore

HEAD_HELP = "file written by `featcache fit`"
RESULTS = "results.jsonl"
FORMATS = ("text", "csv", "markdown", "latex")


def rows_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, the device of the features."""
    parser.add_argument(
        "--device",
        dest="rows_device",
        metavar="DEVICE",  # in other commands, --device is that of the encoder
        help="hold the features on this device (such as cuda) and compute there (default: stream on the CPU)",
    )


def store_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that reads stores."""
    parser.add_argument(
        "--pool", choices=POOLS, help="pool the tokens of stores such as NAME/SPLIT#patch into one vector per image"
    )
    verify_argument(parser)
    root_argument(parser)


def verify_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-verify``."""
    parser.add_argument("--no-verify", action="store_true", help="do not check the stores' checksums")
    parser.set_defaults(rows_device=None, of=None, pool=None)


def results_argument(parser: argparse.ArgumentParser, per: str = "head") -> None:
    """Add ``--results``."""
    parser.add_argument(
        "--results", default=RESULTS, metavar="FILE", help=f"append one row per {per} to this file (default: {RESULTS})"
    )


def names_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--name``, of the splits of ``--on``."""
    parser.add_argument(
        "--name",
        nargs="+",
        dest="names",
        metavar="NAME",
        help=f"names of the splits of --on in results and tables, one for each (default: {default})",
    )


def metric_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--metric``."""
    parser.add_argument(
        "--metric", default="top1", help="what --select compares (default: top1); ties go to the lower NLL"
    )


def group_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--group``."""
    parser.add_argument(
        "--group", nargs="+", metavar="COLUMN", help="also report by these metadata columns (`label`: by class)"
    )


def seen_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--exclude-seen`` and ``--allow-seen``."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--exclude-seen",
        action="store_const",
        const="exclude",
        default="refuse",
        dest="seen",
        help="leave out (and count) rows that a head was fitted or chosen on (default: refuse them)",
    )
    either.add_argument("--allow-seen", action="store_const", const="allow", dest="seen", help="include such rows")


def output_arguments(parser: argparse.ArgumentParser, per: str = "head") -> None:
    """Add ``--results``, ``--report`` and ``--against``."""
    results_argument(parser, per)
    parser.add_argument("--report", metavar="FOLDER", help="write report.html, tables and plots there")
    against_argument(parser)


def against_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--against``."""
    parser.add_argument(
        "--against",
        metavar="published",
        help="show published figures beside the results: `published`, `published:NAME` with a model (ViT-B/16) or a "
        "system (wise-ft), or a TOML file of figures",
    )


def compared(rows: Sequence[Row], args: argparse.Namespace, *, prompts: str | None = None) -> list[Comparison]:
    """Comparisons of the rows with published figures; none without ``--against``."""
    if not args.against:
        return []
    from heads.report.against import compare_published

    return compare_published(rows, args.against, prompts=prompts)


def against_lines(rows: Sequence[Row], found: Sequence[Comparison], args: argparse.Namespace) -> list[str]:
    """The table of a comparison, as paragraphs to print; none without ``--against``."""
    if not args.against:
        return []
    from heads.report.against import comparison_text

    return ["", comparison_text(found, rows), ""]


def with_published(rows: Sequence[Row], found: Sequence[Comparison], args: argparse.Namespace) -> list[Row]:
    """The rows for ``--json``; with ``--against``, each has its comparisons under ``published``."""
    if not args.against:
        return list(rows)
    from heads.report.rows import label_of

    return [row | {"published": [one.to_json() for one in found if one.head == label_of(row)]} for row in rows]


def json_setting(head: str, text: str, dotted: bool = False) -> tuple[str, object]:
    """Name and value of a head's parameter in the form ``NAME=JSON``; HeadError for anything else.

    `dotted` also accepts `prior`, and shows the form HEAD.NAME=JSON in errors.
    """
    shown, form = (f"{head}.{text}", f"{head}.NAME=VALUE") if dotted else (f"--set {text}", "NAME=VALUE")
    name, equals, value = text.partition("=")
    known = [*parameters_of(head), *(["prior"] if dotted and takes_prior(head) else [])]
    if not equals or name not in known:
        raise HeadError(f"{shown}: expected {form} with one of {', '.join(known)}")
    try:
        return name, json_value(value)
    except ValueError:
        raise HeadError(f"{shown}: {value!r} is not a JSON value; quote strings twice: '\"text\"'") from None


def open_reference(reference: str, args: argparse.Namespace) -> FeatureTable | TextStore:
    """Open the store that a reference names, checked when read unless ``--no-verify``; ``--device`` moves its rows.

    If several stores match, those of the heads' encoder (see `load_heads`), or of the first store's, are preferred.
    """
    verify = "never" if args.no_verify else "read"
    store = find_store(reference, resolve_root(args.root), fits=args.of, verify=verify)
    if not isinstance(store, ImageFeatures | TextStore):
        raise HeadError(f"{reference}: a store of {store.kind}; expected a store of images or texts")
    if args.of is None:
        args.of = _beside(store)
    if args.pool and isinstance(store, ImageStore | ViewStack):
        store = store.pooled(args.pool)
    device = args.rows_device
    if device is None or isinstance(store, TextStore):
        return store
    if store.tokens is not None:
        store.require_rows(f"--device {device} holds one vector per image; the head's own device is --set device")
    if store.groups is not None:
        raise HeadError(f"--device {device}: {reference} stacks views, which are streamed; leave --device out")
    from heads.rows.in_memory import resident

    return resident(store, device)


def _beside(store: ImageFeatures | TextStore) -> Callable[[Entry], bool]:
    """A test of whether another store has the same encoder: the same image tower, or a paired text tower."""
    key, digests = store.path.parent.name, set(store.text_digests)  # the manifest of a tap has its own key

    def fits(entry: Entry) -> bool:
        if entry.kind == store.kind:
            return entry.encoder_key == key
        return bool(digests & set(entry.text_digests))

    return fits


def _of_heads(heads: Sequence[LogitHead]) -> Callable[[Entry], bool] | None:
    """A test of whether an image store has the encoder of every head; None if no head records its encoder."""
    records = [head.provenance for head in heads if head.provenance.encoder_key or head.provenance.text_digest]

    def fits(entry: Entry) -> bool:
        return all(
            record.encoder_key in (None, entry.encoder_key) and record.text_digest in (None, *entry.text_digests)
            for record in records
        )

    return fits if records else None


def open_images(reference: str, args: argparse.Namespace) -> ImageStore | ResidentStore:
    """Open the image store that a reference names; HeadError for a store of texts, or of stacked views."""
    from heads.rows.in_memory import ResidentStore

    store = open_reference(reference, args)
    if not isinstance(store, ImageStore | ResidentStore):
        what = "a store of texts, or several views as one"
        raise HeadError(f"{reference}: {what}; expected a store of images, made by `featcache encode`")
    return store


def open_texts(reference: str, args: argparse.Namespace, what: str = "") -> TextStore:
    """Open the text store that a reference names; HeadError, prefixed with `what`, for a store of images."""
    store = open_reference(reference, args)
    if not isinstance(store, TextStore):
        raise HeadError(f"{what}{reference}: a store of images; expected a store of texts, made by `featcache text`")
    return store


def load_heads(paths: Sequence[str], args: argparse.Namespace) -> list[LogitHead]:
    """Load heads from files; if several share a name, the file name is appended to it.

    `open_reference` then prefers stores of the heads' encoder.
    """
    from heads import load

    heads = [load(path) for path in paths]
    args.of = _of_heads(heads)
    names = [head.name for head in heads]
    return [
        replace(head, name=f"{head.name}:{Path(path).stem}") if names.count(head.name) > 1 else head  # type: ignore[type-var]
        for head, path in zip(heads, paths, strict=True)
    ]
