"""The verb ``featcache moments``: second moments of the inputs of a model's linear layers, for RegMean."""

import argparse
from pathlib import Path

import numpy as np

from featcache.cli.arguments import model_arguments, preprocess_argument, progress_of, show, typed
from featcache.errors import TrainingError
from featcache.parameters import Count, Whole
from featcache.store.places.targets import checked_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache moments``."""
    add = parser.add_argument
    add("data", metavar="DATASET:SPLIT", help="images, usually some of the model's training split")
    add("-o", "--output", metavar="FILE", help="output file (default: beside the model, RUN/best_moments.safetensors)")
    add("--limit", type=typed(Count), metavar="N", help="use only N images, drawn with --seed")
    add("--seed", type=typed(Whole), default=0, metavar="S", help="seed of the drawn images (default: 0)")
    add("--templates", metavar="T", help="also cover a trained text tower, with these templates and class names")
    model_arguments(parser)
    preprocess_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache moments DATASET:SPLIT --model local-dir:RUN/best``."""
    from featcache.datasets.holdout import Subset
    from featcache.prompts import fill, load_templates
    from ft.checkpoints.parents import folder_of, load_open_clip
    from ft.merging.moments import layer_moments, moments_path, write_moments
    from ft.training.loop import open_split

    folder = folder_of(args.model)
    if folder is None:
        raise TrainingError(f"--model {args.model}: expected a model folder, such as local-dir:RUN/best")
    out = Path(args.output) if args.output else moments_path(folder)
    checked_target(out)
    dataset = open_split(args.data)
    if args.limit and args.limit < len(dataset.index):
        drawn = np.random.default_rng(args.seed).permutation(len(dataset.index))[: args.limit]
        dataset = Subset(dataset, np.sort(drawn), dataset.split)
    encoder = load_open_clip(args.model, args.pretrained, device=args.device, preprocess=args.preprocess)
    prompts = fill(load_templates(args.templates), dataset.index.classnames) if args.templates else []
    values = layer_moments(encoder, dataset, prompts, progress=progress_of(args))
    path = write_moments(values, folder, out)
    n = len(dataset.index)
    show(
        {"file": path, "images": n, "layers": len(values)},
        f"{path}: inputs of {len(values)} layers over {n:,} images (featcache merge regmean RUN/best RUN2/best ...)",
        args.json,
    )
    return 0
