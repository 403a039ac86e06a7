"""ImageNet's classes and prompt templates, from the libraries that ship them, and the 200-class subsets.

A subset is the class list of a data set with 200 of the 1,000 classes, which is evaluated among these 200 only.
"""

from collections.abc import Sequence
from functools import cache

from featcache.errors import DatasetError, PromptError
from featcache.prompts.text_files import packaged_json


def load_subset(name: str) -> tuple[int, ...]:
    """Indices of a subset's classes among ImageNet's 1,000, ascending; PromptError for an unknown subset.

    Label i of the data set (folders of WordNet ids, sorted) is class ``load_subset(name)[i]``. The lists are from the
    authors' evaluation scripts, named in ``imagenet_subsets.json``.

    Parameters
    ----------
    name : ``imagenet-r`` (Hendrycks et al., arXiv:2006.16241) or ``imagenet-a`` (arXiv:1907.07174)

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
    return {name: tuple(entry["indices"]) for name, entry in packaged_json("imagenet_subsets.json").items()}


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in label order, from timm.

    >>> imagenet_wnids()[:2], len(imagenet_wnids())
    (('n01440764', 'n01443537'), 1000)
    """
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 ImageNet class names of open_clip, in label order; two names occur twice.

    >>> imagenet_names()[:2]
    ('tench', 'goldfish')
    """
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


def openai_imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 ImageNet templates, with ``{}`` for the class name."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def subset_wnids(subset: str) -> tuple[str, ...]:
    """The WordNet ids of a subset's classes (``imagenet-r``, ``imagenet-a``), in label order.

    >>> subset_wnids("imagenet-r")[:2]
    ('n01443537', 'n01484850')
    """
    return tuple(imagenet_wnids()[number] for number in load_subset(subset))


def subset_names_of(subset: str) -> tuple[str, ...]:
    """The class names of a subset, in label order."""
    return tuple(imagenet_names()[number] for number in load_subset(subset))


def subset_labels(subset: str, numbers: Sequence[int]) -> tuple[list[int], tuple[str, ...]]:
    """Labels of a subset, from labels among the 1,000 classes, and its class names; DatasetError for another class.

    >>> subset_labels("imagenet-r", [2, 1])[0]
    [1, 0]
    """
    place = {number: label for label, number in enumerate(load_subset(subset))}
    odd = next((number for number in numbers if number not in place), None)
    if odd is not None:
        raise DatasetError(
            f"label {odd} is not one of the {len(place)} classes of {subset}; check which data set it is"
        )
    return [place[number] for number in numbers], subset_names_of(subset)
