"""Class subsets: data sets that show 200 of ImageNet's 1,000 classes, and are judged among those 200 alone."""

import json
from functools import cache
from importlib.resources import files

from featcache.errors import PromptError

__all__ = ["load_subset", "subset_names"]


def load_subset(name: str) -> tuple[int, ...]:
    """Indices of a subset's classes among ImageNet's 1,000, ascending.

    Label i of the subset's data set (folders of WordNet ids, sorted) is index i of this list. The lists are those of
    the authors' evaluation scripts, named in ``imagenet_subsets.json``.

    Parameters
    ----------
    name : str
        ``imagenet-r`` (Hendrycks et al., arXiv:2006.16241) or ``imagenet-a`` (arXiv:1907.07174).

    Returns
    -------
    tuple of int

    Raises
    ------
    PromptError
        Where the subset is unknown; the known ones are listed.

    Examples
    --------
    >>> len(load_subset("imagenet-r")), load_subset("imagenet-r")[:5]
    (200, (1, 2, 4, 6, 8))
    """
    if name not in _subsets():
        raise PromptError(f"class subset {name!r}: expected one of {', '.join(subset_names())}")
    return _subsets()[name]


def subset_names() -> list[str]:
    """Names of the subsets, sorted."""
    return sorted(_subsets())


@cache
def _subsets() -> dict[str, tuple[int, ...]]:
    text = files("featcache.prompts").joinpath("imagenet_subsets.json").read_text(encoding="utf-8")
    return {name: tuple(entry["indices"]) for name, entry in json.loads(text).items()}
