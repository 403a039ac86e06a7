"""The verb ``featcache merge``: merge several models into one, by any method in `ft.merging.MERGES`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import device_argument, preprocess_argument, pretrained_argument, show
from featcache.errors import TrainingError
from featcache.parameters import described, json_value
from ft.merging import MERGES

if TYPE_CHECKING:
    from heads import LinearHead


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache merge``."""
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(MERGES)}")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="model folders or checkpoint files, RUN/best")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model they were fine-tuned from: a model folder, `tiny`, RUN/start, or an open_clip architecture "
        "with --pretrained",
    )
    pretrained_argument(parser, "--base, if it is an architecture")
    parser.add_argument(
        "-o", "--output", "--out", dest="out", required=True, metavar="DIR", help="folder of the merged model"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of the method, as JSON: --set scale=0.4; `featcache merge METHOD --help` lists them",
    )
    parser.add_argument("--fisher", nargs="+", default=[], metavar="FILE", help="for fisher: one file per model")
    parser.add_argument(
        "--moments",
        nargs="+",
        default=[],
        metavar="FILE",
        help="for regmean: one file per model (default: those of `featcache moments` beside the models)",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        default=[],
        metavar="HEAD",
        help="also merge the models' heads: one per model, preceded by the base's if the method takes a base",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    preprocess_argument(parser)
    device_argument(parser)
    vars(parser)["explain"] = _parameters


def _parameters(args: argparse.Namespace) -> str:
    """The parameters of the named method, for ``--help``."""
    if (method := str(vars(args).get("method"))) not in MERGES:
        return ""
    from ft.merging.merge import settings_of

    return f"\nparameters of {method}, for --set:\n{described(settings_of(method))}\n"


def run(args: argparse.Namespace) -> int:
    """``featcache merge METHOD MODEL... --out DIR``."""
    from ft.checkpoints.parents import parent_of
    from ft.merging.merge import check_settings, merge, needs_of

    settings = dict(map(_setting, args.set))
    check_settings(args.method, settings)
    if args.pretrained and not args.base:
        raise TrainingError("--pretrained belongs to --base; give it too")
    base = parent_of(args.base, args.pretrained) if args.base else None
    heads = _heads(args, "base" in needs_of(args.method))
    if args.preprocess and not heads:
        raise TrainingError("--preprocess applies to merged heads; give --heads too")
    folder = merge(
        args.method,
        args.models,
        args.out,
        base=base,
        fishers=args.fisher,
        moments=args.moments,
        overwrite=args.overwrite,
        **settings,
    )
    way = f" --preprocess {args.preprocess}" if args.preprocess else ""
    record, text = {"model": folder}, f"{folder}  (featcache encode DATA --model local-dir:{folder}{way})"
    if heads:
        record["head"] = _merge_heads(args, heads, folder, settings)
        text += f"\n{record['head']}  (featcache evaluate {record['head']} --on STORE)"
    show(record, text, args.json)
    return 0


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if name and equals:
            return name, json_value(value)
    raise TrainingError(f"--set {text}: expected NAME=VALUE with a value in JSON, as in scale=0.4")


def _heads(args: argparse.Namespace, with_base: bool) -> Sequence[LinearHead]:
    """Load the heads to merge: that of the base, if needed, then one per model."""
    from heads import load
    from heads.fitted.linear import as_linear

    expected = len(args.models) + with_base
    if args.heads and len(args.heads) != expected:
        first = ", that of the base first" if with_base else ""
        raise TrainingError(
            f"{len(args.heads)} heads for {len(args.models)} models and {args.method}: expected {expected}{first}"
        )
    return [as_linear(load(path)) for path in args.heads]


def _merge_heads(
    args: argparse.Namespace, heads: Sequence[LinearHead], folder: Path, settings: dict[str, object]
) -> Path:
    """Write the merged head beside the merged model."""
    from ft.checkpoints.folder import head_path, read_state
    from ft.checkpoints.parents import load_open_clip
    from ft.merging.merge import merge_heads, needs_of
    from ft.merging.moments import moments_path
    from heads import save

    needs = needs_of(args.method)
    base = heads[0] if "base" in needs else None
    models = heads if base is None else heads[1:]
    moments = args.moments or [moments_path(model) for model in args.models]
    merged = merge_heads(
        args.method,
        models,
        load_open_clip(f"local-dir:{folder}", device=args.device, preprocess=args.preprocess),
        base=base,
        fishers=[read_state(path) for path in args.fisher] if "fishers" in needs else [],
        moments=[read_state(path) for path in moments] if "moments" in needs else [],
        **settings,
    )
    return save(merged, head_path(folder.parent, folder.name))
