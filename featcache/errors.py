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
==== =====================================================================

The errors of training that no other part of featcache has.
"""


class FeatcacheError(Exception):
    """Base class of all errors below; `exit_code` is what the command line returns."""

    exit_code = 2


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
