"""The command ``featcache predict``: classes and probabilities of image files."""

from __future__ import annotations

import argparse
import csv
import glob
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import (
    decoding_arguments,
    device_argument,
    precision_argument,
    preprocess_argument,
    pretrained_argument,
    root_argument,
    show,
)
from featcache.errors import HeadError, StoreNotFoundError
from featcache.store.layout import MANIFEST
from heads.cli.arguments import HEAD_HELP, load_heads, open_images, verify_argument
from heads.cli.classes import class_arguments, class_subset

if TYPE_CHECKING:
    from featcache.store.protocol import FeatureTable
    from heads.evaluation.metrics import Row
    from heads.evaluation.predict import Prediction
    from heads.fitted.base import LogitHead

CSV_COLUMNS = ("image", "place", "class", "index", "probability", "error")
"""Columns of ``--csv``: one line per predicted class (`place` counts from 1) or unreadable image."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache predict``."""
    add = parser.add_argument
    parser.epilog = (
        "Images that are missing or cannot be read are named in the output and counted on stderr. Exit code: 0 if at "
        "least one image was read, 2 if none was."
    )
    add("head", metavar="HEAD", help=HEAD_HELP)
    add(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, folders, patterns, @FILE with one path per line; or one store (NAME/SPLIT) with their features",
    )
    add("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    add("--csv", action="store_true", help=f"print CSV: {', '.join(CSV_COLUMNS)}")
    add("--model", help="the head's encoder, if the head does not say how to load it")
    pretrained_argument(parser)
    precision_argument(parser, "default: the head's", default=None)
    preprocess_argument(parser)
    device_argument(parser)
    decoding_arguments(parser, 64)
    class_arguments(parser)
    verify_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache predict HEAD IMAGES...``: exit code 0 if an image could be read, 2 if none."""
    from heads.evaluation.predict import encoder_of, find_images, predict_images, predict_rows

    if args.csv and args.json:
        raise HeadError("--csv and --json print different things; give one of them")
    [head] = load_heads([args.head], args)
    if (store := _store(args)) is not None:
        found = list(predict_rows(head := _restricted(head, args), store, top=args.top))
    else:
        images = find_images(args.images)
        settings = {"device": args.device, "precision": args.precision, "preprocess": args.preprocess}
        encoder = encoder_of(head, args.model, args.pretrained, **settings)
        options = {"top": args.top, "batch_size": args.batch_size, "workers": args.workers}
        found = list(predict_images(head := _restricted(head, args), images, encoder, **options))
    records = [_record(one, head.classnames) for one in found]
    if args.csv:
        _print_csv(records)
    else:
        show(records, "\n".join(map(_line, records)), args.json)
    bad = sum(bool(one.error) for one in found)
    if bad:
        print(f"featcache: {bad} of {len(found)} images could not be read", file=sys.stderr)
    return 2 if bad == len(found) else 0


def _store(args: argparse.Namespace) -> FeatureTable | None:
    """The store given instead of images; None for files, folders and patterns."""
    place, *others = args.images
    path = Path(place)
    if others or place.startswith("@") or glob.has_magic(place) or path.is_file():
        return None
    if path.is_dir() and not (path / MANIFEST).exists():
        return None
    try:
        return open_images(place, args)
    except StoreNotFoundError:
        return None


def _restricted(head: LogitHead, args: argparse.Namespace) -> LogitHead:
    """The head with the classes of ``--class-subset`` or ``--projection``."""
    from heads import Projection

    subset = class_subset(args, head.classnames, [], head.name)
    if subset is None:
        return head
    return subset.of(head) if isinstance(subset, Projection) else head.restrict(subset)  # type: ignore[arg-type]


def _record(one: Prediction, names: tuple[str, ...]) -> Row:
    if one.error:
        return {"image": one.image, "error": one.error}
    pairs = zip(one.classes.tolist(), one.probabilities.tolist(), strict=True)
    classes = [{"class": names[index], "index": index, "probability": share} for index, share in pairs]
    return {"image": one.image, "predictions": classes}


def _line(record: Row) -> str:
    if "error" in record:
        return f"{record['image']}\tunreadable: {record['error']}"
    classes = ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in record["predictions"])
    return f"{record['image']}\t{classes}"


def _print_csv(records: list[Row]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in records:
        if "error" in record:
            writer.writerow([record["image"], "", "", "", "", record["error"]])
        for place, one in enumerate(record.get("predictions", ()), start=1):
            writer.writerow([record["image"], place, one["class"], one["index"], f"{one['probability']:.6g}", ""])
