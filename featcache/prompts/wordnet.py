"""ImageNet's 1,000 classes by WordNet id: the folder names of ImageNet and of its shifted versions."""

from collections.abc import Sequence
from functools import cache

from featcache.errors import DatasetError
from featcache.prompts.subsets import load_subset
from featcache.prompts.templates import IMAGENET, load_classnames

__all__ = ["imagenet_names", "imagenet_wnids", "subset_labels", "subset_names_of", "subset_wnids"]


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in label order, from timm.

    Examples
    --------
    >>> imagenet_wnids()[:2], len(imagenet_wnids())
    (('n01440764', 'n01443537'), 1000)
    """
    from featcache.encoders.timm_models import imagenet_synsets

    return imagenet_synsets()


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 class names of the field, in label order, from open_clip; two names occur twice.

    Examples
    --------
    >>> imagenet_names()[:2]
    ('tench', 'goldfish')
    """
    return load_classnames(IMAGENET)


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
        Where a label is no class of the subset.

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
