"""The verb ``featcache predict``: image files to classes and probabilities."""

from __future__ import annotations

import argparse
import csv
import sys
from typing import TYPE_CHECKING

from featcache.cli.arguments import (
    decoding_arguments,
    device_argument,
    preprocess_argument,
    pretrained_argument,
    show,
)
from featcache.errors import HeadError
from heads.cli.arguments import HEAD_HELP
from heads.cli.classes import class_arguments, class_subset

if TYPE_CHECKING:
    from heads.evaluation.predict import Prediction
    from heads.fitted.base import LogitHead

CSV_COLUMNS = ("image", "place", "class", "index", "probability", "error")
"""What ``--csv`` prints: one line per predicted class, `place` counting from 1, or one per unreadable image."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache predict``."""
    parser.epilog = (
        "Images that are missing or cannot be read are named in the output and counted on stderr. Exit code: 0 if at "
        "least one image was read, 2 if none was."
    )
    parser.add_argument("head", metavar="HEAD", help=HEAD_HELP)
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", help="files, folders, patterns, or @FILE with one path per line"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--csv", action="store_true", help=f"print CSV: {', '.join(CSV_COLUMNS)}")
    parser.add_argument("--model", help="the head's encoder, where the head does not say how to load it")
    pretrained_argument(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the head's")
    preprocess_argument(parser)
    device_argument(parser)
    decoding_arguments(parser, 64)
    class_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache predict HEAD IMAGES...``: exit code 0 if an image could be read, 2 if none."""
    from heads import load
    from heads.evaluation.predict import encoder_of, find_images, predict_images

    if args.csv and args.json:
        raise HeadError("--csv and --json print different things; give one of them")
    head = load(args.head)
    images = find_images(args.images)
    settings = {"device": args.device, "precision": args.precision, "preprocess": args.preprocess}
    encoder = encoder_of(head, args.model, args.pretrained, **settings)
    head = _restricted(head, args)
    options = {"top": args.top, "batch_size": args.batch_size, "workers": args.workers}
    found = list(predict_images(head, images, encoder, **options))
    names = head.classnames
    if args.csv:
        _print_csv(found, names)
    else:
        show([_record(one, names) for one in found], "\n".join(_line(one, names) for one in found), args.json)
    bad = sum(bool(one.error) for one in found)
    if bad:
        print(f"featcache: {bad} of {len(found)} images could not be read", file=sys.stderr)
    return 2 if bad == len(found) else 0


def _restricted(head: LogitHead, args: argparse.Namespace) -> LogitHead:
    """The head on the classes of ``--class-subset`` or ``--projection``."""
    from heads import Projection

    subset = class_subset(args, head.classnames, [], head.name)
    if subset is None:
        return head
    return subset.of(head) if isinstance(subset, Projection) else head.restrict(subset)  # type: ignore[arg-type]


def _record(one: Prediction, names: tuple[str, ...]) -> dict[str, object]:
    if one.error:
        return {"image": one.image, "error": one.error}
    pairs = zip(one.classes.tolist(), one.probabilities.tolist(), strict=True)
    return {
        "image": one.image,
        "predictions": [{"class": names[index], "index": index, "probability": share} for index, share in pairs],
    }


def _line(one: Prediction, names: tuple[str, ...]) -> str:
    if one.error:
        return f"{one.image}\tunreadable: {one.error}"
    pairs = zip(one.classes, one.probabilities, strict=True)
    return f"{one.image}\t" + ", ".join(f"{names[index]} {100 * share:.1f} %" for index, share in pairs)


def _print_csv(found: list[Prediction], names: tuple[str, ...]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in found:
        if one.error:
            writer.writerow([one.image, "", "", "", "", one.error])
        for place, (index, share) in enumerate(zip(one.classes, one.probabilities, strict=True), start=1):
            writer.writerow([one.image, place, names[index], index, f"{share:.6g}", ""])
