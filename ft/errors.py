"""The errors of training that no other part of featcache has."""

from featcache.errors import FeatcacheError

__all__ = ["DivergedError", "TrainingError"]


class TrainingError(FeatcacheError, ValueError):
    """A training run, a loss or a schedule that cannot be set up as asked."""


class DivergedError(TrainingError):
    """A loss or gradient that is NaN or infinite; checkpoints made before it are kept."""
