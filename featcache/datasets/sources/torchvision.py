"""``torchvision:CLASS:ROOT``: torchvision's labelled image data sets on disk.

CLASS is a name in ``torchvision.datasets``: ``CIFAR10``, ``MNIST``, ``Food101``, ``DTD``, ``GTSRB``, ... The split is
passed as ``split=``, or, as ``train`` or ``test``, for ``train=``; it is ``all`` for a class with neither. Other
arguments of the class follow ROOT: ``torchvision:EMNIST:ROOT,split=letters``. `declared_options` are their names and
types. Nothing is downloaded without ``download=yes``.

Content. If the class lists image files, these are read directly, after a check that the first decodes to the image that
the class returns. Otherwise a sample's content is the mode, size and pixels of the returned image.

Class order. The class's ``classes``, else "0", "1", ... up to the largest label. ``ROOT/classes.txt`` renames the
classes, in the order of the labels, or reorders them if it has the same names.
"""

import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from featcache.datasets.base import SampleIndex
from featcache.datasets.classes import listed_beside
from featcache.datasets.decode import decode_image, to_rgb
from featcache.datasets.files import ImageFiles, file_index, local_path, read_regular, size_and_stamp
from featcache.datasets.options import WHOLE, default_name, split_options
from featcache.datasets.pictures import PictureDataset, to_content
from featcache.errors import DatasetError, ImageReadError
from featcache.parameters import Parameter, parameters_of

FILE_LISTS = ("samples", "_samples", "_image_files", "_images", "images", "data")
LABEL_LISTS = ("targets", "_labels", "labels", "y", "samples", "_samples")
VisionData: TypeAlias = Any
"""A torchvision data set; their only common interface is ``len`` and indexing."""


def open_torchvision(argument: str, split: str, *, name: str | None = None) -> ImageFiles | PictureDataset:
    """Open one split of a torchvision data set; the default name is that of the class in lower case."""
    kind, colon, rest = argument.partition(":")
    place, options = split_options("torchvision", rest, None)
    if not colon or not place:
        raise DatasetError(f"torchvision:{argument}: expected torchvision:CLASS:ROOT, such as torchvision:CIFAR10:DIR")
    root = local_path("torchvision:" + kind, place)
    source = _make(kind, root, split, options)
    title = name or default_name(kind.lower())
    found = files_of(source, root, split, title)
    if found is not None:
        return replace(found, index=listed_beside(found.index, root))
    index = _picture_index(source, kind, split, argument)
    return PictureDataset(title, split, listed_beside(index, root), lambda row: source[row][0])


def files_of(source: VisionData, root: Path, split: str, name: str) -> ImageFiles | None:
    """The image files of an opened torchvision data set; None if it lists none, or returns other images.

    Sample ids are paths below `root`.
    """
    paths = _files(source, root)
    if not paths:
        return None
    ids = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    files = [size_and_stamp(Path(path)) for path in paths]
    return ImageFiles(name, split, _index(source, ids, files), lambda row: read_regular(paths[row]))


def _index(source: VisionData, ids: Sequence[str], files: Sequence[tuple[int, int]]) -> SampleIndex:
    labels = _labels(source)
    names = listed_classes(source) or [str(number) for number in range(max(labels, default=-1) + 1)]
    return file_index(ids, files, labels, names)


def _factory(kind: str) -> VisionData:
    from torchvision import datasets

    factory = getattr(datasets, kind, None)
    if not inspect.isclass(factory) or not issubclass(factory, datasets.VisionDataset):
        known = [name for name in datasets.__all__ if isinstance(getattr(datasets, name), type)]
        raise DatasetError(f"torchvision:{kind}: no such data set; expected one of {', '.join(known)}")
    return factory


def declared_options(argument: str) -> dict[str, Parameter]:
    """The options of ``CLASS:ROOT``: what the constructor of the class takes, and bases that it passes ``**kwargs`` to.

    Functions, such as transforms, cannot be given in text.
    """
    declared: dict[str, Parameter] = {}
    for base in _factory(argument.partition(":")[0]).__mro__:
        found = {name: one.given for name, one in parameters_of(base).items() if not _is_internal(one)}
        declared |= found | declared
        if not any(one.kind is one.VAR_KEYWORD for one in inspect.signature(base).parameters.values()):
            break
    return declared


def _is_internal(parameter: Parameter) -> bool:
    return parameter.name in ("root", "args", "kwargs") or parameter.name[0] == "_" or "Callable" in str(parameter.kind)


def _make(kind: str, root: Path, split: str, options: dict[str, str]) -> VisionData:
    factory = _factory(kind)
    accepted, declared = inspect.signature(factory).parameters, declared_options(kind)
    if unknown := sorted(options.keys() - declared.keys()):
        raise DatasetError(
            f"torchvision:{kind}: takes no {', '.join(unknown)}; expected {', '.join(declared) or 'no option'}"
        )
    try:
        given = {name: declared[name].check(declared[name].parsed(text)) for name, text in options.items()}
    except ValueError as error:
        raise DatasetError(f"torchvision:{kind}: option {error}") from None
    given |= _split_arguments(kind, split, set(accepted) - set(given))
    if "root" in accepted:
        given["root"] = str(root)
    try:
        return factory(**given)
    except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
        raise DatasetError(
            f"torchvision:{kind}:{root}: split {split!r} cannot be opened ({error}); check the folder and split, "
            "or let the class fetch its files with ,download=yes"
        ) from error


def _split_arguments(kind: str, split: str, accepted: set[str]) -> dict[str, object]:
    if "split" in accepted:
        return {"split": split}
    if "train" in accepted:
        if split not in ("train", "test"):
            raise DatasetError(f"torchvision:{kind}: split {split!r}; expected train or test")
        return {"train": split == "train"}
    if split != WHOLE:
        raise DatasetError(f"torchvision:{kind}: has no splits; pass 'all'")
    return {}


def _files(source: VisionData, root: Path) -> list[str]:
    """The image files that a data set lists, if the first decodes to the image that it returns; else none."""
    for attribute in FILE_LISTS:
        listed = getattr(source, attribute, None)
        if not isinstance(listed, list | tuple) or len(listed) != len(source) or not listed:
            continue
        paths = [item[0] if isinstance(item, tuple | list) and item else item for item in listed]
        if all(isinstance(path, str | os.PathLike) for path in paths):
            absolute = [os.path.join(root, path) for path in paths]
            return absolute if _same_picture(source, absolute[0]) else []
    return []


def _same_picture(source: VisionData, path: str) -> bool:
    try:
        ours = to_rgb(decode_image(Path(path).read_bytes(), path))
        theirs = to_rgb(source[0][0])
    except (OSError, ImageReadError):
        return False
    return np.array_equal(np.asarray(ours), np.asarray(theirs))


def _labels(source: VisionData) -> list[int]:
    """The labels, without opening images if the class lists them."""
    for attribute in LABEL_LISTS:
        listed = getattr(source, attribute, None)
        if listed is None or len(listed) != len(source):
            continue
        values = [item[-1] if isinstance(item, tuple) else item for item in listed]
        if all(_is_whole(value) for value in values) and _same_label(source, values):
            return [int(value) for value in values]
    labels = []
    for row in range(len(source)):
        target = source[row][1]
        if not _is_whole(target):
            where = f"torchvision:{type(source).__name__}: sample {row}"
            raise DatasetError(f"{where} has the target {target!r:.60}; expected a class index")
        labels.append(int(target))
    return labels


def _same_label(source: VisionData, values: Sequence[int]) -> bool:
    """Whether listed labels agree with the returned ones, at the first and last sample."""
    try:
        return all(
            _is_whole(source[row][1]) and int(source[row][1]) == int(values[row]) for row in {0, len(values) - 1}
        )
    except OSError:
        return True  # an unreadable image is reported when it is encoded


def _is_whole(value: VisionData) -> bool:
    scalar = getattr(value, "ndim", None) == 0
    return isinstance(value, int | np.integer) or (scalar and float(value).is_integer())


def listed_classes(source: VisionData) -> list[str]:
    """The class names that a data set lists, in label order; none if it lists none."""
    names = getattr(source, "classes", None) or ()
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]


def _picture_index(source: VisionData, kind: str, split: str, where: str) -> SampleIndex:
    """An index with row ids; sizes come from the array of all images, or else from the images."""
    rows = range(len(source))
    if not rows:
        raise DatasetError(f"torchvision:{where}: no sample in split {split!r}")
    shape = getattr(getattr(source, "data", None), "shape", None)
    uniform = shape is not None and len(shape) >= 3 and shape[0] == len(source)
    first = len(to_content(source[0][0]))
    sizes = [first] * len(rows) if uniform else [len(to_content(source[row][0])) for row in rows]
    return _index(source, [f"{kind}/{split}/{row:07d}" for row in rows], [(size, 0) for size in sizes])
