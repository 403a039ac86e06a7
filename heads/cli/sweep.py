"""The command ``featcache sweep``: heads x settings x shots x seeds x stores, resumable."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from featcache.cli.arguments import dry_run_argument, show, table_width
from featcache.errors import FeatcacheError, HeadError
from featcache.progress import counted
from heads.cli.arguments import (
    against_lines,
    compared,
    json_setting,
    open_reference,
    output_arguments,
    rows_device_argument,
    seen_arguments,
    store_arguments,
    with_published,
)
from heads.estimators.catalogue import HEADS
from heads.sweeps.plan import PAPERS, HeadGrid, Splits, SweepPlan, read_plan

if TYPE_CHECKING:
    from pathlib import Path

    from heads.report.against import Comparison
    from heads.report.details import Detail
    from heads.sweeps.run import Open
    from heads.sweeps.summary import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache sweep``."""
    add = parser.add_argument
    heads = add("heads", metavar="HEAD", nargs="*", help="heads to fit; or give --file")
    vars(heads)["completer"] = HEADS
    add("--file", metavar="TOML", help="the whole sweep from one file, in place of the flags below")
    add(
        "--data",
        metavar="NAME",
        nargs="+",
        default=[],
        help="sweep each of these data sets: {} in the stores below is replaced by NAME; --train defaults to {}/train "
        "and --on to {}/test",
    )
    add("--train", metavar="STORE", help="training rows")
    add("--select", metavar="STORE", help="where hyper-parameters, alphas and settings are chosen")
    add("--on", metavar="STORE", nargs="+", default=[], help="test stores")
    add("--texts", metavar="STORE", nargs="+", default=[], help="text stores")
    add("--models", metavar="MODEL", nargs="+", help="sweep NAME/SPLIT@MODEL for each of these")
    add("--shots", metavar="K", nargs="+", default=["all"], help="rows per class, or `all` (default)")
    add("--seeds", metavar="S", nargs="+", type=int, default=[0], help="seeds for drawing the shots (default: 0)")
    add(
        "--select-shots",
        metavar="K",
        type=int,
        help="rows per class of --select in few-shot fits, never more than the shots (CoOp: 4)",
    )
    add("--allow-fewer", action="store_true", help="use all rows of classes that have fewer than the shots")
    add(
        "--alphas",
        metavar="A",
        nargs="+",
        type=float,
        default=[],
        help="interpolate with zero-shot; the best is chosen on --select, or by folds of --train",
    )
    add("--metric", help="what --select compares (default: top1; map_macro for multi-label heads)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="HEAD.NAME=VALUE",
        help="a parameter of all fits, in JSON; ridge.prior='\"texts\"' shrinks towards the zero-shot head of --texts",
    )
    add("--grid", action="append", default=[], metavar="HEAD.NAME=LIST", help="values to try, one fit each, in JSON")
    add(
        "--reproduce-paper",
        choices=sorted(PAPERS),
        help="follow the paper and choose on the first test store: a leak, which is noted in every row",
    )
    seen_arguments(parser)
    dry_run_argument(parser, "fitted")
    output_arguments(parser, per="fit")
    add("--quiet", action="store_true", help="do not print a line per fit on stderr")
    rows_device_argument(parser)
    store_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache sweep HEAD... --train STORE --on STORE...``."""
    from heads.report.results import results_file
    from heads.report.rows import main_metrics
    from heads.sweeps.run import run_sweep
    from heads.sweeps.summary import picks, summarise, summary_rows, sweep_table

    plan = _plan(args)
    results_file(args.results)
    if plan.paper is not None:
        print(f"leak reintroduced on purpose: {PAPERS[plan.paper]}", file=sys.stderr)
    open_once = cache(lambda reference: open_reference(reference, args))
    if args.dry_run:
        return _dry_run(plan, open_once, args)
    say = (lambda line: None) if args.quiet else partial(print, file=sys.stderr, flush=True)
    rows = run_sweep(plan, open_once, args.results, say)
    summaries = summarise(rows)
    chosen = picks(summaries, plan.picked_by)
    published = compared(summary_rows(chosen), args)
    lines = [
        sweep_table(chosen, main_metrics(rows)[:2], width=table_width()),
        "",
        f"{counted(len(rows), 'row')} in {args.results}; shown: {_shown(plan)}",
    ]
    lines += against_lines(rows, published, args)
    if args.report:
        details = _details(chosen, plan, open_once)
        lines.append(f"report: {_write_report(summaries, published, details, plan, args)}")
    show(with_published(rows, compared(rows, args), args), "\n".join(lines), args.json)
    return 0


def _dry_run(plan: SweepPlan, open_store: Open, args: argparse.Namespace) -> int:
    """Describe what a run would do, without writing anything."""
    from featcache.progress import format_bytes, format_seconds
    from heads.sweeps.forecast import forecast_sweep

    found = forecast_sweep(plan, open_store, args.results)
    text = f"{counted(found.fits, 'fit')}, {found.done:,} done before"
    if found.to_fit:
        heads = ", ".join(f"{count:,} of {name}" for name, count in found.to_fit.items())
        took = "an unknown time" if found.seconds is None else f"about {format_seconds(found.seconds)}"
        text += (
            f"; would read {format_bytes(found.bytes_to_read)}, fit {heads}, and write "
            f"{counted(found.rows_to_write, 'row')}, {format_bytes(found.bytes_to_write)}, to {args.results} in {took}"
        )
    show(vars(found), text, args.json)
    return 0


def _details(chosen: Sequence[Summary], plan: SweepPlan, open_store: Open) -> Sequence[Detail]:
    """Per-class results and calibration of the best chosen setting, which is fitted again."""
    from heads import calibrate
    from heads.evaluation.evaluate import store_labels
    from heads.report.details import head_details
    from heads.sweeps.run import refitted
    from heads.sweeps.summary import best_of, summary_rows

    best = best_of(chosen, plan.picked_by)
    found = None if plan.multilabel else refitted(plan, open_store, best)
    if found is None:
        return ()
    (head, stores), after = found, None
    if stores.select is not None and plan.paper is None:
        with contextlib.suppress(FeatcacheError):  # of a head that was fitted there
            after = calibrate(head, stores.select)
    (row,) = summary_rows([best])
    details = head_details(head, stores.on, store_labels(stores.on), calibrated=after)
    return [replace(detail, head=row["head"]) for detail in details]


def _write_report(
    summaries: Sequence[Summary],
    published: Sequence[Comparison],
    details: Sequence[Detail],
    plan: SweepPlan,
    args: argparse.Namespace,
) -> Path:
    """The report of every setting, the means over seeds."""
    from heads.report import write_report
    from heads.report.details import provenance_facts
    from heads.report.rows import main_metrics
    from heads.report.web import Background
    from heads.sweeps.summary import summary_rows, sweep_curves

    rows = summary_rows(summaries)
    seeds = ", ".join(map(str, plan.seeds))
    notes = [f"Means over the seeds {seeds}; ± and bands are standard deviations."] if plan.seeds[1:] else []
    facts = {"Settings": provenance_facts(rows), "Sweep": {"rows": args.results, "shown": _shown(plan)}}
    curves = sweep_curves(summaries, main_metrics(rows)[0])
    background = Background(notes, details, published, curves, facts)
    title = f"Sweep of {', '.join(dict.fromkeys(head.name for head in plan.heads))}"
    page, *_ = write_report(rows, args.report, metrics=main_metrics(rows)[:2], title=title, background=background)
    return page


def _shown(plan: SweepPlan) -> str:
    if plan.paper is not None:
        return f"picked by {plan.picked_by} on the first reported split ({PAPERS[plan.paper]})"
    if any(splits.select for splits in plan.data):
        return f"picked by {plan.picked_by} on the selection split"
    return "every setting (no selection split)"


def _plan(args: argparse.Namespace) -> SweepPlan:
    if args.file:
        if args.heads or args.train or args.on or args.data:
            raise HeadError("--file holds the whole sweep; leave heads and stores out of the command")
        return read_plan(args.file)
    for setting in (*args.set, *args.grid):
        if setting.partition(".")[0] not in args.heads:
            raise HeadError(f"{setting}: expected HEAD.NAME=VALUE with one of the heads {', '.join(args.heads)}")
    return SweepPlan(
        tuple(HeadGrid(name, _settings(args.set, name), _settings(args.grid, name)) for name in args.heads),
        _data(args),
        models=tuple(args.models or (None,)),
        shots=tuple(map(_shots, args.shots)),
        seeds=tuple(args.seeds),
        alphas=tuple(args.alphas),
        metric=args.metric,
        paper=args.reproduce_paper,
        select_shots=args.select_shots,
        allow_fewer=args.allow_fewer,
        seen=args.seen,
    )


def _data(args: argparse.Namespace) -> tuple[Splits, ...]:
    """The stores as given, or those of every data set of ``--data``."""
    if not args.data:
        return (Splits(args.train, tuple(args.on), args.select, tuple(args.texts)),)
    train, on = args.train or "{}/train", args.on or ["{}/test"]
    if not any("{}" in reference for reference in (train, *on)):
        raise HeadError(f"--data {' '.join(args.data)}: --train and --on hold no {{}}, which stands for NAME")

    found = []
    for name in args.data:
        select = None if args.select is None else args.select.replace("{}", name)
        reported, texts = (tuple(text.replace("{}", name) for text in given) for given in (on, args.texts))
        found.append(Splits(train.replace("{}", name), reported, select, texts))
    return tuple(found)


def _settings(settings: list[str], head: str) -> dict[str, Any]:
    """Names and values of the ``HEAD.NAME=VALUE`` of one head."""
    own = [text for text in settings if text.partition(".")[0] == head]
    return dict(json_setting(head, text.partition(".")[2], dotted=True) for text in own)


def _shots(text: str) -> int | None:
    if text != "all" and not text.isdigit():
        raise HeadError(f"--shots {text}: expected a whole number from 1, or all")
    return None if text == "all" else int(text)
