"""The command ``featcache fit``: fit any head of `HEADS` from stores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import show
from featcache.errors import HeadError
from featcache.parameters import described
from featcache.progress import Printed, Silent
from featcache.store import TextStore
from featcache.store.places.targets import checked_target
from heads.cli.arguments import json_setting, open_reference, open_texts, rows_device_argument, store_arguments
from heads.estimators.catalogue import HEADS, head_class, make_head, parameters_of, takes_prior, takes_selection

if TYPE_CHECKING:
    from featcache.store.protocol import FeatureTable
    from heads.estimators.base import HeadClassifier
    from heads.fitted.linear import LinearHead


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache fit``."""
    add = parser.add_argument
    head = add("head", metavar="HEAD", help=f"one of {', '.join(sorted(HEADS))}")
    vars(head)["completer"] = HEADS
    add(
        "stores",
        metavar="STORE",
        nargs="+",
        help="folder, key, NAME/SPLIT[@MODEL] or texts/NAME[@MODEL]; some heads take an image store and a text store, "
        "or the file of a linear head in place of the texts",
    )
    add("-o", "--output", required=True, metavar="FILE", help="file of the head (safetensors), - for standard output")
    add("--select", metavar="STORE", help="split on which hyper-parameters are chosen")
    add("--exclude-seen", action="store_true", help="leave training rows out of --select (default: refuse them)")
    add(
        "--group",
        metavar="COLUMN",
        help="metadata column (patient, video) whose equal values form a group: groups are held out as a whole, and "
        "count as seen if one of their rows is trained on",
    )
    add("--prior", metavar="HEAD", help="shrink the weights towards this head: a file, or texts/NAME for zero-shot")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter of the head, as JSON: --set alphas=[0.1,1,10]; `featcache fit HEAD --help` lists them",
    )
    rows_device_argument(parser)
    store_arguments(parser)
    vars(parser)["explain"] = _parameters


def _parameters(args: argparse.Namespace) -> str:
    """The parameters of the named head, for ``--help``."""
    if (name := str(vars(args).get("head"))) not in HEADS:
        return ""
    return f"\nparameters of {name}, for --set:\n{described(parameters_of(name))}\n"


def run(args: argparse.Namespace) -> int:
    """``featcache fit HEAD STORE... -o FILE``."""
    from heads import Material, fit_head, save
    from heads.fitted.base import as_head
    from heads.fitted.file_format import STREAM

    kind = head_class(args.head)
    checked_target(args.output, STREAM)
    parameters = dict(json_setting(args.head, text) for text in args.set)
    make_head(args.head, parameters)  # checks the values before any store is read
    if args.select and not takes_selection(args.head):
        raise HeadError(f"--select: {args.head} has nothing to choose; leave it out")
    files = [reference for reference in args.stores if reference.endswith(".safetensors") and Path(reference).is_file()]
    stores = [open_reference(reference, args) for reference in args.stores if reference not in files]
    texts = _texts(kind, [store for store in stores if isinstance(store, TextStore)], files)
    train = _grouped(_train(kind, [store for store in stores if not isinstance(store, TextStore)]), args.group)
    material = Material(
        texts=texts,
        train=train,
        selection=_selection(args, train),
        prior=_prior(args.prior, args) if args.prior else None,
        progress=Silent() if args.json else Printed(),
    )
    if material.prior is not None and not takes_prior(args.head):
        raise HeadError(f"--prior: {args.head} takes no prior; leave it out")
    fitted = as_head(fit_head(args.head, material, parameters))
    path = save(fitted, args.output)
    params = fitted.provenance.params
    record = {"head": args.head, "file": str(path), "params": params, "classes": len(fitted.classnames)}
    text = f"{args.head}: {len(fitted.classnames)} classes, {_described(params)}\n  {path}"
    show(record, text, args.json, beside=args.output)
    return 0


def _selection(args: argparse.Namespace, train: FeatureTable | None) -> FeatureTable | None:
    from heads import unseen

    store = open_reference(args.select, args) if args.select else None
    if isinstance(store, TextStore):
        raise HeadError(f"--select {args.select}: a store of texts; expected a store of images")
    if args.exclude_seen and store is not None and train is not None:
        store = unseen(store, train)
    return _grouped(store, args.group)


def _grouped(store: FeatureTable | None, column: str | None) -> FeatureTable | None:
    """The store with the groups of a metadata column, if one is given."""
    from heads import grouped

    return store if store is None or column is None else grouped(store, column)


def _prior(reference: str, args: argparse.Namespace) -> LinearHead:
    """The linear head in a file, or the zero-shot head of a text store."""
    from heads import Material, load
    from heads.fitted.linear import as_linear

    if Path(reference).is_file():
        return as_linear(load(reference))
    if Path(reference).suffix == ".safetensors":
        raise HeadError(f"--prior {reference}: no such file; check the path, or name a text store: texts/NAME")
    return Material(texts=[open_texts(reference, args, "--prior ")]).text_head()


def _train(kind: type[HeadClassifier], stores: Sequence[FeatureTable]) -> FeatureTable | None:
    """The image store, for a head that fits on images."""
    if kind.fits_on == "texts":
        if stores:
            raise HeadError(f"{stores[0].name}: a store of images; {kind.name} fits from a store of texts")
        return None
    if len(stores) != 1:
        raise HeadError(f"{kind.name} fits from one store of images, got {len(stores)}; name one (NAME/SPLIT)")
    return stores[0]


def _texts(
    kind: type[HeadClassifier], stores: Sequence[TextStore], files: Sequence[str]
) -> Sequence[TextStore] | LinearHead:
    """The text stores, or the head in a file, for a head that takes texts."""
    from heads import load
    from heads.fitted.linear import as_linear

    given = [f"texts/{store.name} is a store of texts" for store in stores] + [f"{file} is a head" for file in files]
    if given and not (kind.fits_on == "texts" or kind.takes_texts):
        raise HeadError(f"{given[0]}; {kind.name} fits from one store of images (NAME/SPLIT) alone")
    if files and len(given) > 1:
        raise HeadError(f"{'; '.join(given)}: {kind.name} takes one head, or stores of texts, not both")
    return as_linear(load(files[0])) if files else stores


def _described(params: Mapping[str, object]) -> str:
    """Parameters as text; a prior, which is a record, by the name of its head."""
    texts = {}
    for name, value in params.items():
        texts[name] = f"{value:.6g}" if isinstance(value, float) else str(value)
        if isinstance(value, Mapping):
            texts[name] = str(value.get("head", json.dumps(value)))
        if name == "templates" and value is None:
            texts[name] = "all"
    return ", ".join(f"{name}={text}" for name, text in texts.items())
