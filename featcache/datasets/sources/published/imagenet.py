"""``imagenet:DIR`` and its shifted versions: folders of WordNet ids, with the usual class indices and names.

=========================== ====================================================== ==================================
source                      images                                                 classes
=========================== ====================================================== ==================================
``imagenet:DIR``            ``DIR/<split>/<WordNet id>/``; for ``val`` also        1,000
                            ``val_in_folder`` and ``validation``
``imagenet:sketch:DIR``     ``DIR/<WordNet id>/`` (ImageNet-Sketch)                1,000
``imagenet:v2:DIR``         ``DIR/<class index>/`` (ImageNetV2: 0 to 999)          1,000
``imagenet:r:DIR``          ``DIR/<WordNet id>/`` (ImageNet-R)                     its 200: `load_subset` of imagenet-r
``imagenet:a:DIR``          ``DIR/<WordNet id>/`` (ImageNet-A)                     its 200: `load_subset` of imagenet-a
``imagenet:objectnet:DIR``  ``DIR/images/<folder>/``, also with ``DIR/mappings/``  the 113 that ImageNet knows
=========================== ====================================================== ==================================

The shifted versions have one split, ``test`` (or ``all``). Class indices do not depend on which folders exist;
ImageFolder would number a part of ImageNet from 0, and sort ImageNetV2's folders as strings: 0, 1, 10, 100, 101, ... A
folder that is not a class is an error, except for ObjectNet's 200 classes outside ImageNet.

``,names=wise-ft`` behind DIR names the data sets as in WiSE-FT's results: ``ImageNetV2`` and so on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from featcache.datasets.files import ImageFiles, files_below, local_path
from featcache.datasets.options import WHOLE, SourceOptions, default_name
from featcache.datasets.sources.image_folder import class_folder_index, class_folders, split_folder
from featcache.errors import DatasetError
from featcache.parameters import OneOf
from featcache.prompts.imagenet import imagenet_names, imagenet_wnids, subset_names_of, subset_wnids
from featcache.prompts.objectnet import has_mappings, load_objectnet, shared_classes

SHIFTED = {kind: f"imagenet-{kind}" for kind in ("sketch", "v2", "r", "a")}
VERSIONS = {"": "imagenet", **SHIFTED, "objectnet": "objectnet"}
"""Prefix of DIR -> the data set's name."""

RESULTS = ("ImageNet", "ImageNetSketch", "ImageNetV2", "ImageNetR", "ImageNetA", "ObjectNet")
WISE_FT = dict(zip(VERSIONS, RESULTS, strict=True))
"""Prefix of DIR -> the data set's name in WiSE-FT's results."""

RESULTS_NAMES = {VERSIONS[kind]: name for kind, name in WISE_FT.items()}
"""The data set's name -> its name in WiSE-FT's results."""


@dataclass(frozen=True)
class ImageNetOptions(SourceOptions):
    """Options of ``imagenet:``.

    Parameters
    ----------
    names : whose names the data sets have in results, such as WiSE-FT's ``ImageNetV2``
    """

    names: Annotated[str, OneOf("wise-ft")] | None = None


def open_imagenet(argument: str, split: str, options: ImageNetOptions, *, name: str | None = None) -> ImageFiles:
    """Open one split of ImageNet, or a shifted version of it; the default name is one of `VERSIONS` or `WISE_FT`."""
    first, colon, rest = argument.partition(":")
    kind, place = (first, rest) if colon and first in VERSIONS else ("", argument)
    usual = WISE_FT[kind] if options.names else VERSIONS[kind]
    base = local_path("imagenet", place)
    if not base.is_dir():
        raise DatasetError(
            f"imagenet:{argument}: {base} is not a folder; expected DIR, or one of {_known()} before DIR"
        )
    label, classnames = _classes(kind, base)
    root = _root(kind, base, split)
    found = class_folders(root)
    unknown = [folder for folder in found if folder not in label]
    if unknown and kind != "objectnet":
        raise DatasetError(
            f"{root}: {', '.join(unknown[:5])} {'is' if len(unknown) == 1 else 'are'} no class of {VERSIONS[kind]}, "
            f"expected folders such as {next(iter(label))}: check DIR and the version ({_known()} before DIR)"
        )
    index = class_folder_index(root, label, classnames, [folder for folder in found if folder in label])
    return files_below(default_name(name or usual), split, index, root)


def _known() -> str:
    return ", ".join(f"{kind}:" for kind in VERSIONS if kind)


def _classes(kind: str, base: Path) -> tuple[Mapping[str, int], Sequence[str]]:
    """Class folder -> label, and the class names."""
    if kind == "objectnet":
        mapping = load_objectnet(base) if has_mappings(base) else shared_classes()
        folders, names = mapping.folders, mapping.classnames
    elif kind in ("r", "a"):
        folders, names = subset_wnids(VERSIONS[kind]), subset_names_of(VERSIONS[kind])
    else:
        folders, names = tuple(map(str, range(1000))) if kind == "v2" else imagenet_wnids(), imagenet_names()
    return {folder: number for number, folder in enumerate(folders)}, names


def _root(kind: str, base: Path, split: str) -> Path:
    if kind == "":
        return split_folder(base, split)
    if split not in ("test", WHOLE):
        raise DatasetError(f"{base}: {VERSIONS[kind]} has one split; expected 'test' or 'all', got {split!r}")
    return base / "images" if kind == "objectnet" and (base / "images").is_dir() else base
