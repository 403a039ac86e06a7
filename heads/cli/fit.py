"""The verb ``featcache fit``: any head of `HEADS` from stores."""

import argparse
from typing import Any

from featcache.cli.arguments import show
from featcache.errors import HeadError
from featcache.store import ImageStore, TextStore
from heads import HEADS, save
from heads.cli.arguments import device_argument, json_setting, open_reference, prior_head, store_arguments
from heads.estimators.fit import Material, fit_head, head_class, parameters_of, takes_prior, takes_selection
from heads.fitted.base import as_head


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache fit``."""
    parser.add_argument("head", metavar="HEAD", help=f"one of {', '.join(sorted(HEADS))}")
    parser.add_argument(
        "stores",
        metavar="STORE",
        nargs="+",
        help="folder, key, NAME/SPLIT[@MODEL], texts/NAME[@MODEL]; heads that blend in texts take both kinds",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where the head goes (safetensors)")
    parser.add_argument("--select", metavar="STORE", help="split on which hyper-parameters are chosen")
    parser.add_argument(
        "--prior", metavar="HEAD", help="shrink the weights towards this head's: a file, or texts/NAME for zero-shot"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the head, its value in JSON: --set alphas=[0.1,1,10]",
    )
    device_argument(parser)
    store_arguments(parser)


def fit(args: argparse.Namespace) -> int:
    """``featcache fit HEAD STORE... -o FILE``."""
    head_class(args.head)  # a name that is none is refused first
    parameters = dict(json_setting(setting, parameters_of(args.head)) for setting in args.set)
    if args.select and not takes_selection(args.head):
        raise HeadError(f"--select: {args.head} chooses nothing; leave it out")
    stores = [open_reference(reference, args) for reference in args.stores]
    material = Material(
        texts=_texts(args.head, [store for store in stores if isinstance(store, TextStore)]),
        train=_train(args.head, [store for store in stores if not isinstance(store, TextStore)]),
        selection=open_reference(args.select, args) if args.select else None,
        prior=prior_head(args.prior, args) if args.prior else None,
    )
    if material.prior is not None and not takes_prior(args.head):
        raise HeadError(f"--prior: {args.head} shrinks towards nothing; leave it out")
    fitted = as_head(fit_head(args.head, material, parameters))
    path = save(fitted, args.output)
    params = fitted.provenance.params
    record = {"head": args.head, "file": str(path), "params": params, "classes": len(fitted.classnames)}
    show(record, f"{args.head}: {len(fitted.classnames)} classes, {_described(params)}\n  {path}", args.json)
    return 0


def _train(head: str, stores: list[ImageStore]) -> ImageStore | None:
    """The one image store, where the head fits on images."""
    if head_class(head).fits_on == "texts":
        if stores:
            raise HeadError(f"{stores[0].name}: a store of images; {head} fits from a store of texts")
        return None
    if len(stores) != 1:
        raise HeadError(f"{head} fits from one store of images, got {len(stores)}; name one (NAME/SPLIT)")
    return stores[0]


def _texts(head: str, stores: list[TextStore]) -> list[TextStore]:
    """The text stores, where the head takes any."""
    if stores and not (head_class(head).fits_on == "texts" or head_class(head).takes_texts):
        raise HeadError(
            f"texts/{stores[0].name} is a store of texts; {head} fits from one store of images (NAME/SPLIT) alone"
        )
    return stores


def _described(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )
