"""The command ``featcache evaluate``: heads on stores."""

from __future__ import annotations

import argparse
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
    against_argument,
    against_lines,
    compared,
    group_argument,
    load_heads,
    metric_argument,
    names_argument,
    open_images,
    report_argument,
    results_argument,
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

SHOWN_CLASSES = 40
"""Number of classes in the printed table of a multi-label head; the results file has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache evaluate``."""
    parser.add_argument("heads", metavar="HEAD", nargs="+", help=HEAD_HELP)
    parser.add_argument("--on", metavar="STORE", nargs="+", required=True, help="image stores to evaluate them on")
    parser.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        help="with two heads: also their interpolations, from 0 (the first head) to 1 (the second)",
    )
    parser.add_argument("--select", metavar="STORE", help="choose the best alpha on this split, and add that head")
    metric_argument(parser)
    parser.set_defaults(metric=None)
    parser.add_argument("-o", "--output", metavar="FILE", help="save the head that --select chose")
    names_argument(parser, "the stores'")
    class_arguments(parser)
    group_argument(parser)
    seen_arguments(parser)
    parser.add_argument("--reference", metavar="DATA", help="the in-distribution data set (default: the first)")
    parser.add_argument(
        "--intervals",
        nargs="?",
        type=int,
        const=DRAWS,
        metavar="DRAWS",
        help="add 95%% bootstrap intervals of top1 and NLL, or of mAP and F1",
    )
    parser.add_argument(
        "--log-line",
        action="store_true",
        help="also print a line per head as in Lipsum-FT's log: NAME/acc 8.246e-01, ...",
    )
    parser.add_argument("--per-sample", metavar="FILE", help="NLL and rank, or logits, by sample: .npz or .parquet")
    parser.add_argument("--confusion", metavar="FILE", help="counts of (label, predicted class): .npz or .parquet")
    parser.add_argument("--macro-f1", action="store_true", help="also report the mean F1 of the classes that have rows")
    results_argument(parser)
    report_argument(parser)
    against_argument(parser)
    parser.add_argument(
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
        if any(head.multilabel for head in heads):
            _refuse_options(heads[0].name, args)
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
        remarks = [
            *_shifts(judgement.rows, stores, args),
            *map(describe_choice, chosen),
            *_seen(heads, stores, judgement),
        ]
        shown = chosen[0] if chosen else best_head(heads, judgement.rows)
        evaluated = list(judgement.stores.values())
        background = _background(args, shown, evaluated, time.perf_counter() - began) if args.report else None
        _report(args, judgement, len(heads) + len(path), remarks, stores, background)
    return 0


def _refuse_options(name: str, args: argparse.Namespace) -> None:
    """Raise a HeadError for options that need one label per row."""
    named = ("confusion", "macro_f1", "log_line", "calibrate")
    if given := [f"--{option.replace('_', '-')}" for option in named if getattr(args, option)]:
        raise HeadError(f"{', '.join(given)}: not for multi-label heads, such as {name}; leave it out")


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
    if args.alphas is None:
        if args.select:
            raise HeadError("--select goes with --alphas: there is nothing to choose from; give --alphas 0 0.1 ... 1")
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
    shown: int,
    remarks: Sequence[str],
    stores: Sequence[FeatureTable],
    background: Background | None,
) -> None:
    """Write the files, and print the first `shown` rows."""
    from heads import add_intervals, append_rows
    from heads.evaluation.evaluate import store_labels
    from heads.report import table_text, write_report
    from heads.report.results import write_confusion, write_samples
    from heads.report.rows import label_of, log_line, main_metrics
    from heads.report.web import provenance_facts, with_facts

    rows = add_intervals(judgement, draws=args.intervals) if args.intervals else judgement.rows
    published = compared(rows, args)
    append_rows(args.results, rows)
    table = table_text(rows[:shown], metrics=main_metrics(rows), width=table_width())
    lines = [table, *_intervals(rows), *_worst(rows), *_by_class(rows), *remarks]
    if args.log_line:
        titles = [f"{label_of(row)}: " if len(rows) > 1 else "" for row in rows]
        lines += ["", *(title + log_line(row) for title, row in zip(titles, rows, strict=True)), ""]
    lines += against_lines(rows, published, args)
    lines.append(f"{counted(len(rows), 'row')} appended to {args.results}")
    if args.per_sample:
        ids = dict(zip(store_labels(stores, args.names), (store.ids for store in stores), strict=True))
        lines.append(f"samples: {write_samples(judgement, args.per_sample, ids)}")
    if args.confusion:
        lines.append(f"confusion counts: {write_confusion(judgement, args.confusion)}")
    if background is not None:
        told = with_facts(replace(background, published=published), Heads=provenance_facts(rows))
        title = f"Evaluation on {', '.join(store_labels(stores, args.names))}"
        page, *_ = write_report(
            rows, args.report, reference=args.reference, metrics=main_metrics(rows), title=title, background=told
        )
        lines.append(f"report: {page}, and tables beside it")
    show(with_published(rows, published, args), "\n".join(lines), args.json)


def best_head(heads: Sequence[LogitHead], rows: Sequence[Row]) -> LogitHead:
    """The most accurate of the given heads on the first store, whose details the page shows."""
    from heads.report.rows import datasets_of, main_metrics, value_of

    metric = main_metrics(rows)[0]
    first = datasets_of(rows, metric)[0]
    values = [value_of(row, first, metric) or 0.0 for row in rows[: len(heads)]]
    return heads[values.index(max(values))]


def _background(
    args: argparse.Namespace, head: LogitHead, stores: Sequence[FeatureTable], seconds: float
) -> Background:
    """Further content of the page."""
    from heads.evaluation.evaluate import store_labels
    from heads.report.details import head_details, store_facts
    from heads.report.web import Background

    names = store_labels(stores, args.names)
    known = args.names or [store.name for store in stores]
    subset = class_subset(args, head.classnames, known, head.name)
    selection = args.calibrate or args.select
    after = _calibrated(head, selection, args) if selection else None
    details = [] if head.multilabel else head_details(head, stores, names, class_subset=subset, calibrated=after)
    rows = sum(len(store) for store in stores)
    cost = {
        "evaluation": f"{format_seconds(seconds)} for {rows:,} rows, stores opened and verified",
        "command": shlex.join(["featcache", *sys.argv[1:]]),
    }
    return Background(details=details, facts={"Cost": cost, "Stores": store_facts(stores, names)})


def _calibrated(head: LogitHead, selection: str, args: argparse.Namespace) -> LogitHead | None:
    """The head with a temperature fitted on a split; None if it was fitted there, or the split has other classes."""
    from heads import calibrate

    try:
        return calibrate(head, open_images(selection, args))
    except FeatcacheError:
        if args.calibrate:
            raise
        return None  # the split of --select may be usable only for choosing alpha


def _intervals(rows: Sequence[Row]) -> list[str]:
    """One line per head and store with intervals."""
    from heads.report.rows import label_of

    lines = []
    for row in rows:
        for key in row:
            if key.endswith(":top1_interval"):
                store = key.removesuffix(":top1_interval")
                top1 = " to ".join(f"{100 * end:.1f}" for end in row[key])
                nll = " to ".join(f"{end:.3f}" for end in row[f"{store}:nll_interval"])
                lines.append(f"95 % interval of {label_of(row)} on {store}: top1 {top1} %, nll {nll}")
            elif key.endswith(":map_macro_interval"):
                store = key.removesuffix(":map_macro_interval")
                told = [
                    f"{shown} " + " to ".join(f"{100 * end:.1f}" for end in row[f"{store}:{metric}_interval"]) + " %"
                    for metric, shown in (("map_macro", "mAP"), ("f1_macro", "macro F1"), ("f1_micro", "micro F1"))
                ]
                lines.append(f"95 % interval of {label_of(row)} on {store}: {', '.join(told)}")
    return lines


def _worst(rows: Sequence[Row]) -> list[str]:
    """The worst domain and groups of each head, and metrics without a column in the table."""
    from heads.report.rows import label_of

    lines = []
    for row in rows:
        domain = row.get("shifted_worst_domain")
        if domain is not None and row["shifted_worst_top1"] < row["shifted_mean_top1"]:
            lines.append(f"worst domain of {label_of(row)}: {domain}, {100 * row['shifted_worst_top1']:.1f} %")
        for key in row:
            if key.endswith(":worst_group"):
                worst = 100 * row[f"{key}_top1" if f"{key}_top1" in row else f"{key}_map_macro"]
                lines.append(f"worst group of {label_of(row)} on {key.partition(':')[0]}: {row[key]}, {worst:.1f} %")
            store, _, metric = key.partition(":")
            if metric in ALSO_SHOWN:
                lines.append(f"{ALSO_SHOWN[metric]} of {label_of(row)} on {store}: {100 * row[key]:.1f} %")
    return list(dict.fromkeys(lines))  # the chosen interpolation is one of its path


def _by_class(rows: Sequence[Row]) -> list[str]:
    """For multi-label heads, a table by class for each head and store, and the classes without a positive."""
    from heads.report.rows import label_of
    from heads.report.tables import aligned_lines

    lines = []
    for row in rows:
        for store in (key.removesuffix(":class_ap") for key in row if key.endswith(":class_ap")):
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


def _shifts(rows: Sequence[Row], stores: Sequence[FeatureTable], args: argparse.Namespace) -> list[str]:
    """Lines that name the reference, the shifted data sets, and those left out of means."""
    from heads.evaluation.evaluate import store_labels

    labels = store_labels(stores, args.names)
    if len(labels) < 2:
        return []
    first = args.reference or labels[0]
    shifted = ", ".join(label for label in labels if label != first)
    lines = [
        f"reference: {first}{'' if args.reference else ' (the first of --on; --reference names another)'}; "
        f"shifted: {shifted}"
    ]
    lines += [
        f"note: the means of {row['head']} leave out {', '.join(left)}, whose rows it was fitted on"
        for row in rows
        if (left := row.get("shifted_left_out"))
    ]
    return list(dict.fromkeys(lines))


def _seen(heads: Sequence[LogitHead], stores: Sequence[FeatureTable], judgement: Judgement) -> list[str]:
    """Lines on excluded rows, on training rows that were evaluated, and on splits that were compared by name only."""
    from heads.evaluation.seen import fitted_on, names_only

    lines = [
        f"{counted(count, 'row')} that a head was fitted or chosen on left out of {label}"
        for label in judgement.stores
        if (count := judgement.rows[0].get(f"{label}:n_excluded"))
    ]
    for head in heads:
        for store, label in zip(stores, judgement.stores, strict=True):
            where = f"{store.name}/{store.split}"
            if fitted_on(head, store) and f"{label}:n_excluded" not in judgement.rows[0]:
                lines.append(f"note: {head.name} was fitted on {where}; its figures there are those of training rows")
        if unknown := list(dict.fromkeys(name for store in stores for name in names_only(head, store))):
            lines.append(
                f"note: {head.name} has no hashes of the rows of {', '.join(unknown)}: only names were compared"
            )
    return lines
