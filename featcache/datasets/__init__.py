"""Labelled images from many sources: one file per source, one line in `DATASETS`.

>>> data = open_dataset("digits:sketch", "test")
>>> data.name, len(data.index), data.index.classnames[:3]
('digits-sketch', 500, ('zero', 'one', 'two'))
"""

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from featcache.datasets.base import Dataset, Picture, SampleIndex, dataset_key, empty_classes, warn_empty_classes
from featcache.datasets.classes import ClassOptions, relabelled
from featcache.datasets.holdout import Holdout, divided
from featcache.datasets.options import SourceOptions, check_split, read_options, take_options
from featcache.errors import DatasetError
from featcache.parameters import Parameter, Plugins, parameters_of
from featcache.prompts.class_lists import load_class_list
from featcache.store.columns import labels_digest, metadata_digest

__all__ = [
    "DATASETS",
    "Dataset",
    "Picture",
    "SampleIndex",
    "dataset_key",
    "labels_digest",
    "metadata_digest",
    "open_dataset",
    "open_datasets",
]

DATASETS: Plugins[Callable[..., Dataset]] = Plugins(
    {
        "arrays": "featcache.datasets.sources.arrays:open_arrays",
        "cifar": "featcache.datasets.sources.published.cifar:open_cifar",
        "coco": "featcache.datasets.sources.detection.coco:open_coco",
        "collection": "featcache.datasets.sources.collection:open_domain",
        "coop": "featcache.datasets.sources.published.coop:open_coop",
        "digits": "featcache.datasets.sources.published.digits:open_digits",
        "hf": "featcache.datasets.sources.huggingface:open_huggingface",
        "imagefolder": "featcache.datasets.sources.image_folder:open_image_folder",
        "imagenet": "featcache.datasets.sources.published.imagenet:open_imagenet",
        "list": "featcache.datasets.sources.list_file:open_list_file",
        "table": "featcache.datasets.sources.table:open_table",
        "tfds": "featcache.datasets.sources.tfds:open_tfds",
        "torchvision": "featcache.datasets.sources.torchvision:open_torchvision",
        "vid-robust": "featcache.datasets.sources.video.vid_robust:open_vid_robust",
        "wilds": "featcache.datasets.sources.published.wilds:open_wilds",
        "voc": "featcache.datasets.sources.detection.voc:open_voc",
        "webdataset": "featcache.datasets.sources.webdataset:open_webdataset",
        "ytbb-robust": "featcache.datasets.sources.video.ytbb_robust:open_ytbb_robust",
    }
)
"""Source -> ``opener(argument, split, options, *, name, labels) -> Dataset``, which raises DatasetError for any fault
of the data. An opener without ``labels`` names the classes itself. ``options``, if it has any, are a dataclass
of `SourceOptions`, which declares them."""

SIGNATURES: Plugins[Callable[[str], dict[str, Parameter]]] = Plugins(
    {"torchvision": "featcache.datasets.sources.torchvision:declared_options"}
)
"""Sources whose options depend on the argument, with a function of it that returns them."""

DOMAINS: Plugins[Callable[..., list[Dataset]]] = Plugins(
    {"collection": "featcache.datasets.sources.collection:open_collection"}
)
"""Sources with a second opener, which returns a list with one data set per domain."""

NUMBERED = frozenset({"arrays", "coop", "hf", "tfds", "torchvision", "webdataset"})
"""Sources with their own class numbering: a list with the same number of names renames the classes."""

SOURCE_OF_FILE = {
    **dict.fromkeys((".txt", ".lst", ".list"), "list"),
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".jsonl"), "table"),
    ".tar": "webdataset",
}
"""File suffix -> the source to suggest."""


def open_dataset(spec: str, split: str, *, labels: str = "names", name: str | None = None) -> Dataset:
    """Open one split of a data set.

    Parameters
    ----------
    spec : ``source:argument``; the module of each source describes its argument:

        ``imagefolder:DIR``             one folder per class (`image_folder`)
        ``list:FILE``                   lines of path and label (`list_file`)
        ``table:FILE``                  Parquet, CSV, TSV or JSON lines, with metadata columns (`table`)
        ``coop:FILE``                   CoOp's split files of few-shot papers (`coop`)
        ``arrays:DIR``                  numpy files (`arrays`)
        ``webdataset:PATTERN``          tar shards, local or at http and s3 addresses (`webdataset`)
        ``hf:PLACE``                    Hugging Face data sets (`huggingface`)
        ``torchvision:CLASS:ROOT``      torchvision's data sets (`torchvision`)
        ``tfds:NAME:DIR``               TensorFlow Datasets' records (`tfds`)
        ``imagenet:DIR``                ImageNet, ``imagenet:v2:DIR``, sketch, r, a, objectnet (`imagenet`)
        ``cifar:10.1:DIR``              CIFAR-10.1 and CIFAR-10.2 (`cifar`)
        ``collection:NAME:ROOT``        PACS, DomainNet, ..., with ``,domain=NAME`` (`collection`)
        ``vid-robust:DIR``              ImageNet-Vid-Robust's frames (`vid_robust`)
        ``ytbb-robust:DIR``             YTBB-Robust's frames (`ytbb_robust`)
        ``coco:IMAGES,annotations=FILE``  categories of COCO's instances (`coco`)
        ``voc:DIR``                     PASCAL VOC (`voc`)
        ``wilds:NAME:DIR``              FMoW and iWildCam (`wilds`)
        ``digits``, ``digits:DOMAIN``   real digits on every machine (`digits`)

        Any argument may end in ``,classes=imagenet-r``, a class list by name or file that replaces the source's own
        (see `featcache.datasets.classes`), and ``,holdout=0.2``, which splits data that come without splits (see
        `featcache.datasets.holdout`).
    split : ``train``, ``val``, ``test``, ...; ``all`` for class folders without splits
    labels : ``names``, or ``int`` if a list file holds class indices
    name : short name of the data set in results rows; default: the name of its folder or file

    Raises
    ------
    DatasetError
        The source is unknown (the error lists the known ones) or cannot be read.

    Examples
    --------
    >>> open_dataset("digits", "train").index.sizes.sum()
    np.int64(768000)
    """
    return _open(spec, split, labels, name, domains=False)[0]


def source_of(spec: str) -> tuple[str, str]:
    """The source, and the argument with its options; these may follow at once: ``digits,holdout=0.2``."""
    source = re.split("[:,]", spec, maxsplit=1)[0]
    return source, spec[len(source) :].removeprefix(":")


def options_of(source: str) -> type[SourceOptions]:
    """The options of a source, which its opener declares; the base, which has none, if it takes none."""
    declared = parameters_of(DATASETS[source]).get("options")
    return SourceOptions if declared is None else declared.kind


def _open(spec: str, split: str, labels: str, name: str | None, *, domains: bool) -> list[Dataset]:
    """The data sets of a specification; those on this machine record how to open them again."""
    source, argument = source_of(spec)
    if source not in DATASETS:
        raise _unknown(spec, source)
    opener: Callable[..., Dataset | list[Dataset]]
    opener = DOMAINS[source] if domains and source in DOMAINS else DATASETS[source]
    accepted = parameters_of(opener)
    if labels not in ("names", "int"):
        raise DatasetError(f"labels={labels!r}: expected 'names' or 'int'")
    if labels == "int" and "labels" not in accepted:
        raise DatasetError(f"labels={labels!r}: {source} names its classes itself; integer labels are for list:FILE")
    settings: dict[str, object] = {"name": name, "labels": labels} if "labels" in accepted else {"name": name}
    has_classes = source == "torchvision" and argument.startswith("LSUN:")  # LSUN itself takes classes=
    argument, options = take_options(
        argument, parameters_of(Holdout) | ({} if has_classes else parameters_of(ClassOptions))
    )
    listed = load_class_list(options.pop("classes")) if "classes" in options else None
    holdout = Holdout.of_options(options)
    of = check_split(holdout.holdout_of if holdout else split)
    if "options" in accepted:
        argument, settings["options"] = read_options(source, argument, accepted["options"].kind)
    found = opener(argument, of, **settings)
    opened = found if isinstance(found, list) else [found]
    record = {"spec": spec, "labels": labels, "name": name, "folder": os.getcwd()}
    opened_as = None if "://" in spec else record  # an address may hold credentials
    datasets: list[Dataset] = []
    for before in opened:
        index = relabelled(before.index, listed, numbered=source in NUMBERED) if listed else before.index
        data: Dataset = replace(before, index=index, opened_as=opened_as)  # type: ignore[type-var]
        if empty_classes(before.index):  # a list of more classes than the source has is no cause for a warning
            warn_empty_classes(index, f"{spec} split {split}" if len(opened) == 1 else data.name)
        datasets.append(divided(data, split, holdout) if holdout else data)
    return datasets


def _unknown(spec: str, source: str) -> DatasetError:
    """The error for a specification without a known source, such as a path alone."""
    path = Path(spec).expanduser()
    try:
        meant = "imagefolder" if path.is_dir() else SOURCE_OF_FILE.get(path.suffix.lower()) if path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        meant = None
    if meant:
        what = "a folder" if meant == "imagefolder" else "a file"
        return DatasetError(f"{spec!r} is {what}, without a source; did you mean {meant}:{spec}?")
    first, dash, rest = spec.partition("-")
    as_stored = [f"{first}:{rest}"] if dash and first in DATASETS else []  # the name in results and stores
    near = as_stored or difflib.get_close_matches(source, DATASETS, n=1, cutoff=0.6)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return DatasetError(
        f"{spec!r}: unknown source {source!r}{hint} Expected source:argument, "
        f"with one of the sources {', '.join(sorted(DATASETS))}"
    )


def open_datasets(spec: str, split: str, *, labels: str = "names", name: str | None = None) -> list[Dataset]:
    """Open one split of a data set, or of every domain of a collection.

    Parameters
    ----------
    spec, split, labels, name
        As in `open_dataset`; ``collection:NAME:ROOT`` opens one data set per domain, named ``name-domain``. Every other
        source gives a list of one.

    Examples
    --------
    >>> [data.name for data in open_datasets("digits", "val")]
    ['digits']
    """
    return _open(spec, split, labels, name, domains=True)
