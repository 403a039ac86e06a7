"""The verb ``featcache evaluate``: heads judged on stores."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.commands import show
from featcache.errors import HeadError
from featcache.prompts import load_classnames, load_subset, subset_names
from featcache.store import ImageStore
from heads import LogitHead, append_rows, choose, interpolate, load, save, subset_by_name
from heads import evaluate as evaluate_heads
from heads.cli_fit import open_reference, store_arguments
from heads.report import table_text, write_report

RESULTS = "results.jsonl"


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache evaluate``."""
    parser.add_argument("heads", metavar="HEAD", nargs="+", help="files written by `featcache fit`")
    parser.add_argument("--on", metavar="STORE", nargs="+", required=True, help="image stores to judge them on")
    parser.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        metavar="A",
        help="with two heads: also their interpolations, 0 being the first head and 1 the second",
    )
    parser.add_argument(
        "--select", metavar="STORE", help="choose the best alpha on this split and report that head too"
    )
    parser.add_argument("--metric", default="top1", help="what --select compares (default: top1)")
    parser.add_argument("-o", "--output", metavar="FILE", help="save the head that --select chose")
    parser.add_argument(
        "--class-subset",
        metavar="NAME",
        help=f"keep only these classes' logits: one of {', '.join(subset_names())}, or a file of class names",
    )
    parser.add_argument(
        "--results", default=RESULTS, metavar="FILE", help=f"grows by one row a head (default: {RESULTS})"
    )
    parser.add_argument("--report", metavar="FOLDER", help="write tables and plots there")
    store_arguments(parser)


def evaluate(args: argparse.Namespace) -> int:
    """``featcache evaluate HEAD... --on STORE...``."""
    heads = _load_all(args.heads)
    stores = [_open_images(reference, args) for reference in args.on]
    path, chosen = _interpolations(heads, args)
    subset = _subset(args.class_subset, heads[0]) if args.class_subset else None
    rows = evaluate_heads([*heads, *path, *chosen], stores, class_subset=subset)
    append_rows(args.results, rows)
    lines = [table_text(rows[: len(heads) + len(path)]), *map(describe_choice, chosen), *_seen(heads, stores)]
    lines.append(f"{len(rows)} row(s) appended to {args.results}")
    if args.report:
        lines.append("report: " + ", ".join(str(path) for path in write_report(rows, args.report)))
    show(rows, "\n".join(lines), args.json)
    return 0


def _open_images(reference: str, args: argparse.Namespace) -> ImageStore:
    store = open_reference(reference, args)
    if not isinstance(store, ImageStore):
        raise HeadError(f"{reference}: a store of texts; expected a store of images, made by `featcache encode`")
    return store


def _load_all(paths: Sequence[str]) -> list[LogitHead]:
    """The heads, those of one kind told apart by their files' names."""
    heads = [load(path) for path in paths]
    names = [head.name for head in heads]
    return [
        replace(head, name=f"{head.name}:{Path(path).stem}") if names.count(head.name) > 1 else head  # type: ignore[type-var]
        for head, path in zip(heads, paths, strict=True)
    ]


def describe_choice(head: LogitHead) -> str:
    """One line on which alpha was chosen, where, and how well it did there."""
    choice = head.provenance["chosen_on"][-1]
    return (
        f"chosen on {choice['name']}/{choice['split']}: alpha = {head.alpha:g} "
        f"({choice['metric']} {choice['value']:.4g} there, best of {choice['candidates']})"
    )


def _seen(heads: Sequence[LogitHead], stores: Sequence[ImageStore]) -> list[str]:
    """A warning for every head that is judged on rows it was fitted on."""
    return [
        f"note: {head.name} was fitted on {store.name}/{store.split}; its figures there are those of training rows"
        for head in heads
        for store in stores
        if any(entry.get("dataset_key") == store.dataset_key for entry in head.provenance.get("fitted_on", []))
    ]


def _interpolations(heads: Sequence[LogitHead], args: argparse.Namespace) -> tuple[list[LogitHead], list[LogitHead]]:
    """The interpolations asked for, and the one that the selection split chose."""
    if args.alphas is None:
        if args.select or args.output:
            raise HeadError(
                "--select and -o go with --alphas: there is nothing to choose from; give --alphas 0 0.1 ... 1"
            )
        return [], []
    if len(heads) != 2:
        raise HeadError(f"--alphas interpolates two heads, got {len(heads)}; name two")
    path: list[LogitHead] = [*interpolate(heads[0], heads[1], args.alphas)]
    if not args.select:
        return path, []
    chosen = choose(path, _open_images(args.select, args), metric=args.metric)
    if args.output:
        save(chosen, args.output)
    return path, [chosen]


def _subset(name: str, head: LogitHead) -> list[int]:
    if name in subset_names():
        return [int(index) for index in load_subset(name)]
    if not Path(name).is_file():
        raise HeadError(f"--class-subset {name}: expected one of {', '.join(subset_names())}, or a file of class names")
    return [int(index) for index in subset_by_name(head.classnames, load_classnames(name))]
