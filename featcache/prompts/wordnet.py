"""ImageNet's 1,000 classes by WordNet id: the folder names of ImageNet and of its shifted versions.

Class subsets: data sets that show 200 of ImageNet's 1,000 classes, and are judged among those 200 alone.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from featcache.errors import DatasetError, PromptError


def load_subset(name: str) -> tuple[int, ...]:
    """Indices of a subset's classes among ImageNet's 1,000, ascending.

    Label i of the subset's data set (folders of WordNet ids, sorted) is index i of this list. The lists are those of
    the authors' evaluation scripts, named in ``imagenet_subsets.json``.

    Parameters
    ----------
    name : str
        ``imagenet-r`` (Hendrycks et al., arXiv:2006.16241) or ``imagenet-a`` (arXiv:1907.07174).

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


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in label order, from timm.

    Examples
    --------
    >>> imagenet_wnids()[:2], len(imagenet_wnids())
    (('n01440764', 'n01443537'), 1000)
    """
    from featcache.prompts.imagenet import imagenet_synsets

    return imagenet_synsets()


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 class names of the field, in label order, from open_clip; two names occur twice.

    Examples
    --------
    >>> imagenet_names()[:2]
    ('tench', 'goldfish')
    """
    from featcache.prompts.imagenet import imagenet_classnames

    return tuple(imagenet_classnames())


def subset_wnids(subset: str) -> tuple[str, ...]:
    """The WordNet ids of a subset's classes (``imagenet-r``, ``imagenet-a``), in label order.

    Examples
    --------
    >>> subset_wnids("imagenet-r")[:2]
    ('n01443537', 'n01484850')
    """
    return tuple(imagenet_wnids()[number] for number in load_subset(subset))


def subset_names_of(subset: str) -> tuple[str, ...]:
    """The class names of a subset, in label order."""
    return tuple(imagenet_names()[number] for number in load_subset(subset))


def subset_labels(subset: str, numbers: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
    """Labels among the 1,000 classes as labels among a subset's, and the subset's class names.

    Raises
    ------
    DatasetError
        If a label is not a class of the subset.

    Examples
    --------
    >>> subset_labels("imagenet-r", [2, 1])[0]
    [1, 0]
    """
    place = {number: label for label, number in enumerate(load_subset(subset))}
    odd = next((number for number in numbers if number not in place), None)
    if odd is not None:
        raise DatasetError(f"label {odd} is none of the {len(place)} classes of {subset}; check which data set it is")
    return [place[number] for number in numbers], subset_names_of(subset)
