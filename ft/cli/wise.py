"""The verb ``featcache wise``: weight-space interpolation (WiSE-FT), and the choice of alpha on a selection split."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cli.arguments import (
    device_argument,
    preprocess_argument,
    pretrained_argument,
    root_argument,
    show,
)
from featcache.errors import FeatcacheError
from heads.cli.arguments import metric_argument, results_argument

if TYPE_CHECKING:
    from ft.merging.sweep import Sweep

FISHER_FLOOR = 1e-8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache wise``."""
    parser.add_argument(
        "zero_shot",
        metavar="ZERO_SHOT",
        help="the zero-shot model: a model folder, `tiny`, RUN/start (what a finetune run began with), or an "
        "open_clip architecture with --pretrained",
    )
    parser.add_argument(
        "fine_tuned",
        metavar="FINE_TUNED",
        nargs="+",
        help="model folder or checkpoint file of the fine-tuned model; several are averaged first (a soup)",
    )
    parser.add_argument(
        "--alpha",
        "--alphas",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="A",
        help="0 is zero-shot, 1 is fine-tuned (default: 0.5)",
    )
    parser.add_argument(
        "-o",
        "--output",
        "--out",
        dest="out",
        required=True,
        metavar="DIR",
        help="folder of the merged models: alpha=0.500 and so on",
    )
    parser.add_argument(
        "--fisher",
        nargs=2,
        metavar=("F0", "F1"),
        help="weight each element by the diagonal Fisher information of both models (featcache fisher)",
    )
    parser.add_argument(
        "--fisher-floor", type=float, default=FISHER_FLOOR, metavar="F", help="least Fisher information (default: 1e-8)"
    )
    pretrained_argument(parser, "ZERO_SHOT, where that is an architecture")
    parser.add_argument("--overwrite", action="store_true", help="replace existing folders")
    _evaluation_arguments(parser)


def _evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """With a selection split, the merged models are encoded and evaluated, and the best one is kept."""
    parser.add_argument(
        "--select", metavar="DATASET:SPLIT", help="encode and evaluate every merged model on this split, keep the best"
    )
    parser.add_argument(
        "--on",
        nargs="+",
        default=[],
        metavar="DATASET:SPLIT",
        help="splits to report, with --select; the first one is the in-distribution one",
    )
    parser.add_argument("--best-only", action="store_true", help="evaluate only the chosen model on the splits of --on")
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="HEAD",
        help="heads to interpolate too: the zero-shot model's (a file, or zero_shot) and one for each fine-tuned model",
    )
    parser.add_argument("--templates", default="simple", help="templates of zero-shot heads (default: simple)")
    metric_argument(parser)
    parser.add_argument(
        "--soup", default="uniform", choices=("uniform", "greedy"), help="how several fine-tuned models are averaged"
    )
    results_argument(parser, per="alpha")
    device_argument(parser)
    preprocess_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache wise ZERO_SHOT FINE_TUNED... --alpha A... --out DIR [--select DATASET:SPLIT]``."""
    from ft.merging.wise import wise

    fisher = (args.fisher[0], args.fisher[1]) if args.fisher else None
    if args.select:
        return _sweep(args, fisher)
    if args.on or args.heads or args.best_only or args.soup != "uniform" or args.preprocess:
        raise FeatcacheError("--on, --heads, --best-only, --preprocess and --soup greedy need --select; give it too")
    folders = wise(
        args.zero_shot,
        args.fine_tuned,
        args.alpha,
        args.out,
        pretrained=args.pretrained,
        fisher=fisher,
        floor=args.fisher_floor,
        overwrite=args.overwrite,
    )
    models = [
        {"alpha": alpha, "folder": str(folder), "model": f"local-dir:{folder}"}
        for alpha, folder in zip(args.alpha, folders, strict=True)
    ]
    lines = [f"{model['folder']}  (featcache encode DATA --model {model['model']})" for model in models]
    show(models, "\n".join(lines), args.json)
    return 0


def _sweep(args: argparse.Namespace, fisher: tuple[str, str] | None) -> int:
    from ft.merging.sweep import WiseOptions, sweep
    from ft.training.loop import open_split
    from heads import append_rows

    options = WiseOptions(
        pretrained=args.pretrained,
        fisher=fisher,
        floor=args.fisher_floor,
        overwrite=args.overwrite,
        on=[open_split(spec) for spec in args.on],
        heads=args.heads,
        templates=args.templates,
        metric=args.metric,
        soup=args.soup,
        best_only=args.best_only,
        root=args.root,
        device=args.device,
        preprocess=args.preprocess,
    )
    found = sweep(args.zero_shot, args.fine_tuned, args.alpha, args.out, open_split(args.select), options)
    append_rows(args.results, [*found.rows, found.best])
    show(_record(found), _text(found, args), args.json)
    return 0


def _record(found: Sweep) -> dict[str, Any]:
    return {
        "alpha": found.alpha,
        "folder": str(found.folder),
        "head": str(found.head),
        "ingredients": found.ingredients,
        "best": found.best,
        "rows": found.rows,
    }


def _choice(found: Sweep) -> dict[str, Any]:
    entry: dict[str, Any] = found.best["chosen_on"][-1]
    return entry


def _tables(found: Sweep) -> list[str]:
    """The selection split by itself, as it is not reported; then the splits of --on, the first as the reference."""
    from heads.report import table_text
    from heads.report.rows import datasets_of

    selection = f"{_choice(found)['name']}/{_choice(found)['split']}"
    reported = [name for name in datasets_of([found.best]) if name != selection]
    tables = [table_text(found.rows, [selection])]
    if reported:
        rows = [row for row in found.rows if f"{reported[0]}:top1" in row] or [found.best]  # --best-only: that one
        tables.append(table_text(rows, reported, reference=reported[0]))
    return [f"{table}\n" for table in tables]


def _text(found: Sweep, args: argparse.Namespace) -> str:
    from heads.report.rows import choice_text

    lines = [*_tables(found), f"best on {args.select}: alpha = {found.alpha:g} ({choice_text(_choice(found))})"]
    if len(args.fine_tuned) > 1:
        lines.append(f"{args.soup} soup of {', '.join(Path(args.fine_tuned[k]).as_posix() for k in found.ingredients)}")
    way = f" --preprocess {args.preprocess}" if args.preprocess else ""
    lines += [f"{found.folder}  (featcache encode DATA --model local-dir:{found.folder}{way})", f"{found.head}"]
    lines.append(f"{len(found.rows) + 1} row(s) appended to {args.results}")
    return "\n".join(lines)
