"""The command line: a static table of verbs, each imported only when it is used.

A verb is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. It imports heavy libraries
inside `run`, so that ``featcache VERB --help`` answers at once. Exit codes are those of `featcache.errors`.
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from featcache import SIBLINGS, __version__, sibling
from featcache.cli.signals import Terminated, ended_by_signals
from featcache.errors import FeatcacheError, explain
from featcache.progress import coloured, one_line

VERBS: dict[str, tuple[str, str]] = {
    "encode": ("featcache.cli.encode", "encode splits of a data set into image stores"),
    "text": ("featcache.cli.text", "embed class names x templates, or a prompt file, into a text store"),
    "list": ("featcache.cli.list", "list the stores"),
    "info": ("featcache.cli.info", "show the contents and origin of a store or a head"),
    "verify": ("featcache.cli.verify", "check a store against its checksums"),
    "rm": ("featcache.cli.rm", "delete finished stores (without --yes, only list them)"),
    "rename": ("featcache.cli.rename", "give a store another name"),
    "relabel": ("featcache.cli.relabel", "rename the classes of a store; no image is opened"),
    "gc": ("featcache.cli.gc", "list unfinished stores and partial files (--delete removes them)"),
    "export": ("featcache.cli.transfer.export", "write features, labels and ids for other programs"),
    "import": ("featcache.cli.transfer.import_", "make a store from features computed by another program"),
    "pack": ("featcache.cli.transfer.pack", "write a store to one file"),
    "unpack": ("featcache.cli.transfer.unpack", "check a packed store and add it to the root"),
    "doctor": ("featcache.cli.doctor", "report versions, device, extras, hub access and disk speed"),
    "completion": ("featcache.cli.completion", "print a script that completes commands in bash, zsh or fish"),
    "fit": ("heads.cli.fit", "fit a head from stores"),
    "evaluate": ("heads.cli.evaluate", "evaluate heads on stores"),
    "compare": ("heads.cli.compare", "compare two heads on the same rows: intervals, exact tests"),
    "predict": ("heads.cli.predict", "classify image files with a head"),
    "retrieve": ("heads.cli.retrieve", "evaluate image-text retrieval: recall@k in both directions"),
    "sweep": ("heads.cli.sweep", "fit and evaluate many heads, settings, shots and seeds, one row each"),
    "table": ("heads.cli.table", "evaluate one head with several models on every domain of a data set, with averages"),
    "report": ("heads.cli.report", "make tables, plots and a page from results files, beside published figures"),
    "leaks": ("heads.cli.leaks", "find near-duplicates between a train and a test split"),
    "demo": ("ft.cli.demo", "run the main workflow with the embedded model on handwritten digits"),
    "generate": ("ft.cli.generate", "generate training images for class names with a diffusion model (RegFT)"),
    "finetune": ("ft.cli.finetune", "fine-tune a model; its checkpoint is encoded like any other"),
    "wise": ("ft.cli.wise", "interpolate the weights of two models (WiSE-FT)"),
    "merge": ("ft.cli.merge", "merge models: soups, task arithmetic, TIES, Model Stock, RegMean, Fisher"),
    "moments": ("ft.cli.moments", "compute second moments of the inputs of a model's layers, for RegMean"),
    "fisher": ("ft.cli.fisher", "compute a model's diagonal Fisher information, for weighted interpolation"),
    "convert": ("ft.cli.convert", "read checkpoints of other systems, write open_clip or Hugging Face layouts"),
}
"""Verb -> its module and one line of help."""

SIGNALLED = 128
"""Exit code of a run ended by a signal, minus the signal number."""
INTERRUPTED = "finished work is kept; run the same command again to continue"


class Help(argparse.Action):
    """``--help``; a verb may set `parser.explain`, which adds help for the arguments before it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        """Print the help and exit."""
        explain = vars(parser).get("explain", lambda _: "")
        print(parser.format_help() + explain(namespace), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def __init__(self, prog: str, description: str = "") -> None:
        super().__init__(prog, description=description, add_help=False)
        self.add_argument(
            "-h", "--help", action=Help, nargs=0, dest=argparse.SUPPRESS, help="show this help message and exit"
        )

    def error(self, message: str) -> NoReturn:
        """Raise FeatcacheError."""
        raise FeatcacheError(f"{message}; see `{self.prog} --help`")

    def parsed(self, words: Sequence[str]) -> argparse.Namespace:
        """`parse_args`, suggesting a similar flag for an unknown one."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            hints = [did_you_mean(word.partition("=")[0], flags) for word in unknown if word.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
        return found


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint with the most similar known name; empty if none is similar.

    >>> did_you_mean("encoed", ["encode", "list"])
    "; did you mean 'encode'?"
    """
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors become one line and an exit code, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    if sys.stdout is None:  # closed by the caller (`>&-`)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        with ended_by_signals():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except FeatcacheError as error:
        return _report(error, str(error), error.exit_code, as_json)
    except Terminated as ended:
        return _report(ended, f"ended by {ended.signal.name}: {_left(ended)}", SIGNALLED + ended.signal, as_json)
    except KeyboardInterrupt as error:
        return _report(error, f"interrupted: {_left(error)}", SIGNALLED + signal.SIGINT, as_json)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # such as `| head`
            return SIGNALLED + signal.SIGPIPE
        # Errors from writing files name the file; the others come from print.
        return _report(error, explain(error, error.filename or "standard output"), FeatcacheError.exit_code, as_json)
    except UnicodeEncodeError as error:  # a name that becomes part of a key or a file
        message = f"{error.object!r} is not valid UTF-8 ({error.reason}); use another name"
        return _report(error, message, FeatcacheError.exit_code, as_json)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        need = "free some, or lower --batch-size, --workers or the number of heads and settings"
        message = f"out of memory ({str(error) or 'no memory left'}); {need}"
        shown = error if isinstance(error, MemoryError) else MemoryError()
        return _report(shown, message, FeatcacheError.exit_code, as_json)


OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't start new thread")
"""Messages of RuntimeErrors that torch and Python raise when out of memory."""


def _left(stopped: KeyboardInterrupt) -> str:
    """Notes that the interrupted run attached to the exception, else `INTERRUPTED`."""
    return "; ".join(getattr(stopped, "__notes__", ())) or INTERRUPTED


def _reader_has_gone() -> bool:
    """Whether standard output is a closed pipe; if so, redirects it to the null device."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    pipe = select.poll()
    pipe.register(output, 0)
    if not pipe.poll(0):  # no error
        return False
    _drop_unwritable(sys.stdout)
    return True


def _drop_unwritable(stream: TextIO) -> None:
    """Discard output that a stream cannot write; otherwise the interpreter tries again at exit and returns 120."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # it has no file
            output = stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, output)
            os.close(nothing)


def _run(arguments: Sequence[str]) -> int:
    """Parse the arguments of a verb, and run it."""
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] not in VERBS:
        return _front_door(arguments)
    name, *words = arguments
    if odd := next((word for word in words if "\0" in word), None):
        raise FeatcacheError(f"{odd!r}: file names and texts cannot contain a NUL; remove it")
    module, summary = VERBS[name]
    try:
        if (package := module.partition(".")[0]) in SIBLINGS:
            sibling(package)
    except ImportError as error:
        raise FeatcacheError(str(error)) from error
    verb = import_module(module)
    parser = Parser(prog=f"featcache {name}", description=summary)
    verb.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout instead of text")
    try:
        args = parser.parsed(words)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    with _plain_warnings():
        code: int = verb.run(args)
    return code


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Format warnings without the source line, each text once: a data set may be opened several times."""
    before, said = warnings.formatwarning, set[str]()

    def plain(message: Warning | str, *_: object, **__: object) -> str:
        line = one_line(f"featcache: warning: {message}") + "\n"
        if line in said:
            return ""
        said.add(line)
        return line

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _front_door(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"featcache {__version__}")
        return 0
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    text = (
        "usage: featcache VERB ...\n\n"
        "Encode images and texts once; fit and evaluate heads from the stored features.\n\n"
        f"verbs:\n{verbs}\n\n`featcache VERB --help` says more; `featcache demo` shows the main workflow.\n"
    )
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(text, end="")
        return 0 if arguments else 2
    hint = did_you_mean(arguments[0], list(VERBS))
    raise FeatcacheError(f"unknown verb {arguments[0]!r}{hint or '; expected one of ' + ', '.join(VERBS)}")


def _report(error: BaseException, message: str, code: int, as_json: bool) -> int:
    """Print an error as one line on stderr; returns the exit code."""
    if as_json:
        record = {"error": type(error).__name__, "message": message, "exit_code": code}
        line = json.dumps(record)
    else:
        line = coloured(one_line(f"featcache: {type(error).__name__}: {message}"), sys.stderr)
    with contextlib.suppress(OSError):  # stderr may be full as well
        print(line, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    return code
