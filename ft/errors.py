"""The one error of training that no other part of featcache has."""

from featcache.errors import FeatcacheError

__all__ = ["TrainingError"]


class TrainingError(FeatcacheError, ValueError):
    """A training run, a loss or a schedule that cannot be set up as asked."""
