"""What ``--class-subset`` and ``--projection`` mean, for one data set or for all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from featcache.errors import HeadError
from featcache.prompts import load_classnames, load_objectnet, load_subset, subset_names
from heads.evaluation.passes import ClassSubset
from heads.evaluation.projections import Projection, load_projection
from heads.fitted.base import LogitHead
from heads.fitted.provenance import subset_by_name

OBJECTNET = "objectnet:"
IMAGENET = 1000  # its classes, which the named subsets are of
ALL = ""  # a name that no data set has: meant for every one


def class_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--class-subset`` and ``--projection``."""
    parser.add_argument(
        "--class-subset",
        nargs="+",
        default=[],
        metavar="[DATA=]NAME",
        help=f"keep only these classes' logits: one of {', '.join(subset_names())}, or a file of class names; for one "
        "data set (DATA=NAME, several times) or for all",
    )
    parser.add_argument(
        "--projection",
        nargs="+",
        default=[],
        metavar="[DATA=]FILE",
        help='new classes, each the largest logit of some of the heads\': JSON {"new": [index or name, ...], ...}, or '
        "objectnet:DIR with ObjectNet's own mapping files",
    )


def class_subset(args: argparse.Namespace, head: LogitHead, names: Sequence[str]) -> ClassSubset:
    """What the two arguments say, for `heads.evaluate`.

    Parameters
    ----------
    args : with ``class_subset`` and ``projection``
    head : whose classes names are looked up among
    names : of the data sets there are

    Raises
    ------
    HeadError
        For an unknown name, a data set that is not there, or two meanings for one data set.
    """
    found: dict[str, Sequence[int] | Projection] = {}
    for flag, given, read in (
        ("--class-subset", args.class_subset, lambda name: _subset(name, head)),
        ("--projection", args.projection, _projection),
    ):
        _read_into(found, flag, given, read, names)
    if not found:
        return None
    if ALL not in found:
        return found
    if len(found) > 1:
        raise HeadError("a class subset for all data sets, and one for a single one: name the data set for each")
    return found[ALL]


def _read_into(
    found: dict[str, Sequence[int] | Projection],
    flag: str,
    given: Sequence[str],
    read: Callable[[str], Sequence[int] | Projection],
    names: Sequence[str],
) -> None:
    for text in given:
        data, equals, what = text.partition("=")
        if not equals:
            data, what = ALL, text
        elif data not in names:
            raise HeadError(f"{flag} {text}: no data set {data!r} among {', '.join(names)}")
        if data in found:
            raise HeadError(f"{flag} {text}: {data or 'every data set'} has a class subset or projection already")
        found[data] = read(what)


def _projection(what: str) -> Projection:
    if what.startswith(OBJECTNET):
        mapping = load_objectnet(what.removeprefix(OBJECTNET))
        return Projection(mapping.classnames, mapping.imagenet)
    return load_projection(what)


def _subset(name: str, head: LogitHead) -> list[int]:
    if name in subset_names():
        if len(head.classnames) != IMAGENET:
            raise HeadError(
                f"--class-subset {name}: {name} is a subset of ImageNet's {IMAGENET:,} classes, and {head.name} has "
                f"{len(head.classnames)}; give a file of class names, or a head over all of ImageNet"
            )
        return [int(index) for index in load_subset(name)]
    if not Path(name).is_file():
        raise HeadError(f"--class-subset {name}: expected one of {', '.join(subset_names())}, or a file of class names")
    return [int(index) for index in subset_by_name(head.classnames, load_classnames(name))]
