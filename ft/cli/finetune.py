"""The verb finetune: its flags are the fields of `FinetuneOptions`, so that a new option is one line there."""

import argparse
import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints

from featcache.cli.arguments import root_argument, show
from featcache.datasets import DATASETS
from featcache.processes import is_first
from featcache.progress import Printed, Silent
from ft.recipes import RECIPES, load_recipe
from ft.regularizers import REGULARIZERS
from ft.training.loop import FinetuneResult
from ft.training.loop import finetune as run_finetune
from ft.training.options import CHOICES, FinetuneOptions, parse_regularizer

HELP = {
    "objective": "what is minimised",
    "head": "zero_shot, zeros, ridge, logistic (fitted from the store of the training split), or a fitted head's file",
    "head_scale": "logit scale inside the head's weights (WiSE-FT) or beside them (Lipsum-FT)",
    "head_bias": "train a bias of the head",
    "templates": "template set or file, of zero-shot heads and captions",
    "prompts": "JSON file {class: [sentences]} instead of templates",
    "false_negatives": "contrastive: count equal captions of other pairs as wrong, as the original does",
    "train": "parts to train: image, text, head, logit_scale",
    "epochs": "passes over the data (default: 10)",
    "steps": "updates, instead of epochs",
    "batch_size": "images of an update, over all processes and micro-batches",
    "accumulate": "micro-batches of an update",
    "warmup": "updates of the warm-up",
    "clip": "largest norm of the gradient",
    "layer_decay": "factor on the learning rate for each layer further from the output",
    "freeze_layers": "first layers of the image tower, and its embedding, that stay as they are",
    "batch_norm": "batch normalisation uses and updates batch statistics (ResNets)",
    "precision": "of the towers' products",
    "compile": "torch.compile of the image tower",
    "checkpoint_activations": "recompute activations in the backward pass to save memory",
    "average": "average of the weights that is judged and saved",
    "swa_start": "share of the run after which the mean begins",
    "preprocess": "how pictures are prepared where they are not augmented: central-crop, or as the model says",
    "augment": "views of the training images (none: as encode prepares them)",
    "shuffle": "draw a new order every epoch",
    "prior": "frozen features: computed, or kept in a store for the next run",
    "select": "what makes a checkpoint the best on --val",
    "eval_every": "updates between judging on --val (default: an epoch)",
    "save_every": "updates between checkpoints (default: an epoch)",
    "log_every": "updates between lines of log.jsonl",
    "workers": "threads that read and crop (default: one a core)",
    "tensorboard": "log for TensorBoard too (extra `finetune`)",
}


def finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache finetune``."""
    parser.add_argument("data", metavar="DATASET", help=f"SOURCE:ARGUMENT, with one of {', '.join(sorted(DATASETS))}")
    parser.add_argument("--split", default="train", help="split to train on (default: train)")
    parser.add_argument("--labels", default="names", choices=("names", "int"), help="what labels of a list file are")
    parser.add_argument("--val", metavar="DATASET:SPLIT", help="selection split, which should be no reported one")
    parser.add_argument(
        "--model", default="tiny", help="tiny, an open_clip architecture, local-dir:FOLDER, hf-hub:NAME"
    )
    parser.add_argument("--pretrained", help="open_clip tag, checkpoint file, or `random`")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder of the run; one begun is resumed")
    parser.add_argument("--overwrite", action="store_true", help="start anew where a run was begun")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"options from a recipe, {', '.join(RECIPES)} or a file; flags win over it"
    )
    parser.add_argument(
        "--regularizer",
        action="append",
        metavar="NAME=LAMBDA[,PARAMETER=VALUE...]",
        help=f"a term of the loss and its weight; one of {', '.join(REGULARIZERS)}; may be given again",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    root_argument(parser)
    kinds = get_type_hints(FinetuneOptions)
    for option in dataclasses.fields(FinetuneOptions):
        if option.name != "regularizers":
            _add_flag(parser, option.name, kinds[option.name], option.default)


def _add_flag(parser: argparse.ArgumentParser, name: str, kind: Any, default: Any) -> None:
    """The flag of an option; one that is not given is left to the recipe, then to the option's default."""
    flag, text = f"--{name.replace('_', '-')}", HELP.get(name, name.replace("_", " "))
    shown = "" if default in (None, (), "") or "default:" in text else f" (default: {default})"
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%") + shown}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    if isinstance(kind, types.UnionType):  # int | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        kind, settings["nargs"] = get_args(kind)[0], 2 if name == "betas" else "+"
    parser.add_argument(flag, type=kind, choices=CHOICES.get(name), **settings)


def finetune(args: argparse.Namespace) -> int:
    """``featcache finetune DATASET --out DIR``; of the processes of torchrun the first one tells."""
    options = _options(args)
    result = run_finetune(
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
        progress=Printed() if is_first() and not args.quiet else Silent(),
    )
    if is_first():
        show(_record(result), _text(result, options.preprocess), args.json)
    return 0


def _options(args: argparse.Namespace) -> FinetuneOptions:
    """The recipe's options under the flags that were given."""
    values: dict[str, Any] = load_recipe(args.recipe) if args.recipe else {}
    known = {option.name for option in dataclasses.fields(FinetuneOptions)}
    given = {name: value for name, value in vars(args).items() if name in known}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given and other not in given:
            values.pop(other, None)
    if args.regularizer:
        given["regularizers"] = dict(parse_regularizer(text) for text in args.regularizer)
    return FinetuneOptions.from_dict(values | given)


def _record(result: FinetuneResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "last": str(result.last),
        "best": str(result.best),
        "start_head": str(result.start_head),
        "last_head": str(result.last_head),
        "best_head": str(result.best_head),
        "best_step": result.best_step,
        "judged": result.judged,
    }


def _text(result: FinetuneResult, preprocess: str | None) -> str:
    way = f" --preprocess {preprocess}" if preprocess else ""
    lines = [f"{result.steps:,} updates"]
    for row in result.judged:
        mark = "  <- best" if row["step"] == result.best_step else ""
        lines.append(f"  update {row['step']:>7,}: accuracy {row['accuracy']:.4f}, nll {row['nll']:.4f}{mark}")
    lines += [
        f"{result.best}  (featcache encode DATA --model local-dir:{result.best}{way})",
        f"{result.best_head}  (featcache evaluate {result.best_head} --on STORE)",
    ]
    return "\n".join(lines)
