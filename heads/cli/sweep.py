"""The verb ``featcache sweep``: heads x settings x shots x seeds x stores, resumable."""

import argparse
import json
import sys
from typing import Any

from featcache.cli.arguments import show
from featcache.errors import HeadError
from heads.cli.arguments import device_argument, open_reference, store_arguments
from heads.estimators.fit import parameters_of, takes_prior
from heads.sweeps import PAPERS, HeadGrid, Splits, SweepPlan, picks, read_plan, run_sweep, summarise, sweep_table

RESULTS = "results.jsonl"

_ALPHAS = "interpolate with zero-shot; the best is chosen on --select, or by folds of --train"
_PRIOR = "a parameter of all fits, in JSON; ridge.prior='\"texts\"' shrinks towards the zero-shot head of --texts"


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache sweep``."""
    parser.add_argument("heads", metavar="HEAD", nargs="*", help="heads to fit; or give --file")
    parser.add_argument("--file", metavar="TOML", help="the whole sweep from one file, in place of the flags below")
    parser.add_argument(
        "--data",
        metavar="NAME",
        nargs="+",
        default=[],
        help="sweep each of these data sets: {} in the stores below stands for NAME, --train is {}/train and --on "
        "{}/test where they are left out",
    )
    parser.add_argument("--train", metavar="STORE", help="where to fit")
    parser.add_argument("--select", metavar="STORE", help="where hyper-parameters, alphas and picks are chosen")
    parser.add_argument("--on", metavar="STORE", nargs="+", default=[], help="where to report")
    parser.add_argument("--texts", metavar="STORE", nargs="+", default=[], help="text stores")
    parser.add_argument("--models", metavar="MODEL", nargs="+", help="sweep NAME/SPLIT@MODEL for each of these")
    parser.add_argument("--shots", metavar="K", nargs="+", default=["all"], help="rows a class, or all (default: all)")
    parser.add_argument(
        "--seeds", metavar="S", nargs="+", type=int, default=[0], help="draws of the shots (default: 0)"
    )
    parser.add_argument(
        "--select-shots",
        metavar="K",
        type=int,
        help="rows a class of --select for few shots, at most the shots (CoOp: 4)",
    )
    parser.add_argument(
        "--allow-fewer", action="store_true", help="take what there is of classes with fewer rows than the shots"
    )
    parser.add_argument("--alphas", metavar="A", nargs="+", type=float, default=[], help=_ALPHAS)
    parser.add_argument("--metric", default="top1", help="what is compared on --select (default: top1)")
    parser.add_argument("--set", action="append", default=[], metavar="HEAD.NAME=VALUE", help=_PRIOR)
    parser.add_argument(
        "--grid", action="append", default=[], metavar="HEAD.NAME=LIST", help="values to try, a fit each, in JSON"
    )
    parser.add_argument(
        "--reproduce-paper",
        choices=sorted(PAPERS),
        help="choose on the first reported split, as the paper does: a leak, which every row then names",
    )
    parser.add_argument("--results", default=RESULTS, metavar="FILE", help=f"one row a fit (default: {RESULTS})")
    parser.add_argument("--quiet", action="store_true", help="no line a fit on stderr")
    device_argument(parser)
    store_arguments(parser)


def sweep(args: argparse.Namespace) -> int:
    """``featcache sweep HEAD... --train STORE --on STORE...``."""
    plan = _plan(args)
    if plan.paper is not None:
        print(f"leak reintroduced on purpose: {PAPERS[plan.paper]}", file=sys.stderr)
    opened: dict[str, Any] = {}

    def open_once(reference: str) -> Any:
        if reference not in opened:
            opened[reference] = open_reference(reference, args)
        return opened[reference]

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    rows = run_sweep(plan, open_once, args.results, say)
    chosen = picks(summarise(rows), plan.metric)
    show(rows, f"{sweep_table(chosen)}\n\n{len(rows)} row(s) in {args.results}; shown: {_shown(plan)}", args.json)
    return 0


def _shown(plan: SweepPlan) -> str:
    if plan.paper is not None:
        return f"picked by {plan.metric} on the first reported split ({PAPERS[plan.paper]})"
    if any(splits.select for splits in plan.data):
        return f"picked by {plan.metric} on the selection split"
    return "every setting (no selection split)"


def _plan(args: argparse.Namespace) -> SweepPlan:
    if args.file:
        if args.heads or args.train or args.on or args.data:
            raise HeadError("--file holds the whole sweep; leave heads and stores out of the command")
        return read_plan(args.file)
    settings = {name: (_settings(args.set, name), _settings(args.grid, name)) for name in args.heads}
    for setting in (*args.set, *args.grid):
        if setting.partition(".")[0] not in settings:
            raise HeadError(f"{setting}: expected HEAD.NAME=VALUE with one of the heads {', '.join(args.heads)}")
    return SweepPlan(
        tuple(HeadGrid(name, *settings[name]) for name in args.heads),
        _data(args),
        tuple(args.models or (None,)),
        tuple(_shots(shots) for shots in args.shots),
        tuple(args.seeds),
        tuple(args.alphas),
        args.metric,
        args.reproduce_paper,
        args.select_shots,
        args.allow_fewer,
    )


def _data(args: argparse.Namespace) -> tuple[Splits, ...]:
    """The stores as they are named, or those of every data set of ``--data``."""
    if not args.data:
        return (Splits(args.train, tuple(args.on), args.select, tuple(args.texts)),)
    train, on = args.train or "{}/train", args.on or ["{}/test"]
    if not any("{}" in reference for reference in (train, *on)):
        raise HeadError(f"--data {' '.join(args.data)}: --train and --on hold no {{}}, which stands for NAME")

    def splits(name: str) -> Splits:
        select = None if args.select is None else args.select.replace("{}", name)
        reported, texts = (tuple(reference.replace("{}", name) for reference in found) for found in (on, args.texts))
        return Splits(train.replace("{}", name), reported, select, texts)

    return tuple(splits(name) for name in args.data)


def _settings(settings: list[str], head: str) -> dict[str, Any]:
    found = {}
    for setting in settings:
        name, _, rest = setting.partition(".")
        parameter, equals, value = rest.partition("=")
        if name != head:
            continue
        known = [*parameters_of(head), *(["prior"] if takes_prior(head) else [])]
        if not equals or parameter not in known:
            raise HeadError(f"{setting}: expected {head}.NAME=VALUE with one of {', '.join(known)}")
        try:
            found[parameter] = json.loads(value)
        except json.JSONDecodeError:
            raise HeadError(f"{setting}: {value!r} is no JSON value; quote texts twice: '\"text\"'") from None
    return found


def _shots(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit():
        raise HeadError(f"--shots {text}: expected a whole number from 1, or all")
    return int(text)
