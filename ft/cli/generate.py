"""The verb ``featcache generate``: training images for class names, from a diffusion model."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import (
    device_argument,
    flag,
    precision_argument,
    progress_of,
    quiet_argument,
    shard_argument,
    show,
)
from featcache.cli.text import classnames_of
from featcache.errors import DatasetError, PromptError
from featcache.parameters import descriptions_of, parameters_of
from featcache.progress import format_seconds
from featcache.prompts.class_lists import IMAGENET, class_list_names, load_class_list
from featcache.prompts.text_files import read_class_file
from ft.generation.draw import GenerateOptions

if TYPE_CHECKING:
    from ft.generation import GenerateResult, Style

MODEL = "stabilityai/stable-diffusion-2-1-base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache generate``."""
    add = parser.add_argument
    add(
        "classes",
        metavar="CLASSES",
        nargs="?",
        help="source of the class names: a data set (imagefolder:DIR), `imagenet` (folders are WordNet ids), another "
        "class list, or a file with a name, or folder, tab and name, on each line (default: those of the style)",
    )
    add("-o", "--out", required=True, metavar="DIR", help="folder of the images: DIR/SPLIT/CLASS/*.png")
    add("--split", default="train", help="split to generate: train (the default) or val")
    add(
        "--classes-split",
        default="train",
        metavar="S",
        help="split of the data set with the class names (default: train)",
    )
    add("--style", default="imagenet", metavar="NAME", help="prompt style (default: imagenet)")
    add("--styles", metavar="FILE", help="prompt-style file, such as RegFT's prompt_styles.json")
    add(
        "--model",
        default=MODEL,
        help=f"folder saved by diffusers, or a name on the Hugging Face hub (default: {MODEL})",
    )
    add("--revision", help="revision of a model on the hub")
    texts = descriptions_of(GenerateOptions)
    for name, option in parameters_of(GenerateOptions).items():
        flag(parser, option, texts[name])
    shard_argument(parser, "batches")
    device_argument(parser)
    precision_argument(parser, "precision of the model (default: fp16 on a GPU, fp32 on a CPU)", default=None)
    quiet_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache generate CLASSES --out DIR``."""
    from featcache.encoding.options import Share
    from ft.generation import generate, load_style
    from ft.generation.diffusion import Painter

    options = GenerateOptions(**{field.name: vars(args)[field.name] for field in fields(GenerateOptions)})
    share = Share.parse(args.shard) if args.shard else None
    style = load_style(args.style, args.styles)
    classes = _classes(args, style)
    device = args.device or _device()
    painter = Painter(args.model, args.revision, device, args.precision or ("fp16" if "cuda" in device else "fp32"))
    settings = {"split": args.split, "options": options, "share": share, "progress": progress_of(args)}
    result = generate(classes, style.templates, painter, args.out, **settings)
    show(vars(result), _describe(result, args), args.json)
    return 0


def _classes(args: argparse.Namespace, style: Style) -> list[tuple[str, str]]:
    """Folders and names of the classes."""
    if args.classes is None:
        if not style.classes:
            raise PromptError(
                f"style {args.style!r} names no classes; expected CLASSES (imagefolder:DIR, imagenet or a file)"
            )
        return list(style.classes)
    if args.classes in class_list_names():
        listed = load_class_list(args.classes)
        return list(zip(listed.keys, listed.names, strict=True))
    if (path := Path(args.classes)).is_file():
        try:
            return read_class_file(path)
        except DatasetError as error:
            raise PromptError(str(error)) from error
    return [(name, name) for name in classnames_of(args.classes, args.classes_split)[0]]


def _device() -> str:
    """The CUDA device of this process's local rank, or the CPU."""
    import torch

    from featcache.processes import number_from

    count = torch.cuda.device_count()
    return f"cuda:{number_from('LOCAL_RANK', 0) % count}" if count else "cpu"


def _describe(result: GenerateResult, args: argparse.Namespace) -> str:
    what = f"{result.folder}: {result.there:,} of {result.total:,} images of {result.classes:,} classes"
    how = f"{result.made:,} drawn in {format_seconds(result.seconds)}" if result.made else "none drawn now"
    source = "imagenet" if args.classes == IMAGENET else "imagefolder"
    then = f"\n  featcache encode {source}:{args.out} --split {args.split}" if result.there == result.total else ""
    return f"{what}, {how}{then}"
