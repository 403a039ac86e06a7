"""The verb ``featcache fit``: any head of `HEADS` from stores."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.commands import root_argument, show
from featcache.errors import HeadError
from featcache.store import ImageStore, TextStore, check_deep, find_store, resolve_root
from heads import HEADS, load, save
from heads.fitting import Material, fit_head, head_class, parameters_of, takes_prior, takes_selection
from heads.logits import as_head
from heads.resident_store import resident

__all__ = [
    "device_argument",
    "fit",
    "fit_arguments",
    "json_setting",
    "open_reference",
    "prior_head",
    "store_arguments",
]


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


def device_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of verbs that can work on a GPU."""
    parser.add_argument(
        "--device",
        dest="rows_device",  # other verbs have a device for the encoder
        help="hold features in the memory of this device, such as cuda, and work there (default: stream, on the CPU)",
    )


def store_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every verb that reads stores."""
    parser.add_argument("--no-verify", action="store_true", help="do not check the stores' checksums first")
    root_argument(parser)


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
    params = fitted.provenance["params"]
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


def json_setting(setting: str, known: Sequence[str]) -> tuple[str, Any]:
    """Name and value of ``NAME=JSON``.

    Raises
    ------
    HeadError
        For another form, a name that is not known, or no JSON value.
    """
    name, equals, value = setting.partition("=")
    if not equals or name not in known:
        raise HeadError(f"--set {setting}: expected NAME=VALUE with one of the names {', '.join(known)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise HeadError(f"--set {setting}: {value!r} is no JSON value; quote texts twice: '\"text\"'") from None


def open_reference(reference: str, args: argparse.Namespace) -> Any:
    """The store that a reference means, verified unless ``--no-verify``; with ``--device``, features in its memory."""
    store = find_store(reference, resolve_root(args.root))
    if not args.no_verify:
        check_deep(store.path)
    device = getattr(args, "rows_device", None)
    if device is None or isinstance(store, TextStore):
        return store
    if getattr(store, "groups", None) is not None:
        raise HeadError(f"--device {device}: {reference} stacks views, which are streamed; leave --device out")
    return resident(store, device)


def prior_head(reference: str, args: argparse.Namespace) -> Any:
    """The linear head in a file, or the zero-shot head of a text store."""
    if Path(reference).is_file():
        return load(reference).linear()
    store = open_reference(reference, args)
    if not isinstance(store, TextStore):
        raise HeadError(f"--prior {reference}: a store of images; give a head's file, or a store of texts")
    return Material(texts=[store]).text_head()
