"""The verb ``featcache wise``: weight-space interpolation (WiSE-FT), and the choice of alpha on a selection split."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import (
    device_argument,
    preprocess_argument,
    pretrained_argument,
    root_argument,
    show,
    table_width,
    update_labels_argument,
)
from featcache.errors import FeatcacheError
from featcache.progress import counted
from heads.cli.arguments import (
    against_lines,
    compared,
    metric_argument,
    names_argument,
    output_arguments,
    seen_arguments,
)
from heads.cli.classes import class_arguments, class_subset

if TYPE_CHECKING:
    from ft.merging.sweep import ChosenSweep, Sweep
    from heads.evaluation.metrics import Row
    from heads.report.against import Comparison
    from heads.report.details import Detail

FISHER_FLOOR = 1e-8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache wise``."""
    parser.add_argument(
        "zero_shot",
        metavar="ZERO_SHOT",
        help="the zero-shot model: a model folder, `tiny`, RUN/start (the initial model of a run), or an open_clip "
        "architecture with --pretrained",
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
        help="interpolation coefficients: 0 is zero-shot, 1 is fine-tuned (default: 0.5)",
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
        help="weight each parameter by the diagonal Fisher information of both models (from `featcache fisher`)",
    )
    parser.add_argument(
        "--fisher-floor",
        type=float,
        default=FISHER_FLOOR,
        metavar="F",
        help="lower bound on Fisher information (default: 1e-8)",
    )
    pretrained_argument(parser, "ZERO_SHOT, if it is an architecture")
    parser.add_argument("--overwrite", action="store_true", help="replace existing folders")
    _evaluation_arguments(parser)


def _evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for encoding and evaluating merged models, and for keeping the best."""
    parser.add_argument(
        "--select", metavar="DATASET:SPLIT", help="evaluate every merged model on this split and keep the best"
    )
    parser.add_argument(
        "--on",
        nargs="+",
        default=[],
        metavar="DATASET:SPLIT",
        help="evaluate every merged model on these splits, the in-distribution one first",
    )
    names_argument(parser, "the data sets', for ImageNet and its shifts those of WiSE-FT's results")
    class_arguments(parser)
    seen_arguments(parser)
    update_labels_argument(parser)
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
    output_arguments(parser, per="alpha")
    device_argument(parser)
    preprocess_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache wise ZERO_SHOT FINE_TUNED... --alpha A... --out DIR [--select DATASET:SPLIT]``."""
    from ft.merging.wise import wise

    fisher = (args.fisher[0], args.fisher[1]) if args.fisher else None
    if not args.select and (args.best_only or args.soup != "uniform"):
        raise FeatcacheError("--best-only and --soup greedy need a selection split; give --select too")
    if not args.on and (args.names or args.class_subset or args.projection or args.report):
        raise FeatcacheError("--name, --class-subset, --projection and --report need --on; give it too")
    if args.select or args.on or args.heads:
        return _sweep(args, fisher)
    if args.preprocess:
        raise FeatcacheError("--preprocess applies to evaluations; give --on or --select too")
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
    from featcache.datasets.sources.published.imagenet import RESULTS_NAMES
    from ft.merging.sweep import WiseOptions, best_in, sweep, sweep_unchosen
    from ft.training.loop import open_split
    from heads import append_rows
    from heads.evaluation.evaluate import store_labels

    on, select = [open_split(spec) for spec in args.on], open_split(args.select) if args.select else None
    names = store_labels(on, args.names)
    if not args.names:
        names = [RESULTS_NAMES.get(name, name) for name in names]
    options = WiseOptions(
        pretrained=args.pretrained,
        fisher=fisher,
        floor=args.fisher_floor,
        overwrite=args.overwrite,
        on=on,
        names=names,
        class_subset=class_subset(args, (select or on[0]).index.classnames, names) if on else None,
        heads=args.heads,
        templates=args.templates,
        metric=args.metric,
        soup=args.soup,
        best_only=args.best_only,
        seen=args.seen,
        update_labels=args.update_labels,
        root=args.root,
        device=args.device,
        preprocess=args.preprocess,
    )
    models = args.zero_shot, args.fine_tuned, args.alpha, args.out
    chosen = sweep(*models, select, options) if select else None
    found = chosen or sweep_unchosen(*models, options)
    rows = [row for row in found.rows if row] + ([chosen.best] if chosen else [])
    append_rows(args.results, rows)
    published = compared(rows, args)
    lines = [*_text(found, chosen, names, args), *against_lines(rows, published, args)]
    if rows:
        details = best_in(found, on, select, options) if on else []
        lines.append(f"report: {_write_page(found, chosen, names, details, published, args)}")
        lines.append(f"{counted(len(rows), 'row')} appended to {args.results}")
    record = {name: value for name, value in vars(found).items() if name != "selection"}
    show(record, "\n".join(lines), args.json)
    return 0


def _write_page(
    found: Sweep,
    chosen: ChosenSweep | None,
    names: Sequence[str],
    details: Sequence[Detail],
    published: Sequence[Comparison],
    args: argparse.Namespace,
) -> Path:
    """Write the page of the sweep beside its models; with ``--report``, the whole report there."""
    from heads.report import write_report
    from heads.report.details import provenance_facts
    from heads.report.formats import Shown
    from heads.report.page import PAGE
    from heads.report.web import Background, write_page

    reported = _reported(found, names) if names else found.rows
    datasets = list(names) or ([chosen.selection] if chosen else None)
    models = {"zero-shot": str(args.zero_shot), "fine-tuned": ", ".join(args.fine_tuned), "folder": str(args.out)}
    notes = [f"α = {chosen.alpha:g} was chosen on {chosen.selection}."] if chosen else []
    facts = {"Models": models, "Heads": provenance_facts(reported)}
    background = Background(notes, details, published, facts=facts)
    title = f"Weight-space interpolation of {args.zero_shot} and {', '.join(args.fine_tuned)}"
    if args.report:
        page, *_ = write_report(reported, args.report, datasets=datasets, title=title, background=background)
        return page
    return write_page(reported, Path(args.out).expanduser() / PAGE, Shown(datasets), title=title, background=background)


def _reported(found: Sweep, names: Sequence[str]) -> list[Row]:
    """Rows with metrics on the reported splits: all alphas, or with --best-only the best."""
    rows = [row for row in found.rows if f"{names[0]}:top1" in row]
    return rows or [vars(found)["best"]]


def _text(found: Sweep, chosen: ChosenSweep | None, names: Sequence[str], args: argparse.Namespace) -> list[str]:
    """A table of the selection split, which is not reported; then the splits of --on, with the first as reference."""
    from heads.report import table_text
    from heads.report.remarks import excluded_lines
    from heads.report.rows import choice_text

    width = table_width()
    lines = [f"{table_text(found.rows, [chosen.selection], width=width)}\n"] if chosen else []
    if names:
        lines.append(f"{table_text(_reported(found, names), names, reference=names[0], width=width)}\n")
    if chosen:
        choice = choice_text(chosen.best["chosen_on"][-1])
        lines.append(f"best on {args.select}: alpha = {chosen.alpha:g} ({choice})")
    lines += excluded_lines(found.rows[0]) if found.rows else []
    if len(args.fine_tuned) > 1:
        lines.append(f"{args.soup} soup of {', '.join(Path(args.fine_tuned[k]).as_posix() for k in found.ingredients)}")
    way = f" --preprocess {args.preprocess}" if args.preprocess else ""
    pairs = [(chosen.folder, chosen.head)] if chosen else zip(found.folders, found.heads, strict=True)
    for folder, head in pairs:
        lines += [f"{folder}  (featcache encode DATA --model local-dir:{folder}{way})", str(head)]
    return lines
