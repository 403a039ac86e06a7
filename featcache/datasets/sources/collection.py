"""``collection:NAME:ROOT``: each domain of a collection as its own data set, all with one class list.

NAME is one of `COLLECTIONS` (``pacs``, ``officehome`` or ``office-home``, ``office31``, ``vlcs``, ``domainnet``,
``terraincognita``, ``visda``), or ``domains`` for any folder of domain folders of class folders.
``,domain=real+sketch`` behind ROOT selects domains. A missing domain is an error, except for VisDA, which is often had
in part.

Domains. Folders of ROOT or of ``ROOT/kfold`` (PACS). Case, spaces, ``_`` and ``-`` in their names are ignored:
``RealWorld``, ``Real World`` and ``real_world`` are the same. ``<domain>/images/<class>`` (Office-31) is read as
``<domain>/<class>``. The data sets are named ``pacs-sketch`` and so on.

Ids start with the domain, ``sketch/dog/1.png``, so that equal names and sizes in two domains give two data sets.

Splits. ``all`` is the whole domain, as in transfer papers. Any other split is a list file ``<domain>_<split>.txt``, as
DomainNet and PACS publish them, with one line ``<domain>/<class>/<image> number`` per sample, or the folder
``<domain>/<split>/<class>``. In a list the folder is the class, and numbers and classes must correspond one to one.

Class order. ``ROOT/classes.txt`` if it exists (one folder per line, or ``folder<TAB>display name``), else the class
folders of all domains sorted by code point, as in torchvision's ImageFolder; but DomainNet as its published lists
number it, by the letters and digits of the lower-cased name. Names keep their ``_`` and capitals.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, size_and_stamp
from featcache.datasets.options import WHOLE, SourceOptions, default_name
from featcache.datasets.sources.image_folder import class_folder_index, class_folders
from featcache.datasets.sources.list_file import check_found, parse_list
from featcache.errors import DatasetError
from featcache.progress import first_few
from featcache.prompts.text_files import CLASS_FILE, read_class_file, read_lines


class Collection(NamedTuple):
    """Facts about a collection.

    Attributes
    ----------
    classes : number of classes; 0 for any
    sort_alphanumeric : classes are sorted by the letters and digits of the lower-cased name, as in DomainNet's lists
    partial : domains may be missing
    """

    domains: tuple[str, ...] = ()
    classes: int = 0
    sort_alphanumeric: bool = False
    partial: bool = False


COLLECTIONS = {
    "pacs": Collection(("art_painting", "cartoon", "photo", "sketch"), 7),
    "officehome": Collection(("Art", "Clipart", "Product", "Real World"), 65),
    "office31": Collection(("amazon", "dslr", "webcam"), 31),
    "vlcs": Collection(("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5),
    "domainnet": Collection(
        ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345, sort_alphanumeric=True
    ),
    "terraincognita": Collection(("location_38", "location_43", "location_46", "location_100"), 10),
    "visda": Collection(("train", "validation", "test"), 12, partial=True),
    "domains": Collection(),
}


@dataclass(frozen=True)
class CollectionOptions(SourceOptions):
    """Options of ``collection:``.

    Parameters
    ----------
    domain : domains to read (default: all)
    """

    domain: Sequence[str] = ()


def open_collection(
    argument: str, split: str, options: CollectionOptions, *, name: str | None = None
) -> list[ImageFiles]:
    """Open one split of every domain, in the order of `COLLECTIONS` or of ``domain=``.

    The data sets are named ``NAME-DOMAIN`` (``FOLDER-DOMAIN`` for ``domains``), and have the same class names.
    """
    kind, colon, root = argument.partition(":")
    kind = {_plain(known): known for known in COLLECTIONS}.get(_plain(kind), kind)
    if kind not in COLLECTIONS or not colon:
        raise DatasetError(
            f"collection:{argument}: expected collection:NAME:ROOT with one of the names {', '.join(COLLECTIONS)}"
        )
    base = local_path("collection:" + kind, root)
    folders = _domain_folders(base, kind)
    classes = _classes(base, kind, folders)
    prefix = name or (default_name(base.name) if kind == "domains" else kind)
    wanted = _wanted(kind, folders, options.domain, base)
    return [_open(folders[domain], split, classes, f"{prefix}-{domain}") for domain in wanted]


def open_domain(argument: str, split: str, options: CollectionOptions, *, name: str | None = None) -> ImageFiles:
    """Open one split of the domain that ``domain=`` selects; DatasetError if there are several."""
    datasets = open_collection(argument, split, options, name=name)
    if len(datasets) > 1:
        raise DatasetError(
            f"collection:{argument}: holds {len(datasets)} domains ({', '.join(d.name for d in datasets)}); expected "
            "one here: add ,domain=NAME"
        )
    return datasets[0]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _domain_folders(base: Path, kind: str) -> dict[str, Path]:
    """Domain -> folder, of the domains that exist."""
    if not base.is_dir():
        raise DatasetError(f"{base}: no such folder; expected one that holds the domains of {kind}")
    parent = base / "kfold" if kind == "pacs" and (base / "kfold").is_dir() else base
    there = {folder: parent / folder for folder in class_folders(parent)}
    if kind != "domains":
        plain = {_plain(folder): path for folder, path in there.items()}
        there = {domain: plain[_plain(domain)] for domain in COLLECTIONS[kind].domains if _plain(domain) in plain}
    if not there:
        expected = ", ".join(COLLECTIONS[kind].domains) or "folders, one per domain"
        raise DatasetError(f"{parent}: no domain of {kind} in it; expected {expected}: check the path")
    return there


def _wanted(kind: str, folders: dict[str, Path], picked: Sequence[str], base: Path) -> list[str]:
    known = {_plain(domain): domain for domain in folders}
    whole = () if COLLECTIONS[kind].partial else COLLECTIONS[kind].domains
    wanted = list(picked) or list(whole) or list(folders)
    missing = [domain for domain in wanted if _plain(domain) not in known]
    if missing:
        raise DatasetError(
            f"{base}: no domain {', '.join(missing)}; there are {', '.join(folders)}: add the missing folders, or pick "
            f"some with ,domain={'+'.join(folders)}"
        )
    return [known[_plain(domain)] for domain in wanted]


def _content(folder: Path) -> Path:
    """The folder with a domain's class folders; Office-31 has ``images`` in between."""
    return folder / "images" if class_folders(folder) == ["images"] else folder


def _classes(base: Path, kind: str, folders: dict[str, Path]) -> list[tuple[str, str]]:
    """The (folder, display name) of every class of the collection, in order."""
    if (base / CLASS_FILE).is_file():
        return read_class_file(base / CLASS_FILE)
    collection = COLLECTIONS[kind]
    names = {name for folder in folders.values() for name in class_folders(_content(folder))}
    if collection.classes and len(names) != collection.classes:
        raise DatasetError(
            f"{base}: the domains have {len(names)} class folders ({first_few(sorted(names))}), {kind} has "
            f"{collection.classes} classes: check the path; for a part of it write classes.txt there, or take "
            "collection:domains:ROOT"
        )
    ordered = sorted(names, key=lambda name: (_plain(name), name)) if collection.sort_alphanumeric else sorted(names)
    return [(name, name) for name in ordered]


def _open(folder: Path, split: str, classes: list[tuple[str, str]], name: str) -> ImageFiles:
    label = {known: number for number, (known, _) in enumerate(classes)}
    displays = [display for _, display in classes]
    listed = folder.parent / f"{folder.name}_{split}.txt"
    name = default_name(name)
    if split != WHOLE and listed.is_file():
        return _open_list(listed, split, label, displays, name)
    inner = folder if split == WHOLE else folder / split
    root = _content(inner) if inner.is_dir() else inner
    if not root.is_dir():
        raise DatasetError(f"{folder}: no split {split!r}: looked for {listed} and {root}/<class>; pass 'all'?")
    found = class_folders(root)
    unknown = sorted(set(found) - set(label))
    if unknown:
        raise DatasetError(f"{root}: folders {first_few(unknown)} are not classes of the collection; remove them")
    prefix = f"{root.relative_to(folder.parent).as_posix()}/"
    return files_below(name, split, class_folder_index(root, label, displays, found, prefix), folder.parent)


def _open_list(file: Path, split: str, label: dict[str, int], displays: list[str], name: str) -> ImageFiles:
    rows = parse_list(read_lines(file), str(file))
    labels, numbers = [], dict[str, str]()
    for row in rows:
        if "/" not in row.path:
            raise DatasetError(f"{file}:{row.line}: got {row.path!r}; expected <domain>/<class>/<image>")
        folder = row.path.split("/")[-2]
        if folder not in label:
            raise DatasetError(f"{file}:{row.line}: class {folder!r} has no folder in any domain; add it or the line")
        if numbers.setdefault(row.label, folder) != folder:
            raise DatasetError(
                f"{file}:{row.line}: number {row.label} means {numbers[row.label]!r} above and {folder!r} here; "
                "restore the published list"
            )
        labels.append(label[folder])
    if len(set(numbers.values())) != len(numbers):
        raise DatasetError(f"{file}: a class has more than one number; restore the published list")
    files = [size_and_stamp(file.parent / row.path) for row in rows]
    check_found(rows, files, file, file.parent)
    return files_below(name, split, file_index([row.path for row in rows], files, labels, displays), file.parent)
