"""The arguments ``--class-subset`` and ``--projection``, for one data set or for all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import HeadError
from featcache.prompts import load_classnames, load_objectnet, load_subset, subset_names
from featcache.prompts.objectnet import shared_classes

if TYPE_CHECKING:
    from heads.evaluation.passes import ClassSubset
    from heads.evaluation.projections import Projection

IMAGENET = 1000  # number of classes that the named subsets refer to
ALL = ""  # key for every data set; no data set has this name


def class_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--class-subset`` and ``--projection``."""
    parser.add_argument(
        "--class-subset",
        nargs="+",
        default=[],
        metavar="[DATA=]NAME",
        help=f"evaluate these classes only: {', '.join(subset_names())}, or a file of class names; with DATA= for "
        "that data set (may be repeated), otherwise for all",
    )
    parser.add_argument(
        "--projection",
        nargs="+",
        default=[],
        metavar="[DATA=]FILE",
        help='merge classes, each with the largest logit of its members: JSON {"new": [index or name, ...], '
        "...}, or objectnet (objectnet:DIR with ObjectNet's own mapping files), vid-robust:DIR, "
        "ytbb-robust:DIR[,labels=DIR]",
    )


def class_subset(
    args: argparse.Namespace, classnames: Sequence[str], names: Sequence[str], head: str = "the head"
) -> ClassSubset:
    """The value of both arguments for `heads.evaluate`.

    `classnames` are those of the heads, `names` those of the data sets, and `head` is a name for errors. HeadError for
    an unknown name or data set, or two values for one data set.
    """
    found: dict[str, Sequence[int] | Projection] = {}
    for flag, given in (("--class-subset", args.class_subset), ("--projection", args.projection)):
        for text in given:
            data, equals, what = text.partition("=")
            if not equals or ":" in data:  # the equals sign of a source's option
                data, what = ALL, text
            elif data not in names:
                raise HeadError(f"{flag} {text}: no data set {data!r} among {', '.join(names)}")
            if data in found:
                raise HeadError(f"{flag} {text}: {data or 'every data set'} has a class subset or projection already")
            found[data] = _projection(what) if flag == "--projection" else _subset(what, classnames, head)
    if ALL in found and len(found) > 1:
        raise HeadError("a class subset for all data sets, and one for a single one: name the data set for each")
    return found.get(ALL, found or None)


def _projection(what: str) -> Projection:
    from heads.evaluation.projections import Projection, load_projection

    name, colon, folder = what.partition(":")
    if name == "objectnet":
        mapping = load_objectnet(folder) if colon else shared_classes()
        return Projection(mapping.classnames, mapping.imagenet)
    if colon and name == "vid-robust":
        from featcache.datasets.sources.video.vid_robust import folder_of, vid_classes

        return Projection(*vid_classes(folder_of(folder)))
    if colon and name == "ytbb-robust":
        from featcache.datasets.options import read_options
        from featcache.datasets.sources.video.ytbb_robust import YtbbOptions, folders_of, ytbb_classes

        return Projection(*ytbb_classes(folders_of(*read_options(name, folder, YtbbOptions))[1]))
    return load_projection(what)


def _subset(name: str, classnames: Sequence[str], head: str) -> list[int]:
    from heads.fitted.provenance import subset_by_name

    if name in subset_names():
        if len(classnames) != IMAGENET:
            raise HeadError(
                f"--class-subset {name}: {name} is a subset of ImageNet's {IMAGENET:,} classes, and {head} has "
                f"{len(classnames)}; give a file of class names, or a head over all of ImageNet"
            )
        return [int(index) for index in load_subset(name)]
    if not Path(name).is_file():
        raise HeadError(f"--class-subset {name}: expected one of {', '.join(subset_names())}, or a file of class names")
    return [int(index) for index in subset_by_name(classnames, load_classnames(name))]
