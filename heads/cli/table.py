"""The command ``featcache table``: backbones x domains, with averages; missing stores are encoded."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from typing import TYPE_CHECKING

from featcache.cli.arguments import (
    decoding_arguments,
    device_argument,
    precision_argument,
    preprocess_argument,
    pretrained_argument,
    progress_of,
    quiet_argument,
    root_argument,
    show,
    table_width,
)
from featcache.encoding.options import EncodeOptions
from featcache.errors import HeadError
from featcache.progress import counted
from heads.cli.arguments import (
    FORMATS,
    against_argument,
    against_lines,
    compared,
    json_setting,
    results_argument,
    with_published,
)

if TYPE_CHECKING:
    from heads.evaluation.metrics import Row
    from heads.sweeps.backbones import BackboneTable

DIGITS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache table``."""
    add = parser.add_argument
    add("head", metavar="HEAD", help="zero_shot, or, with --train, a head that is fitted on images")
    add(
        "--data",
        metavar="DATA",
        nargs="+",
        required=True,
        help="data sets, one table each; collection:NAME:DIR has a column per domain, other sources one column",
    )
    add("--models", metavar="MODEL", nargs="+", required=True, help="models as in encode, one line each")
    pretrained_argument(parser, "every model")
    add("--split", default="all", help="split of every domain (default: all)")
    add("--templates", default="picture", help="template set, file, or one with {} (default: picture)")
    add("--train", metavar="DATA:SPLIT", help="training rows of heads that are fitted on images")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the head, its value in JSON")
    add("--metric", default="top1", help="what the cells show (default: top1)")
    add("--format", default="text", choices=FORMATS, help="format of the tables (default: text)")
    precision_argument(parser, "precision of the models' matrix products")
    against_argument(parser)
    results_argument(parser, per="model and data set")
    decoding_arguments(parser)
    preprocess_argument(parser)
    device_argument(parser)
    quiet_argument(parser)
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache table HEAD --data DATA... --models MODEL...``."""
    from featcache.encoders import check_model, load_encoder
    from heads import append_rows
    from heads.evaluation.metrics import metric_of
    from heads.report.results import results_file
    from heads.sweeps.backbones import BackbonePlan, backbone_tables

    metric_of(args.metric)
    parameters, train = dict(json_setting(args.head, text) for text in args.set), _train(args.train)
    plan = BackbonePlan(args.head, args.data, args.models, args.split, args.templates, train, parameters)
    results_file(args.results)
    for model in args.models:
        check_model(model, args.pretrained)

    place = {"device": args.device, "precision": args.precision, "preprocess": args.preprocess}

    def done(row: Row) -> None:
        append_rows(args.results, [row])

    tables = backbone_tables(
        plan,
        lambda model: load_encoder(model, args.pretrained, **place),
        root=args.root,
        options=EncodeOptions(batch_size=args.batch_size, workers=args.workers),
        progress=progress_of(args),
        done=done,
        say=lambda line: None if args.quiet else print(line, file=sys.stderr, flush=True),
    )
    rows = [row for table in tables for row in table.rows]
    published = compared(rows, args, prompts=args.templates)
    lines = [table_text(table, args.head, args.metric, args.format) for table in tables]
    if args.format == "text":
        lines += [*against_lines(rows, published, args), f"{counted(len(rows), 'row')} appended to {args.results}"]
    averaged = [
        row | {"table": table.title, "average": values[-1]}
        for table in tables
        for row, values in zip(table.rows, table.values(args.metric), strict=True)
    ]
    show(with_published(averaged, published, args), "\n".join(lines), args.json)
    return 0


def _train(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    spec, colon, split = text.rpartition(":")
    if not colon or not spec or not split:
        raise HeadError(f"--train {text}: expected DATA:SPLIT, such as collection:pacs:DIR,domain=photo:all")
    return spec, split


def table_text(table: BackboneTable, head: str, metric: str, form: str = "text") -> str:
    """One table in one of `FORMATS`; percentages with two decimals."""
    from heads.evaluation.metrics import metric_of
    from heads.report.formats import latex_table
    from heads.report.tables import in_blocks, markdown_lines

    shown = metric_of(metric)
    digits = DIGITS if shown.unit == "%" else shown.digits
    cells = [[f"{shown.factor * value:.{digits}f}" for value in line] for line in table.values(metric)]
    header = ["model", *table.columns]
    lines = [[model, *line] for model, line in zip(table.models, cells, strict=True)]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([["data", *header], *([table.title, *line] for line in lines)])
        return out.getvalue().rstrip("\n")
    if form == "markdown":
        return f"{markdown_lines(header, lines, right=1)}\n"
    if form == "latex":
        return latex_table(header, lines)
    title = f"{table.title}: {head}, {shown.title.lower()}, {shown.unit}"
    left, *columns = zip(header, *lines, strict=True)
    return f"{title}\n{in_blocks(left, columns, table_width())}\n"
