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

ALSO_SHOWN = {"macro_f1": "macro F1", "pm0": "pm-0 accuracy", "pm10": "pm-10 accuracy"}
"""Titles of metrics (fractions) that only some data sets have, or that are reported on request."""

INTERVALS = {
    "top1": {"top1": "top1 {} %", "nll": "nll {}"},
    "map_macro": {"map_macro": "mAP {} %", "f1_macro": "macro F1 {} %", "f1_micro": "micro F1 {} %"},
}
"""Forms of the intervals that are printed together, by their first metric."""

SINGLE_LABEL = ("confusion", "macro_f1", "log_line", "calibrate")
"""Options that need one label per row."""

SHOWN_CLASSES = 40
"""Number of classes in the printed table of a multi-label head; the results file has all."""


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
        remarks = [*_shifts(judgement, args), *map(describe_choice, chosen), *_seen(heads, stores, judgement)]
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
    from heads.report.results import write_confusion, write_samples
    from heads.report.rows import label_of, log_line, main_metrics

    rows = add_intervals(judgement, draws=args.intervals) if args.intervals else judgement.rows
    published, metrics = compared(rows, args), main_metrics(rows)
    append_rows(args.results, rows)
    table = table_text(rows[:shown], metrics=metrics, width=table_width())
    lines = [table, *_intervals(rows), *_worst(rows), *_by_class(rows), *remarks]
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
    ignored = () if args.calibrate else (FeatcacheError,)  # the split of --select may only do for choosing alpha
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


def _intervals(rows: Sequence[Row]) -> list[str]:
    """One line per head and store with intervals."""
    from heads.report.rows import datasets_of, interval_text, label_of

    lines = []
    for row in rows:
        for first, forms in INTERVALS.items():
            for store in datasets_of([row], f"{first}_interval"):
                texts = [form.format(interval_text(row, store, metric)) for metric, form in forms.items()]
                lines.append(f"95 % interval of {label_of(row)} on {store}: {', '.join(texts)}")
    return lines


def _worst(rows: Sequence[Row]) -> list[str]:
    """The worst domain and groups of each head, and metrics without a column in the table."""
    from heads.report.rows import label_of, main_metrics

    lines = []
    for row in rows:
        main, name = main_metrics([row])[0], label_of(row)
        worst = row.get(f"shifted_worst_{main}")
        if worst is not None and worst < row[f"shifted_mean_{main}"]:
            lines.append(f"worst domain of {name}: {row['shifted_worst_domain']}, {100 * worst:.1f} %")
        for key in row:
            store, _, metric = key.rpartition(":")
            if metric == "worst_group":
                lines.append(f"worst group of {name} on {store}: {row[key]}, {100 * row[f'{key}_{main}']:.1f} %")
            if metric in ALSO_SHOWN:
                lines.append(f"{ALSO_SHOWN[metric]} of {name} on {store}: {100 * row[key]:.1f} %")
    return list(dict.fromkeys(lines))  # the chosen interpolation is one of its path


def _by_class(rows: Sequence[Row]) -> list[str]:
    """For multi-label heads, a table by class for each head and store, and the classes without a positive."""
    from heads.report.rows import datasets_of, label_of
    from heads.report.tables import aligned_lines

    lines = []
    for row in rows:
        for store in datasets_of([row], "class_ap"):
            columns = [row[f"{store}:class_{name}"] for name in ("ap", "auroc", "f1")]
            counts = row[f"{store}:class_positives"]
            cells = [
                [name, *("–" if column[name] is None else f"{100 * column[name]:.1f}" for column in columns), f"{n:,}"]
                for name, n in list(counts.items())[:SHOWN_CLASSES]
            ]
            more = len(counts) - len(cells)
            lines += ["", f"{label_of(row)} on {store}, by class:"]
            lines += aligned_lines([["", "AP %", "AUROC %", "F1 %", "positives"], *cells], right=1)
            lines += [f"... and {more:,} more classes, in the results file"] * (more > 0)
            if left := row[f"{store}:left_out"]:
                lines.append(f"without a positive, left out of means over classes: {', '.join(left)}")
    return lines


def describe_choice(head: LogitHead) -> str:
    """One line with the chosen alpha, the split it was chosen on, and its metric there."""
    from heads.report.rows import choice_text

    choice = head.provenance.chosen_on[-1]
    return f"chosen on {choice['name']}/{choice['split']}: alpha = {head.alpha:g} ({choice_text(choice)})"


def _shifts(judgement: Judgement, args: argparse.Namespace) -> list[str]:
    """Lines that name the reference, the shifted data sets, and those left out of means."""
    if len(judgement.stores) < 2:
        return []
    first = args.reference or next(iter(judgement.stores))
    shifted = ", ".join(label for label in judgement.stores if label != first)
    how = "" if args.reference else " (the first of --on; --reference names another)"
    lines = [f"reference: {first}{how}; shifted: {shifted}"]
    lines += [
        f"note: the means of {row['head']} leave out {', '.join(left)}, whose rows it was fitted on"
        for row in judgement.rows
        if (left := row.get("shifted_left_out"))
    ]
    return list(dict.fromkeys(lines))


def _seen(heads: Sequence[LogitHead], stores: Sequence[FeatureTable], judgement: Judgement) -> list[str]:
    """Lines on excluded rows, on training rows that were evaluated, and on splits that were compared by name only."""
    from heads.evaluation.seen import fitted_on, names_only

    left_out = {label: judgement.rows[0].get(f"{label}:n_excluded") for label in judgement.stores}
    lines = [
        f"{counted(count, 'row')} that a head was fitted or chosen on left out of {label}"
        for label, count in left_out.items()
        if count
    ]
    for head in heads:
        for store, count in zip(stores, left_out.values(), strict=True):
            where = f"{store.name}/{store.split}"
            if count is None and fitted_on(head, store):
                lines.append(f"note: {head.name} was fitted on {where}; its figures there are those of training rows")
        if unknown := dict.fromkeys(name for store in stores for name in names_only(head, store)):
            names = ", ".join(unknown)
            lines.append(f"note: {head.name} has no hashes of the rows of {names}: only names were compared")
    return lines
