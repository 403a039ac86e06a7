"""The command ``featcache report``: tables, plots and a page from results files, including WiSE-FT's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcache.cli.arguments import show, table_width
from featcache.errors import HeadError
from heads.cli.arguments import FORMATS, against_argument, against_lines, compared, with_published

if TYPE_CHECKING:
    from heads.evaluation.metrics import Row
    from heads.report.charts import Curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache report``."""
    add = parser.add_argument
    add(
        "results",
        metavar="RESULTS",
        nargs="+",
        help="results.jsonl of evaluate, sweep or wise, or WiSE-FT's --results-db",
    )
    add("-o", "--output", metavar="FOLDER", help="write report.html, report.md, report.csv, report.tex and plots there")
    add("--format", default="text", choices=FORMATS, help="what is printed (default: text)")
    add("--on", metavar="DATA", nargs="+", help="data sets to show, in order (default: all)")
    add("--reference", metavar="DATA", help="the in-distribution data set (default: the first)")
    add(
        "--metric",
        metavar="M",
        nargs="+",
        help="metrics, a table each (default: top1 nll; for multi-label heads map_macro auroc_macro f1_macro f1_micro)",
    )
    add("--heads", metavar="NAME", nargs="+", help="heads to show; the beginning of a name is enough")
    add("--title", help="heading of the page (default: the names of the files)")
    against_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache report RESULTS...``."""
    from heads.report import formats, write_report
    from heads.report.details import provenance_facts
    from heads.report.read import by_split, is_epoch, read_rows
    from heads.report.rows import main_metrics
    from heads.report.web import Background

    found = by_split(read_rows(args.results))
    epochs = [row for row in found if is_epoch(row)]
    rows, curves = _rows([row for row in found if not is_epoch(row)] or epochs)
    rows = _chosen(rows, args)
    metrics = args.metric or main_metrics(rows)
    shown = formats.Shown(args.on, args.reference, metrics, table_width())
    published = compared(rows, args)
    text = formats.FORMATS[args.format](rows, shown)
    lines = [text.rstrip("\n"), *(against_lines(rows, published, args) if args.format == "text" else [])]
    if args.output:
        facts = {"Heads": provenance_facts(rows), "Files": dict.fromkeys(args.results, "read")}
        background = Background(published=published, curves=[*curves, *_epoch_curves(epochs)], facts=facts)
        first, shifted = shown.places(rows, metrics[0])
        title = args.title or f"Results in {', '.join(args.results)}"
        page, *_ = write_report(
            rows,
            args.output,
            datasets=[first, *shifted],
            reference=first,
            metrics=metrics,
            title=title,
            background=background,
        )
        lines += [f"report: {page}"] if args.format == "text" else []
    show(with_published(rows, published, args), "\n".join(lines), args.json)
    return 0


def _rows(found: Sequence[Row]) -> tuple[list[Row], list[Curve]]:
    """One row per head, or for sweeps per setting (the mean over seeds), and the curves of sweeps."""
    from heads.report.read import latest
    from heads.report.rows import main_metrics
    from heads.sweeps.summary import summarise, summary_rows, sweep_curves

    swept = [row for row in found if isinstance(row.get("sweep"), str)]
    if not swept:
        return latest(found), []
    once = {(row["sweep"], row.get("head")): row for row in swept}  # the last row of each job and head
    summaries = summarise(list(once.values()))
    curves = sweep_curves(summaries, main_metrics(swept)[0])
    return [*latest(row for row in found if "sweep" not in row), *summary_rows(summaries)], curves


def _chosen(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """The rows of the chosen heads that have a figure on one of the chosen data sets."""
    from heads.report.rows import label_of, name_of

    if args.on:
        keys = tuple(f"{name}:" for name in (*args.on, args.reference) if name)
        rows = [row for row in rows if any(key.startswith(keys) for key in row)] or rows  # if none: an error says so
    if not args.heads:
        return list(rows)
    kept = [row for row in rows if any(label_of(row).startswith(name) for name in args.heads)]
    if not kept:
        known = ", ".join(dict.fromkeys(map(name_of, rows)))
        raise HeadError(f"--heads {' '.join(args.heads)}: no such head; the files hold {known}")
    return kept


def _epoch_curves(epochs: Sequence[Row]) -> list[Curve]:
    """Accuracy by epoch, from files that WiSE-FT wrote while training."""
    from heads.report.charts import Curve
    from heads.report.rows import datasets_of, value_of

    lines = {}
    for name in datasets_of(epochs, "top1"):
        points = [(int(row["current_epoch"]), value_of(row, name, "top1")) for row in epochs]
        lines[name] = sorted((float(epoch), 100 * value) for epoch, value in points if value is not None)
    lines = {name: line for name, line in lines.items() if line}
    return [Curve("Accuracy by epoch", "epoch", "Accuracy (%)", lines)] if lines else []
