"""The verb ``featcache finetune``; its flags are the fields of `FinetuneOptions`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from featcache.cli.arguments import (
    data_arguments,
    device_argument,
    dry_run_argument,
    flag,
    pretrained_argument,
    progress_of,
    quiet_argument,
    root_argument,
    show,
    table_width,
)
from featcache.errors import TrainingError
from featcache.parameters import descriptions_of
from featcache.progress import Silent, counted
from ft.recipes import RECIPES, load_recipe
from ft.regularizers import REGULARIZERS
from ft.training.options import FinetuneOptions, declared_options, parse_regularizer
from heads.cli.arguments import results_argument

if TYPE_CHECKING:
    from ft.training.loop import FinetuneResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache finetune``."""
    data_arguments(parser, "DATASET")
    add = parser.add_argument
    add("--split", default="train", help="split to train on (default: train)")
    add("--val", metavar="DATASET:SPLIT", help="split that chooses the best checkpoint; not one that you report")
    add("--model", default="tiny", help="tiny (the default), an open_clip architecture, local-dir:FOLDER, hf-hub:NAME")
    pretrained_argument(parser)
    add("-o", "--out", required=True, metavar="DIR", help="folder of the run; an unfinished run resumes")
    add("--overwrite", action="store_true", help="start again, replacing an existing run")
    dry_run_argument(parser, "trained")
    add("--recipe", metavar="NAME", help=f"take options from {', '.join(RECIPES)} or a file; flags override them")
    add(
        "--regularizer",
        action="append",
        metavar="NAME=LAMBDA[,PARAMETER=VALUE...]",
        help=f"add a term to the loss, with its weight (repeatable): {', '.join(REGULARIZERS)}",
    )
    add(
        "--eval-names",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="CLASS=NAME",
        help="contrastive: other class names in the prompts of the evaluated classifier, such as 0=zero",
    )
    results_argument(parser, per="model")
    device_argument(parser)
    quiet_argument(parser)
    root_argument(parser)
    texts = descriptions_of(FinetuneOptions)
    for name, option in declared_options().items():
        if name not in ("regularizers", "eval_names"):
            settings: dict[str, Any] = {"nargs": 2} if name == "betas" else {}
            if option.kind is bool:
                settings["action"] = argparse.BooleanOptionalAction
            # Without a default: the recipe's value, or that of the option, then applies.
            flag(parser, option, texts[name], default=argparse.SUPPRESS, **settings)


def run(args: argparse.Namespace) -> int:
    """``featcache finetune DATASET --out DIR``; under torchrun, the first process reports."""
    from featcache.processes import is_first
    from ft.training.loop import finetune, open_split
    from ft.training.page import write_run_page
    from heads import append_rows

    options = _options(args)
    if vars(args).get("eval_start") and not args.val:
        raise TrainingError("--eval-start evaluates on --val; name a split")
    if args.dry_run:
        return _dry_run(args, options)
    result = finetune(
        args.data,
        args.model,
        args.pretrained,
        out=args.out,
        options=options,
        split=args.split,
        val=args.val,
        labels=args.labels,
        root=args.root,
        device=args.device,
        overwrite=args.overwrite,
        progress=progress_of(args) if is_first() else Silent(),
    )
    if is_first():
        append_rows(args.results, [row | {"run": str(args.out)} for row in result.before_after])
        page = write_run_page(args.out, open_split(args.val, args.labels) if args.val else None)
        text = f"{_text(result, options.preprocess)}\n{page}  (losses, evaluations and confusions, for the browser)"
        show(vars(result) | {"report": page}, text, args.json)
    return 0


def _dry_run(args: argparse.Namespace, options: FinetuneOptions) -> int:
    """Print what a run would do."""
    from featcache.datasets import open_dataset
    from featcache.progress import format_bytes, format_seconds
    from ft.training.loop import open_split
    from ft.training.plan import plan_finetuning

    dataset = open_dataset(args.data, args.split, labels=args.labels)
    val = open_split(args.val, args.labels) if args.val else None
    plan = plan_finetuning(dataset, val, args.model, args.pretrained, options, args.device, args.root)
    text = (
        f"{dataset.name}/{dataset.split}: {plan.images:,} images, {plan.updates:,} updates of {options.batch_size}; "
        f"would read {plan.images_to_read:,} images, train {plan.trained_parameters:,} parameters and write "
        f"{format_bytes(plan.bytes_to_write)} to {args.out} in about {format_seconds(plan.seconds)}, "
        "without regularisers and evaluations"
    )
    show(vars(plan), text, args.json)
    return 0


def _options(args: argparse.Namespace) -> FinetuneOptions:
    """Options of the recipe, overridden by flags."""
    values: dict[str, Any] = load_recipe(args.recipe) if args.recipe else {}
    known = {option.name for option in dataclasses.fields(FinetuneOptions)}
    given = {name: value for name, value in vars(args).items() if name in known}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given and other not in given:
            values.pop(other, None)
    if "eval_names" in given:
        given["eval_names"] = dict(map(_pair, given["eval_names"]))
    if args.regularizer:
        given["regularizers"] = dict(parse_regularizer(text) for text in args.regularizer)
    return FinetuneOptions.from_dict(values | given)


def _pair(text: str) -> tuple[str, str]:
    name, equals, other = text.partition("=")
    if not equals or not other:
        raise TrainingError(f"--eval-names {text}: expected CLASS=NAME, as in 0=zero")
    return name, other


def _text(result: FinetuneResult, preprocess: str | None) -> str:
    from heads.report import table_text

    way = f" --preprocess {preprocess}" if preprocess else ""
    lines = [counted(result.steps, "update")]
    for row in result.judged:
        mark = "  <- best" if row["step"] == result.best_step else ""
        lines.append(f"  update {row['step']:>7,}: accuracy {100 * row['accuracy']:.1f} %, nll {row['nll']:.3f}{mark}")
    if result.before_after:
        lines += ["", table_text(result.before_after, width=table_width()), ""]
    lines += [
        f"{result.best}  (featcache encode DATA --model local-dir:{result.best}{way})",
        f"{result.best_head}  (featcache evaluate {result.best_head} --on STORE)",
    ]
    return "\n".join(lines)
