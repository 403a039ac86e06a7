"""The verb of weight-space ensembles: wise."""

import argparse

from featcache.commands import show
from ft.interpolate import FISHER_FLOOR
from ft.wise import wise as merge

__all__ = ["wise", "wise_arguments"]


def wise_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache wise``."""
    parser.add_argument("zero_shot", metavar="ZERO_SHOT", help="model folder of the zero-shot model, or `tiny`")
    parser.add_argument(
        "fine_tuned",
        metavar="FINE_TUNED",
        nargs="+",
        help="model folder or checkpoint file of the fine-tuned model; several are averaged first (a soup)",
    )
    parser.add_argument(
        "--alpha",
        "--alphas",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="A",
        help="0 is zero-shot, 1 is fine-tuned (default: 0.5)",
    )
    parser.add_argument(
        "-o",
        "--output",
        "--out",
        dest="out",
        required=True,
        metavar="DIR",
        help="where the folders alpha=0.500 and so on go",
    )
    parser.add_argument(
        "--fisher",
        nargs=2,
        metavar=("F0", "F1"),
        help="checkpoint files with the diagonal Fisher information of both models: weights by it, element by element",
    )
    parser.add_argument(
        "--fisher-floor", type=float, default=FISHER_FLOOR, metavar="F", help="least Fisher information (default: 1e-8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders that are already there")


def wise(args: argparse.Namespace) -> int:
    """``featcache wise ZERO_SHOT FINE_TUNED... --alpha A... --out DIR``."""
    folders = merge(
        args.zero_shot,
        args.fine_tuned,
        args.alpha,
        args.out,
        fisher=(args.fisher[0], args.fisher[1]) if args.fisher else None,
        floor=args.fisher_floor,
        overwrite=args.overwrite,
    )
    models = [
        {"alpha": alpha, "folder": str(folder), "model": f"local-dir:{folder}"}
        for alpha, folder in zip(args.alpha, folders, strict=True)
    ]
    lines = [f"{model['folder']}  (featcache encode DATA --model {model['model']})" for model in models]
    show(models, "\n".join(lines), args.json)
    return 0
