"""The verb ``featcache convert``: checkpoints from and for other libraries."""

import argparse
from pathlib import Path

from featcache.cli.arguments import pretrained_argument, show
from featcache.prompts import load_classnames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache convert``."""
    add = parser.add_argument
    add(
        "source",
        metavar="FILE",
        help="safetensors, torch state dict, OpenAI archive, model folder, .ckpt of Lipsum-FT, or a pickled module",
    )
    add("out", metavar="OUT", help="a .safetensors or .pt file, or a folder")
    add(
        "--base",
        metavar="MODEL",
        help="model that gives configuration, activation, tokenizer and missing towers: a model folder, tiny, "
        "RUN/start (the initial model of a run), or an open_clip architecture",
    )
    pretrained_argument(parser, "--base, if it is an architecture")
    add(
        "--to",
        default="open_clip",
        choices=("open_clip", "huggingface", "regft", "lipsum"),
        help="layout (default: open_clip); huggingface: a folder for CLIPModel; regft: {clip, head} in one file, for "
        "adapters such as CaFo; lipsum: a best_acc.ckpt, or a folder of logit_scale.ckpt and both projections",
    )
    add("--head", metavar="FILE", help="head for --to regft or lipsum (default: X_head.safetensors beside a folder X)")
    add(
        "--classes",
        metavar="FILE",
        help="class names of the checkpoint's head, one per line, or a named list",
    )
    add(
        "--trust",
        action="store_true",
        help="unpickle a file that cannot be read otherwise (wise-ft's): this RUNS ANY CODE IN THE FILE, in a separate "
        "process but with your rights; only for files from people you trust",
    )
    add("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """``featcache convert FILE OUT [--base MODEL [--pretrained TAG]] [--to huggingface] [--trust]``."""
    from featcache.transfer.flax import is_flax
    from ft.checkpoints.convert import convert

    done = convert(
        args.source,
        args.out,
        base=args.base,
        pretrained=args.pretrained,
        layout=args.to,
        trust=args.trust,
        classnames=load_classnames(args.classes) if args.classes else None,
        head=args.head,
        overwrite=args.overwrite,
    )
    taken = f", {done.from_base} of them from {args.base}" if done.from_base else ""
    crop = " on features of --preprocess central-crop" if is_flax(Path(args.source)) else ""
    head = "" if done.head is None else f"\n{done.head}  (its head, for featcache evaluate{crop})"
    text = f"{done.out}  (a head, for featcache evaluate)" if done.head == done.out else None
    if args.to == "lipsum" and done.out.is_dir():
        text = f"{done.out}: {', '.join(sorted(file.name for file in done.out.iterdir()))}{head}"
    show(done._asdict(), text or f"{done.out}: {done.tensors} tensors{taken}{head}", args.json)
    return 0
