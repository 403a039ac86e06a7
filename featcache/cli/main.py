"""The command line: a static table of verbs, each imported only when it is used.

A verb is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. It imports heavy libraries
inside `run`, so that ``featcache VERB --help`` answers at once. Exit codes are those of `featcache.errors`: 0 done, 1
unexpected, 2 bad input, 3 store missing or unfinished, 4 damaged, 5 mismatch refused, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from featcache import SIBLINGS, __version__, sibling
from featcache.errors import FeatcacheError

VERBS: dict[str, tuple[str, str]] = {
    "encode": ("featcache.cli.encode", "encode splits of a data set into image stores"),
    "text": ("featcache.cli.text", "embed class names x templates, or a prompt file, into a text store"),
    "list": ("featcache.cli.list", "list the stores"),
    "info": ("featcache.cli.info", "show what a store holds and where it comes from"),
    "verify": ("featcache.cli.verify", "check a store against its checksums"),
    "gc": ("featcache.cli.gc", "find unfinished stores and partial files (--delete removes them)"),
    "export": ("featcache.cli.export", "write features, labels and ids to npy, safetensors, Parquet or CSV"),
    "import": ("featcache.cli.import_", "make a store of features that another program computed"),
    "fit": ("heads.cli.fit", "fit a head from stores"),
    "evaluate": ("heads.cli.evaluate", "evaluate heads on stores"),
    "compare": ("heads.cli.compare", "compare two heads row by row: intervals, exact tests"),
    "predict": ("heads.cli.predict", "classify image files with a head"),
    "retrieve": ("heads.cli.retrieve", "image-text retrieval: recall@k in both directions"),
    "sweep": ("heads.cli.sweep", "fit and evaluate many heads, settings, shots and seeds, one row each"),
    "leaks": ("heads.cli.leaks", "find near-duplicates between a train and a test split"),
    "demo": ("ft.cli.demo", "the main job from start to end, on the embedded model and handwritten digits"),
    "generate": ("ft.cli.generate", "draw training images of class names with a diffusion model (RegFT)"),
    "finetune": ("ft.cli.finetune", "fine-tune a model; its checkpoint is encoded like any other"),
    "wise": ("ft.cli.wise", "interpolate the weights of two models (WiSE-FT)"),
    "fisher": ("ft.cli.fisher", "diagonal Fisher information of a model, for weighted interpolations"),
    "convert": ("ft.cli.convert", "read checkpoints of other systems, write open_clip or Hugging Face layouts"),
}
"""Verb -> its module, and one line of help."""

INTERRUPTED = 130


class Verb(Protocol):
    """What a module of `VERBS` has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work; the exit code."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Raise FeatcacheError, which is printed like every other."""
        raise FeatcacheError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors become one message and an exit code, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        return _front_door(arguments)
    name, *words = arguments
    as_json = "--json" in words
    module, summary = VERBS[name]
    try:
        if (package := module.partition(".")[0]) in SIBLINGS:
            sibling(package)
    except ImportError as error:
        return _report(FeatcacheError(str(error)), FeatcacheError.exit_code, as_json)
    verb = cast(Verb, import_module(module))
    parser = Parser(prog=f"featcache {name}", description=summary)
    verb.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout instead of text")
    try:
        args = parser.parse_args(words)
        as_json = args.json
        return verb.run(args)
    except FeatcacheError as error:
        return _report(error, error.exit_code, as_json)
    except KeyboardInterrupt:
        message = "interrupted: finished chunks are kept; run the same command again to resume"
        return _report(KeyboardInterrupt(message), INTERRUPTED, as_json)
    except OSError as error:
        return _report(error, 2, as_json)


def _front_door(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"featcache {__version__}")
        return 0
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    text = (
        "usage: featcache VERB ...\n\n"
        "Encode images and texts once; fit and evaluate heads from the stored features.\n\n"
        f"verbs:\n{verbs}\n\n`featcache VERB --help` says more; `featcache demo` shows the main job.\n"
    )
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(text, end="")
        return 0 if arguments else 2
    print(f"featcache: unknown verb {arguments[0]!r}; expected one of {', '.join(VERBS)}", file=sys.stderr)
    return 2


def _report(error: BaseException, code: int, as_json: bool) -> int:
    if as_json:
        record = {"error": type(error).__name__, "message": str(error), "exit_code": code}
        print(json.dumps(record), file=sys.stderr)
    else:
        print(f"featcache: {type(error).__name__}: {error}", file=sys.stderr)
    return code
