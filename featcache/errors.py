"""Every error that featcache raises on purpose: what was got, what was expected, what to do.

Each class carries the exit code of the command line:

==== =====================================================================
code meaning
==== =====================================================================
0    done
1    an unexpected failure (a bug: please report it)
2    bad input: arguments, data set, images, model, prompts
3    a store is missing or not finished: run the same encode command again
4    stored bytes are damaged: `verify` names the chunks
5    a mismatch is refused: other encoder, other class list, edited labels
129  ended by SIGHUP: what was finished is kept
130  ended by Ctrl-C (SIGINT), likewise
141  the reader of the output has gone (``| head``)
143  ended by SIGTERM, as Slurm sends it: what was finished is kept
==== =====================================================================

Errors of the system (a full disk, too few open files) and of memory become one line too: `explain`.
"""

import errno
import os


class FeatcacheError(Exception):
    """Base class of all errors below; `exit_code` is what the command line returns."""

    exit_code = 2


class FeatcacheWarning(UserWarning):
    """What a user should know and no one need act upon; the command line shows it as one line on stderr."""


class DatasetError(FeatcacheError, ValueError):
    """A data set that cannot be read as described: wrong layout, split, labels or class names."""


class ImageReadError(DatasetError):
    """Images that cannot be decoded; the message names them."""


class PromptError(FeatcacheError, ValueError):
    """Class names, templates or a prompt file that do not fit together."""


class EncoderError(FeatcacheError, ValueError):
    """A model that cannot be loaded as described."""


class ActivationMismatchError(EncoderError):
    """OpenAI weights without QuickGELU (four ImageNet points lost silently), or the reverse."""


class HeadError(FeatcacheError, ValueError):
    """A head that cannot be fitted, combined or evaluated as asked."""


class MissingExtraError(FeatcacheError, ImportError):
    """An optional library that was asked for by name is not installed."""


class StoreNotFoundError(FeatcacheError, FileNotFoundError):
    """No store at that place, or no store of that name."""

    exit_code = 3


class StoreIncompleteError(FeatcacheError):
    """A store without a manifest: encoding has not finished."""

    exit_code = 3


class ShardDoneError(StoreIncompleteError):
    """One shard of an encode job has done its part; other shards are still to finish the store."""

    exit_code = 0


class StoreWriteError(FeatcacheError, OSError):
    """A file of a store cannot be written: the disk is full or read-only, or the object store refuses."""


class StoreCorruptError(FeatcacheError):
    """Stored bytes differ from the checksums taken when they were written."""

    exit_code = 4


class StoreSchemaError(StoreCorruptError):
    """A store whose layout is that of another version of featcache; it is left as it is."""


class OutputError(FeatcacheError, OSError):
    """A file that was asked for cannot be written: no regular file, no room, no right to write there."""


class MismatchError(FeatcacheError, ValueError):
    """Two things that do not belong together: head and store, text store and image store."""

    exit_code = 5


class LabelsChangedError(MismatchError):
    """The labels of the source differ from those of the store."""


class ContentChangedError(MismatchError):
    """Source files changed after they were encoded, with the same ids and sizes."""


class TrainingError(FeatcacheError, ValueError):
    """A training run, a loss or a schedule that cannot be set up as asked."""


class DivergedError(TrainingError):
    """A loss or gradient that is NaN or infinite; checkpoints made before it are kept."""


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
"""What to do about a failed call of the system."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""Failures of the machine, not of the file that was opened."""


def explain(error: OSError, place: object = None, needed: int | None = None) -> str:
    """A failed call of the system in one line: the file, what went wrong, what it needs, what to do.

    Parameters
    ----------
    place : the file, where the error does not name it
    needed : bytes that were to be written

    Examples
    --------
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
