"""The errors that featcache raises. Messages say what was got, what was expected, and what to do.

Each class has an exit code for the command line:

==== =====================================================================
code meaning
==== =====================================================================
0    success
1    an unexpected failure (a bug: please report it)
2    bad input: arguments, data set, images, model, prompts
3    a store is missing or not finished: run the same encode command again
4    stored bytes are damaged: `verify` names the chunks
5    a mismatch: different encoder or class list, edited labels
129  ended by SIGHUP; finished work is kept
130  ended by Ctrl-C (SIGINT), likewise
141  the output pipe was closed (``| head``)
143  ended by SIGTERM, as sent by Slurm; finished work is kept
==== =====================================================================

System errors (a full disk, too many open files) and memory errors become one line as well, see `explain`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class FeatcacheError(Exception):
    """Base class of all errors below; `exit_code` is what the command line returns."""

    exit_code = 2


class FeatcacheWarning(UserWarning):
    """A warning that requires no action; the command line prints it as one line on stderr."""


class DatasetError(FeatcacheError, ValueError):
    """A data set with a wrong layout, split, labels or class names."""


class ImageReadError(DatasetError):
    """Images that cannot be decoded; the message names them."""


class PromptError(FeatcacheError, ValueError):
    """Class names, templates or a prompt file that are invalid or do not match."""


class EncoderError(FeatcacheError, ValueError):
    """A model that cannot be loaded."""


class ActivationMismatchError(EncoderError):
    """OpenAI weights without QuickGELU (which silently costs four points on ImageNet), or the reverse."""


class HeadError(FeatcacheError, ValueError):
    """A head that cannot be fitted, combined or evaluated as requested."""


class MissingExtraError(FeatcacheError, ImportError):
    """A required optional library is not installed."""


@contextmanager
def needs(message: str) -> Iterator[None]:
    """Turns the ImportError of an optional library into a MissingExtraError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(message) from error


class StoreNotFoundError(FeatcacheError, FileNotFoundError):
    """No store with this path or name."""

    exit_code = 3


class StoreIncompleteError(FeatcacheError):
    """A store without a manifest: encoding has not finished."""

    exit_code = 3


class ShardDoneError(StoreIncompleteError):
    """One shard of an encode job is done, and others have yet to finish the store."""

    exit_code = 0


class StoreWriteError(FeatcacheError, OSError):
    """A file of a store cannot be written: the disk is full or read-only, or the object store refuses."""


class StoreCorruptError(FeatcacheError):
    """Stored files are damaged: they differ from their checksums."""

    exit_code = 4


class StoreSchemaError(StoreCorruptError):
    """A store written by an incompatible version of featcache; it is never changed."""


class OutputError(FeatcacheError, OSError):
    """An output file cannot be written: not a regular file, disk full, no permission."""


class MismatchError(FeatcacheError, ValueError):
    """Objects that are incompatible: head and store, text store and image store."""

    exit_code = 5


class LabelsChangedError(MismatchError):
    """The labels of the source differ from those of the store."""


class ContentChangedError(MismatchError):
    """Source files changed after encoding, with the same ids and sizes."""


class TrainingError(FeatcacheError, ValueError):
    """A training run, a loss or a schedule with invalid settings."""


class DivergedError(TrainingError):
    """A loss or gradient is NaN or infinite; earlier checkpoints are kept."""


_REMEDIES = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room within your quota, or name another place",
    errno.EFBIG: "name a place that takes larger files, or raise the limit (ulimit -f)",
    errno.EROFS: "name a place that can be written to",
    errno.EMFILE: "allow more open files (ulimit -n 4096), or lower --workers",
    errno.ENFILE: "close other programs: the whole machine has too many open files",
    errno.ENOMEM: "free some memory, or lower --batch-size and --workers",
    errno.EAGAIN: "end other processes, or raise the limits of this one (ulimit -a)",
    errno.EACCES: "get the right to read and write there, or name another place",
    errno.EPERM: "get the right to read and write there, or name another place",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead in a circle: name the file itself",
}
"""What to do about a system error."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""Errors caused by the machine's limits rather than by the file."""


def explain(error: OSError, place: object = None, needed: int | None = None) -> str:
    """A system error in one line: the file (`place`, or as the error names it), the error, bytes `needed`, what to do.

    >>> explain(OSError(errno.ENOSPC, "No space left on device", "head.safetensors"), needed=1_000_000)
    'head.safetensors: No space left on device, 1,000,000 bytes are needed; make room there, or name another place'
    >>> explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.toml"))
    'a.toml: No such file or directory; check the path'
    """
    if error.errno is None:
        return str(error)
    named = place if place is not None else error.filename
    where = "" if named is None else f"{os.fsdecode(named) if isinstance(named, bytes) else named}: "
    need = "" if needed is None else f", {needed:,} bytes are needed"
    return f"{where}{error.strerror or os.strerror(error.errno)}{need}; {_REMEDIES.get(error.errno, 'check the path')}"
