"""The verb ``featcache fisher``: diagonal Fisher information of a model."""

import argparse

import numpy as np

from featcache.cli.arguments import model_arguments, preprocess_argument, progress_of, show
from featcache.store.places.targets import checked_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache fisher``."""
    parser.add_argument("data", metavar="DATASET:SPLIT", help="images, usually the training split")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="output file (safetensors)")
    parser.add_argument("--head", metavar="FILE", help="the model's head; default: zero-shot from --templates")
    parser.add_argument("--templates", default="simple", help="templates of the zero-shot head (default: simple)")
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="labels drawn for each image (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the drawn labels (default: 0)")
    model_arguments(parser)
    preprocess_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache fisher DATASET:SPLIT --model M -o FILE``."""
    from featcache.datasets.holdout import Subset
    from featcache.encoding.texts import embed_prompts
    from ft.checkpoints.parents import load_open_clip
    from ft.merging.fisher import fisher, write_fisher
    from ft.training.loop import open_split
    from heads import ZeroShot, load
    from heads.fitted.linear import as_linear

    checked_target(args.output)
    dataset = open_split(args.data)
    if args.limit:
        dataset = Subset(dataset, np.arange(min(args.limit, len(dataset.index))), dataset.split)
    encoder = load_open_clip(args.model, args.pretrained, device=args.device, preprocess=args.preprocess)
    if args.head:
        head = as_linear(load(args.head))
    else:
        names = dataset.index.classnames
        texts = embed_prompts(names, args.templates, encoder, name=dataset.name, root=args.root).store
        head = ZeroShot().fit(texts).linear()
    values = fisher(encoder, dataset, head, passes=args.passes, seed=args.seed, progress=progress_of(args))
    path = write_fisher(values, args.output)
    n = len(dataset.index)
    show(
        {"file": path, "images": n, "tensors": len(values)},
        f"{path}: Fisher information of {len(values)} tensors over {n:,} images (featcache wise ... --fisher F0 F1)",
        args.json,
    )
    return 0
