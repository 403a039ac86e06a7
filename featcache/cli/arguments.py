"""Arguments shared by several verbs, and printing of results."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin

from featcache.cli.sources import sources_help
from featcache.encoders import PREPARATIONS, Encoder, load_encoder
from featcache.encoding.options import EncodeOptions
from featcache.parameters import Parameter, descriptions_of, parameters_of
from featcache.progress import Progress, Silent, coloured, printable, shown_progress
from featcache.store import ImageStore, TextStore
from featcache.store.catalogue import other_names
from featcache.store.places.targets import is_stream

STORE_HELP = (
    "folder, s3:// URL, key, NAME/SPLIT[@MODEL][#KEY] or texts/NAME[@MODEL][#KEY]; append #TAP for a tap or view"
)


def _flag(name: str, **settings: Any) -> Callable[[argparse.ArgumentParser], None]:
    """A function that adds an argument to a parser."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(name, **settings)

    return add


root_argument = _flag(
    "--root", help="folder or s3://bucket/prefix that holds the stores (default: $FEATCACHE_ROOT, else ./cache)"
)
update_labels_argument = _flag("--update-labels", action="store_true", help="store changed labels; features are kept")
device_argument = _flag("--device", help="default: cuda if available, else cpu")
quiet_argument = _flag("--quiet", action="store_true", help="short result, without progress on stderr")
preprocess_argument = _flag(
    "--preprocess",
    choices=sorted(PREPARATIONS),
    help="instead of the model's own preprocessing: central-crop (the central 7/8, as in Lipsum-FT); fast (the model's "
    "own by faster code, equal to within 1/255); cuda (decodes and resizes on the GPU)",
)


def data_arguments(parser: argparse.ArgumentParser, metavar: str, nargs: str | None = None) -> None:
    """Add the data set, or several with `nargs`, and ``--labels``; ``--help`` lists sources and their options."""
    parser.add_argument(
        "data", metavar=metavar, nargs=nargs, help="SOURCE:ARGUMENT[,OPTION=VALUE...]; sources: see below"
    )

    def explain(args: argparse.Namespace) -> str:
        data = vars(args).get("data") or []
        return sources_help(parser.prog, [data] if isinstance(data, str) else data)

    vars(parser)["explain"] = explain
    parser.add_argument(
        "--labels",
        default="names",
        choices=("names", "int"),
        help="whether labels in list files are names or indices (default: names)",
    )


def typed(kind: object) -> Callable[[str], Any]:
    """An argparse type: the value of a text, which the annotation must allow."""
    declared = Parameter("", kind, None).given

    def value(text: str) -> object:
        try:
            return declared.check(declared.parsed(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {declared.expected}") from None

    return value


METAVARS = {int: "N", float: "X"}
PRECISION = parameters_of(load_encoder)["precision"]


def flag(parser: argparse.ArgumentParser, parameter: Parameter, text: str, **settings: Any) -> None:
    """Add the flag of a parameter: its declaration gives type, choices and default, which `settings` may replace."""
    kind, default = parameter.given.kind, settings.setdefault("default", parameter.default)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        settings.setdefault("nargs", "+")
    if kind is bool:
        settings.setdefault("action", "store_true")
    elif choices := settings.get("choices") or Parameter(parameter.name, kind, None).choices:
        settings["choices"] = choices
    else:
        settings["type"] = typed(kind)
        settings["metavar"] = METAVARS.get(get_args(kind)[0] if get_origin(kind) is Annotated else kind)
    shown = parameter.default if default is argparse.SUPPRESS else default
    if "default:" not in text and shown not in (None, (), "") and settings.get("action") != "store_true":
        text += f" (default: {shown})"
    parser.add_argument(f"--{parameter.name.replace('_', '-')}", help=text.replace("%", "%%"), **settings)


def precision_argument(parser: argparse.ArgumentParser, text: str, **settings: Any) -> None:
    """Add ``--precision``."""
    flag(parser, PRECISION, text, **settings)


def decoding_arguments(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """Add ``--batch-size`` and ``--workers``; without a default batch size, `encode` chooses one."""
    declared, texts = parameters_of(EncodeOptions), descriptions_of(EncodeOptions)
    text = "images per forward pass" if batch_size else texts["batch_size"]
    flag(parser, declared["batch_size"], text, default=batch_size)
    flag(parser, declared["workers"], texts["workers"])


def dry_run_argument(parser: argparse.ArgumentParser, done: str) -> None:
    """Add ``--dry-run``; `done` is what a run does: encoded, trained, fitted."""
    parser.add_argument(
        "--dry-run", action="store_true", help=f"print what would be read, {done} and written, and in what time"
    )


def shard_argument(parser: argparse.ArgumentParser, units: str) -> None:
    """Add ``--shard``."""
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help=f"for a job array: only {units} I, I+N, ..., with I from 0; without it, concurrent runs (and the ranks of "
        "torchrun) share the work",
    )


def pretrained_argument(parser: argparse.ArgumentParser, of: str = "--model") -> None:
    """Add ``--pretrained``."""
    parser.add_argument("--pretrained", help=f"weights of {of}: an open_clip tag, checkpoint file, or `random`")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that define an encoder."""
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny (the default), an open_clip architecture, one of OpenAI's names (ViT-B/32, RN50x64), "
        "MY-CLIP.json (your architecture in open_clip's format), local-dir:FOLDER, hf-hub:NAME, timm:NAME[,FILE], "
        "python:MODULE:FUNCTION",
    )
    pretrained_argument(parser)
    device_argument(parser)
    precision_argument(parser, "precision of the model's matrix products")
    quiet_argument(parser)
    root_argument(parser)


def encoder_of(args: argparse.Namespace, preprocess: str | None = None) -> Encoder:
    """The encoder defined by `model_arguments`."""
    place = {"device": args.device, "precision": args.precision}
    return load_encoder(args.model, args.pretrained, **place, preprocess=preprocess)


def progress_of(args: argparse.Namespace) -> Progress:
    """Progress on stderr; none with ``--quiet``."""
    return Silent() if args.quiet else shown_progress()


def alias_note(store: ImageStore | TextStore, encoder: Encoder) -> str:
    """A note if the store was made by an encoder with the same weights under another name."""
    if store.encoder_name == encoder.name or encoder.name not in other_names(store.path):
        return ""
    return f"\n  the tower of {encoder.name} equals that of {store.encoder_name}: @{encoder.name} finds this store too"


def terminal_width() -> int | None:
    """Columns of the terminal; None if the output is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_width() -> int:
    """Maximum line length of tables: that of the terminal, or 110 in files and pipes."""
    return terminal_width() or 110


def repeated(classnames: Sequence[str]) -> list[str]:
    """Class names that are not unique."""
    return [name for name, uses in Counter(classnames).items() if uses > 1]


def repeated_note(classnames: Sequence[str]) -> str:
    r"""A note about class names that are not unique; empty if there are none.

    >>> repeated_note(["crane", "cat", "crane"])
    '\n  note: classes with the same name: crane'
    """
    twice = repeated(classnames)
    return f"\n  note: classes with the same name: {', '.join(twice)}" if twice else ""


def show(value: object, text: str, as_json: bool, beside: str | None = None) -> None:
    """Print a result as JSON or text; on stderr if the target `beside` is standard output."""
    where = sys.stderr if beside is not None and is_stream(beside) else sys.stdout
    print(json.dumps(value, default=os.fspath) if as_json else coloured(printable(text), where), file=where)
