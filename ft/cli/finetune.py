"""The verb ``featcache finetune``; its flags are the fields of `FinetuneOptions`."""

from __future__ import annotations

import argparse
import dataclasses
import types
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from featcache.cli.arguments import (
    data_arguments,
    device_argument,
    dry_run_argument,
    pretrained_argument,
    progress_of,
    quiet_argument,
    root_argument,
    show,
    table_width,
)
from featcache.errors import TrainingError
from featcache.progress import Silent, counted
from ft.recipes import RECIPES, load_recipe
from ft.regularizers import REGULARIZERS
from ft.training.options import FinetuneOptions, declared_options, parse_regularizer
from heads.cli.arguments import results_argument

if TYPE_CHECKING:
    from ft.training.loop import FinetuneResult

HELP = {
    "objective": "loss to minimise",
    "objective_weight": "weight of the objective in the loss (RegFT's --lambda-ce)",
    "head": "zero_shot, zeros, ridge, logistic (fitted from the store of the training split), or a fitted head's file",
    "head_scale": "logit scale inside the head's weights (WiSE-FT) or beside them (Lipsum-FT)",
    "head_bias": "give the head a trainable bias",
    "templates": "template set, file, or one template with {}, for zero-shot heads and captions",
    "prompts": "JSON file {class: [sentences]} instead of templates",
    "false_negatives": "contrastive: count equal captions of other pairs as negatives, as the original does",
    "eval_templates": "contrastive: templates of the classifier that is evaluated and saved (default: --templates)",
    "train": "parts to train: image, text, head, logit_scale",
    "shots": "train on this many samples of each class, drawn with --seed",
    "epochs": "passes over the data (default: 10)",
    "steps": "updates, instead of epochs",
    "batch_size": "images per update, over all processes and micro-batches",
    "drop_last": "leave out the last, smaller batch of an epoch",
    "accumulate": "micro-batches per update",
    "lr": "learning rate",
    "schedule": "learning-rate schedule",
    "ema_decay": "decay of the moving average",
    "warmup": "warm-up updates",
    "clip": "maximum norm of the gradient",
    "layer_decay": "multiply the learning rate by this for each layer further from the output",
    "freeze_layers": "freeze this many layers at the input of the image tower, counting the embedding",
    "lora_rank": "rank of LoRA updates, trained instead of the towers; checkpoints hold the merged weights",
    "lora_alpha": "scale of the update, divided by the rank (default: the rank)",
    "lora_tower": "towers with an update",
    "lora_targets": "matrices with an update: query, key, value and out (of attention), mlp",
    "batch_norm": "batch normalisation uses and updates batch statistics (ResNets)",
    "precision": "precision of the towers' matrix products",
    "compile": "use torch.compile on the image tower",
    "checkpoint_activations": "recompute activations in the backward pass to save memory",
    "average": "average of the weights, evaluated and saved instead of them",
    "swa_start": "fraction of the run after which averaging begins",
    "preprocess": "preprocessing without augmentation: central-crop, or (default) the model's own",
    "augment": "augmentation of the training images (none: as encode prepares them)",
    "shuffle": "draw a new order every epoch",
    "prior": "frozen features: computed online, or kept in a store for later runs",
    "select": "metric on --val that chooses the best checkpoint",
    "eval_start": "also evaluate the initial model on --val: prints before and after, and adds rows to --results",
    "keep_every": "epochs between checkpoints to keep, as OUT/checkpoint_1 and so on (default: keep none)",
    "eval_every": "updates between evaluations on --val (default: one epoch)",
    "save_every": "updates between checkpoints (default: one epoch)",
    "log_every": "updates between lines of log.jsonl",
    "workers": "threads that read, decode and crop (default: one per core)",
    "tensorboard": "also log for TensorBoard (extra `finetune`)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache finetune``."""
    data_arguments(parser, "DATASET")
    parser.add_argument("--split", default="train", help="split to train on (default: train)")
    parser.add_argument(
        "--val", metavar="DATASET:SPLIT", help="split that chooses the best checkpoint; not one that you report"
    )
    parser.add_argument(
        "--model", default="tiny", help="tiny (the default), an open_clip architecture, local-dir:FOLDER, hf-hub:NAME"
    )
    pretrained_argument(parser)
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="folder of the run; an unfinished run resumes"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing an existing run")
    dry_run_argument(parser, "trained")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"take options from {', '.join(RECIPES)} or a file; flags override them"
    )
    parser.add_argument(
        "--regularizer",
        action="append",
        metavar="NAME=LAMBDA[,PARAMETER=VALUE...]",
        help=f"add a term to the loss, with its weight (repeatable): {', '.join(REGULARIZERS)}",
    )
    parser.add_argument(
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
    kinds = get_type_hints(FinetuneOptions)
    for option in dataclasses.fields(FinetuneOptions):
        if option.name not in ("regularizers", "eval_names"):
            _add_flag(parser, option.name, kinds[option.name], option.default)


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: Any, default: object) -> None:
    """Add the flag of an option, without a default: the recipe's value or the option's default then applies."""
    flag, text = f"--{name.replace('_', '-')}", HELP.get(name, name.replace("_", " "))
    shown = "" if default in (None, (), "") or "default:" in text else f" (default: {default})"
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%") + shown}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    if get_origin(kind) in (Union, types.UnionType):  # int | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        kind, settings["nargs"] = get_args(kind)[0], 2 if name == "betas" else "+"
    parser.add_argument(flag, type=kind, choices=declared_options()[name].choices, **settings)


def run(args: argparse.Namespace) -> int:
    """``featcache finetune DATASET --out DIR``; under torchrun, the first process reports."""
    from featcache.processes import is_first
    from ft.training.loop import finetune, open_split
    from ft.training.page import write_run_page
    from heads import append_rows

    options = _options(args)
    if getattr(args, "eval_start", False) and not args.val:
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
        lines.append(f"  update {row['step']:>7,}: accuracy {row['accuracy']:.4f}, nll {row['nll']:.4f}{mark}")
    if result.before_after:
        lines += ["", table_text(result.before_after, width=table_width()), ""]
    lines += [
        f"{result.best}  (featcache encode DATA --model local-dir:{result.best}{way})",
        f"{result.best_head}  (featcache evaluate {result.best_head} --on STORE)",
    ]
    return "\n".join(lines)
