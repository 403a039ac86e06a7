"""The verbs of weight-space ensembles and their parts: wise, fisher, convert."""

import argparse
from pathlib import Path
from typing import Any

from featcache.cli.arguments import preprocess_argument, root_argument, show
from featcache.errors import FeatcacheError
from ft.merging.interpolate import FISHER_FLOOR
from ft.merging.sweep import SOUPS, Sweep, WiseOptions, sweep
from ft.merging.wise import wise as merge
from ft.training.loop import open_split
from heads import append_rows
from heads.report import table_text
from heads.report.rows import choice_text, datasets_of


def wise_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache wise``."""
    parser.add_argument(
        "zero_shot",
        metavar="ZERO_SHOT",
        help="the zero-shot model: a model folder, `tiny`, RUN/start (what a run of finetune began with), or an "
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
        help="where the folders alpha=0.500 and so on go",
    )
    parser.add_argument(
        "--fisher",
        nargs=2,
        metavar=("F0", "F1"),
        help="diagonal Fisher information of both models (featcache fisher): weights by it, element by element",
    )
    parser.add_argument(
        "--fisher-floor", type=float, default=FISHER_FLOOR, metavar="F", help="least Fisher information (default: 1e-8)"
    )
    parser.add_argument("--pretrained", help="weights of ZERO_SHOT, an architecture: open_clip tag or checkpoint file")
    parser.add_argument("--overwrite", action="store_true", help="replace folders that are already there")
    _judging_arguments(parser)


def _judging_arguments(parser: argparse.ArgumentParser) -> None:
    """With a selection split the merged models are encoded and judged, and the best one is kept."""
    parser.add_argument("--select", metavar="DATASET:SPLIT", help="encode and judge every merged model, keep the best")
    parser.add_argument(
        "--on",
        nargs="+",
        default=[],
        metavar="DATASET:SPLIT",
        help="splits to report, with --select; the first one is the in-distribution one",
    )
    parser.add_argument("--best-only", action="store_true", help="judge only the chosen model on the splits of --on")
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="HEAD",
        help="heads to interpolate too: the zero-shot model's (a file, or zero_shot) and one for each fine-tuned model",
    )
    parser.add_argument("--templates", default="simple", help="of zero-shot heads (default: simple)")
    parser.add_argument("--metric", default="top1", help="what --select compares (default: top1)")
    parser.add_argument("--soup", default="uniform", choices=SOUPS, help="how several fine-tuned models are averaged")
    parser.add_argument("--results", default="results.jsonl", metavar="FILE", help="grows by one row an alpha")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    preprocess_argument(parser)
    root_argument(parser)


def wise(args: argparse.Namespace) -> int:
    """``featcache wise ZERO_SHOT FINE_TUNED... --alpha A... --out DIR [--select DATASET:SPLIT]``."""
    fisher = (args.fisher[0], args.fisher[1]) if args.fisher else None
    if args.select:
        return _sweep(args, fisher)
    if args.on or args.heads or args.best_only or args.soup != "uniform" or args.preprocess:
        raise FeatcacheError("--on, --heads, --best-only, --preprocess, --soup greedy judge models: give --select too")
    folders = merge(
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
    """The selection split, which is no reported one, by itself; then the splits of --on, the first the reference."""
    selection = f"{_choice(found)['name']}/{_choice(found)['split']}"
    reported = [name for name in datasets_of([found.best]) if name != selection]
    tables = [table_text(found.rows, [selection])]
    if reported:
        rows = [row for row in found.rows if f"{reported[0]}:top1" in row] or [found.best]  # --best-only: that one
        tables.append(table_text(rows, reported, reference=reported[0]))
    return [f"{table}\n" for table in tables]


def _text(found: Sweep, args: argparse.Namespace) -> str:
    lines = [*_tables(found), f"best on {args.select}: alpha = {found.alpha:g} ({choice_text(_choice(found))})"]
    if len(args.fine_tuned) > 1:
        lines.append(f"{args.soup} soup of {', '.join(Path(args.fine_tuned[k]).as_posix() for k in found.ingredients)}")
    way = f" --preprocess {args.preprocess}" if args.preprocess else ""
    lines += [f"{found.folder}  (featcache encode DATA --model local-dir:{found.folder}{way})", f"{found.head}"]
    lines.append(f"{len(found.rows) + 1} row(s) appended to {args.results}")
    return "\n".join(lines)
