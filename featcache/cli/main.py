"""The command line: a static table of verbs, each imported only when it is used.

A verb is a function ``verb(args) -> exit code`` with ``verb_arguments(parser)`` beside it. Exit codes are those of
`featcache.errors`: 0 done, 1 unexpected, 2 bad input, 3 store missing or unfinished, 4 damaged, 5 mismatch refused,
130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from featcache import SIBLINGS, __version__, sibling
from featcache.errors import FeatcacheError

VERBS: dict[str, tuple[str, str]] = {
    "encode": ("featcache.cli.encode:encode", "encode splits of a data set into image stores"),
    "text": ("featcache.cli.text:text", "embed class names x templates, or a prompt file, into a text store"),
    "list": ("featcache.cli.stores:list_", "list the stores"),
    "info": ("featcache.cli.stores:info", "show what a store holds and where it comes from"),
    "verify": ("featcache.cli.stores:verify", "check a store against its checksums"),
    "gc": ("featcache.cli.stores:gc", "collect unfinished stores and partial files (lists them; --delete acts)"),
    "export": ("featcache.cli.transfer:export", "write features, labels, ids to npy, safetensors, Parquet or CSV"),
    "import": ("featcache.cli.transfer:import_", "make a store of features that others computed"),
    "fit": ("heads.cli.fit:fit", "fit a head from stores"),
    "evaluate": ("heads.cli.evaluate:evaluate", "judge heads on stores"),
    "compare": ("heads.cli.compare:compare", "compare two heads row by row: intervals, exact tests"),
    "predict": ("heads.cli.predict:predict", "classify images with a head: encoder and head in one"),
    "retrieve": ("heads.cli.retrieve:retrieve", "image-text retrieval: recall@k in both directions"),
    "sweep": ("heads.cli.sweep:sweep", "fit and judge many heads, settings, shots and seeds, one row each"),
    "leaks": ("heads.cli.leaks:leaks", "near-duplicates between a train and a test split"),
    "demo": ("ft.cli.demo:demo", "the whole road on the embedded model and handwritten digits"),
    "finetune": ("ft.cli.finetune:finetune", "fine-tune a model; its checkpoint is encoded like any other"),
    "wise": ("ft.cli.wise:wise", "interpolate the weights of two models (WiSE-FT)"),
    "fisher": ("ft.cli.fisher:fisher", "diagonal Fisher information of a model, for weighted interpolations"),
    "convert": ("ft.cli.convert:convert", "read checkpoints of other systems, write open_clip or Hugging Face layouts"),
}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Raise FeatcacheError, told as every other."""
        raise FeatcacheError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors become one message and an exit code, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        return _front_door(arguments)
    verb = arguments[0]
    place, summary = VERBS[verb]
    module, _, name = place.partition(":")
    parser = Parser(prog=f"featcache {verb}", description=summary)
    try:
        if (package := module.partition(".")[0]) in SIBLINGS:
            sibling(package)
    except ImportError as error:
        return _report(FeatcacheError(str(error)), FeatcacheError.exit_code, "--json" in arguments[1:])
    loaded = import_module(module)
    getattr(loaded, f"{name}_arguments")(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout instead of text")
    as_json = "--json" in arguments[1:]
    try:
        args = parser.parse_args(arguments[1:])
        as_json = args.json
        return int(getattr(loaded, name)(args))
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
        "usage: featcache VERB ...\n\nEncode images and texts once; fit and judge heads from the stored features.\n\n"
        f"verbs:\n{verbs}\n\n`featcache VERB --help` says more; `featcache demo` shows the whole road.\n"
    )
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(text, end="")
        return 0 if arguments else 2
    print(f"featcache: unknown verb {arguments[0]!r}; expected one of {', '.join(VERBS)}", file=sys.stderr)
    return 2


def _report(error: BaseException, code: int, as_json: bool) -> int:
    if as_json:
        record: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "exit_code": code}
        print(json.dumps(record), file=sys.stderr)
    else:
        print(f"featcache: {type(error).__name__}: {error}", file=sys.stderr)
    return code
