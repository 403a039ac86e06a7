"""The command ``featcache evaluate``: heads on stores."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from featcache.cli.arguments import show, table_width
from featcache.errors import FeatcacheError, HeadError
from featcache.progress import counted, format_seconds
from featcache.store.places.targets import checked_target
from heads.cli.arguments import (
    HEAD_HELP,
    against_lines,
    compared,
    group_argument,
    load_heads,
    metric_argument,
    names_argument,
    open_images,
    output_arguments,
    rows_device_argument,
    seen_arguments,
    store_arguments,
    with_published,
)
from heads.cli.classes import class_arguments, class_subset
from heads.evaluation.bootstrap import DRAWS

if TYPE_CHECKING:
    from featcache.store.protocol import FeatureTable
    from heads.evaluation.evaluate import Judgement
    from heads.evaluation.metrics import Row
    from heads.fitted.base import LogitHead
    from heads.report.web import Background

SINGLE_LABEL = ("confusion", "macro_f1", "log_line", "calibrate")
"""Options that need one label per row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache evaluate``."""
    add = parser.add_argument
    add("heads", metavar="HEAD", nargs="+", help=HEAD_HELP)
    add("--on", metavar="STORE", nargs="+", required=True, help="image stores to evaluate them on")
    add(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        help="with two heads: also their interpolations, from 0 (the first head) to 1 (the second)",
    )
    add("--select", metavar="STORE", help="choose the best alpha on this split, and add that head")
    metric_argument(parser)
    parser.set_defaults(metric=None)
    add("-o", "--output", metavar="FILE", help="save the head that --select chose")
    names_argument(parser, "the stores'")
    class_arguments(parser)
    group_argument(parser)
    seen_arguments(parser)
    add("--reference", metavar="DATA", help="the in-distribution data set (default: the first)")
    add(
        "--intervals",
        nargs="?",
        type=int,
        const=DRAWS,
        metavar="DRAWS",
        help="add 95%% bootstrap intervals of top1 and NLL, or of mAP and F1",
    )
    add(
        "--log-line",
        action="store_true",
        help="also print a line per head as in Lipsum-FT's log: NAME/acc 8.246e-01, ...",
    )
    add("--per-sample", metavar="FILE", help="NLL and rank, or logits, by sample: .npz or .parquet")
    add("--confusion", metavar="FILE", help="counts of (label, predicted class): .npz or .parquet")
    add("--macro-f1", action="store_true", help="also report the mean F1 of the classes that have rows")
    output_arguments(parser)
    add(
        "--calibrate",
        metavar="STORE",
        help="with --report: fit the temperature of the calibration charts on this split (default: that of --select)",
    )
    rows_device_argument(parser)
    store_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache evaluate HEAD... --on STORE...``; torchrun's processes share the rows, and rank 0 reports."""
    from featcache.processes import process_group
    from heads import judge, save
    from heads.report.remarks import choice_line, seen_lines, shift_lines
    from heads.report.results import results_file, samples_suffix

    began = time.perf_counter()
    with process_group() as (rank, size):
        results_file(args.results)
        samples_suffix(args.per_sample)
        for target in filter(None, (args.output, args.per_sample, args.confusion)):
            checked_target(target)
        heads = load_heads(args.heads, args)
        alone = [f"--{name.replace('_', '-')}" for name in SINGLE_LABEL if vars(args)[name]]
        if alone and any(head.multilabel for head in heads):
            raise HeadError(f"{', '.join(alone)}: not for multi-label heads, such as {heads[0].name}; leave it out")
        stores = [open_images(reference, args) for reference in args.on]
        names = args.names or [store.name for store in stores]
        path, chosen = _interpolations(heads, args, distributed=size > 1)
        judgement = judge(
            [*heads, *path, *chosen],
            stores,
            class_subset=class_subset(args, heads[0].classnames, names, heads[0].name),
            seen=args.seen,
            groups=args.group,
            reference=args.reference,
            names=args.names,
            per_sample=bool(args.per_sample or args.intervals),
            confusion=bool(args.confusion or args.macro_f1),
            distributed=size > 1,
        )
    if rank == 0:
        if args.output:
            save(chosen[0], args.output)
        remarks = [*shift_lines(judgement, args.reference), *map(choice_line, chosen)]
        remarks += seen_lines(heads, stores, judgement)
        shown = chosen[0] if chosen else _best_head(heads, judgement.rows)
        background = _background(args, shown, judgement, time.perf_counter() - began) if args.report else None
        _report(args, judgement, stores, len(heads) + len(path), remarks, background)
    return 0


def _interpolations(
    heads: Sequence[LogitHead], args: argparse.Namespace, distributed: bool
) -> tuple[list[LogitHead], list[LogitHead]]:
    """The requested interpolations, and the one chosen on the selection split."""
    from heads import choose, interpolate

    if args.output and not args.select:
        raise HeadError("-o saves the head that --select chose; give --select STORE and --alphas")
    if args.metric and not args.select:
        raise HeadError(
            f"--metric {args.metric}: it is what --select compares, and every metric is in the results anyway; give "
            "--select STORE and --alphas, or leave it out"
        )
    if args.select and args.alphas is None:
        raise HeadError("--select goes with --alphas: there is nothing to choose from; give --alphas 0 0.1 ... 1")
    if args.alphas is None:
        return [], []
    if len(heads) != 2:
        raise HeadError(f"--alphas interpolates two heads, got {len(heads)}; name two")
    path: list[LogitHead] = [*interpolate(heads[0], heads[1], args.alphas)]
    if not args.select:
        return path, []
    selection, metric = open_images(args.select, args), args.metric or "top1"
    return path, [choose(path, selection, metric=metric, distributed=distributed, seen=args.seen)]


def _report(
    args: argparse.Namespace,
    judgement: Judgement,
    stores: Sequence[FeatureTable],
    shown: int,
    remarks: Sequence[str],
    background: Background | None,
) -> None:
    """Write the files, and print the first `shown` rows."""
    from heads import add_intervals, append_rows
    from heads.report import table_text, write_report
    from heads.report.remarks import class_lines, interval_lines, worst_lines
    from heads.report.results import write_confusion, write_samples
    from heads.report.rows import label_of, log_line, main_metrics

    rows = add_intervals(judgement, draws=args.intervals) if args.intervals else judgement.rows
    published, metrics = compared(rows, args), main_metrics(rows)
    append_rows(args.results, rows)
    table = table_text(rows[:shown], metrics=metrics, width=table_width())
    lines = [table, *interval_lines(rows), *worst_lines(rows), *class_lines(rows), *remarks]
    if args.log_line:
        titles = [f"{label_of(row)}: " if len(rows) > 1 else "" for row in rows]
        lines += ["", *(title + log_line(row) for title, row in zip(titles, rows, strict=True)), ""]
    lines += against_lines(rows, published, args)
    lines.append(f"{counted(len(rows), 'row')} appended to {args.results}")
    if args.per_sample:
        ids = {label: store.ids for label, store in zip(judgement.stores, stores, strict=True)}
        lines.append(f"samples: {write_samples(judgement, args.per_sample, ids)}")
    if args.confusion:
        lines.append(f"confusion counts: {write_confusion(judgement, args.confusion)}")
    if background is not None:
        told = replace(background, published=published)
        title = f"Evaluation on {', '.join(judgement.stores)}"
        page, *_ = write_report(
            rows, args.report, reference=args.reference, metrics=metrics, title=title, background=told
        )
        lines.append(f"report: {page}, and tables beside it")
    show(with_published(rows, published, args), "\n".join(lines), args.json)


def _best_head(heads: Sequence[LogitHead], rows: Sequence[Row]) -> LogitHead:
    """The most accurate of the given heads on the first store."""
    from heads.report.rows import datasets_of, main_metrics, value_of

    metric = main_metrics(rows)[0]
    first = datasets_of(rows, metric)[0]
    values = [value_of(row, first, metric) or 0.0 for row in rows[: len(heads)]]
    return heads[values.index(max(values))]


def _background(args: argparse.Namespace, head: LogitHead, judgement: Judgement, seconds: float) -> Background:
    """Details of a head and provenance, for the page."""
    from heads import calibrate
    from heads.report.details import head_details, provenance_facts, store_facts
    from heads.report.web import Background

    names, stores = list(judgement.stores), list(judgement.stores.values())
    known = args.names or [store.name for store in stores]
    subset = class_subset(args, head.classnames, known, head.name)
    selection, after = args.calibrate or args.select, None
    ignored = () if args.calibrate else (FeatcacheError,)  # the split of --select need not allow calibration
    with contextlib.suppress(*ignored):
        after = calibrate(head, open_images(selection, args)) if selection else None
    details = [] if head.multilabel else head_details(head, stores, names, class_subset=subset, calibrated=after)
    rows = sum(len(store) for store in stores)
    cost = {
        "evaluation": f"{format_seconds(seconds)} for {rows:,} rows, stores opened and verified",
        "command": shlex.join(["featcache", *sys.argv[1:]]),
    }
    facts = {"Cost": cost, "Stores": store_facts(stores, names), "Heads": provenance_facts(judgement.rows)}
    return Background(details=details, facts=facts)
