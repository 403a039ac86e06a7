"""Arguments that several verbs share, and how a verb shows its result."""

from __future__ import annotations

import argparse
import json
from typing import Any

from featcache.encoders import PREPARATIONS
from featcache.progress import Printed, Progress, Silent


def root_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--root``."""
    parser.add_argument(
        "--root", help="folder, or s3://bucket/prefix, of all stores (default: $FEATCACHE_ROOT, else ./cache)"
    )


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names an encoder."""
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny, an open_clip architecture, local-dir:FOLDER, hf-hub:NAME, timm:NAME[,FILE], python:MODULE:FUNCTION",
    )
    parser.add_argument("--pretrained", help="open_clip tag, checkpoint file, or `random`")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the model's products")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    root_argument(parser)


def preprocess_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--preprocess``."""
    parser.add_argument(
        "--preprocess",
        choices=sorted(PREPARATIONS),
        help="prepare pictures otherwise than the model says: central-crop takes the central 7/8, as Lipsum-FT does",
    )


def show(value: Any, text: str, as_json: bool) -> None:
    """Print a result: one JSON value, or text for people."""
    print(json.dumps(value) if as_json else text)


def _progress(args: argparse.Namespace) -> Progress:
    return Silent() if args.quiet else Printed()
