"""What is behind a source's colon, ``table:cats.csv,path=file,label=breed``: options, paths, and the names from them.

Options are read from the end while the parts have the form ``name=value``, so a path may hold commas. Commas and equals
signs mean nothing to a shell: no quotes are needed.
"""

import difflib
import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from featcache.errors import DatasetError
from featcache.parameters import parameters_of

OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
REST = r"((?:,[A-Za-z_][A-Za-z0-9_]*=[^,]*)*)"
"""Further options."""
PLACEHOLDER = "{split}"
"""Stands for the split in a file name."""
WHOLE = "all"
"""The split that takes all samples, for data without splits."""


@dataclass(frozen=True)
class SourceOptions:
    """Base of the options of a source: a field for each, whose annotation says what is allowed; None if left out.

    Numbers and lists may be given as text, ``0.2`` and ``region+year``. DatasetError if a value is not allowed.
    """

    def __post_init__(self) -> None:
        for name, parameter in parameters_of(type(self)).items():
            value, declared = vars(self)[name], parameter.given
            if isinstance(value, str):
                value = declared.parsed(value)
                object.__setattr__(self, name, value)
            try:
                if value is not None and not (isinstance(value, list | tuple) and not value):
                    declared.check(value)
            except ValueError as error:
                raise DatasetError(f"option {error}") from None


Options = TypeVar("Options", bound=SourceOptions)


def read_options(source: str, argument: str, kind: type[Options]) -> tuple[str, Options]:
    """Split ``ARGUMENT,name=value,...`` into the argument and the options of a source.

    DatasetError if an option is unknown, given twice, empty, not allowed, or missing though it has no default.
    """
    declared = parameters_of(kind)
    rest, texts = split_options(source, argument, declared)
    for name, parameter in declared.items():
        if parameter.default is inspect.Parameter.empty and name not in texts:
            raise DatasetError(f"{source}:{argument}: no {name}; write {name}=VALUE behind it")
    try:
        return rest, kind(**texts)
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from None


def split_options(source: str, argument: str, known: Collection[str] | None) -> tuple[str, dict[str, str]]:
    """Split ``ARGUMENT,name=value,...`` into the argument and its options; None as `known` accepts any name.

    DatasetError if an option is unknown, given twice or empty.

    >>> split_options("table", "my, data/cats.csv,path=file,label=breed", ("path", "label"))
    ('my, data/cats.csv', {'path': 'file', 'label': 'breed'})
    """
    options: dict[str, str] = {}
    while "," in argument:
        rest, _, tail = argument.rpartition(",")
        found = OPTION.fullmatch(tail)
        if not found:
            break
        name, value = found.groups()
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise DatasetError(f"{source}: unknown option {name!r}{hint} Expected one of {', '.join(known)}")
        if name in options:
            raise DatasetError(f"{source}: option {name!r} is given twice; give it once")
        if not value:
            raise DatasetError(f"{source}: option {name!r} is empty; write {name}=VALUE, or leave it out")
        options[name], argument = value, rest
    return argument, dict(reversed(options.items()))


def take_options(argument: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Take the named options out of an argument; returns the rest and the values found.

    >>> take_options("data/x224,classes=imagenet-r,prepared=central-crop", ["classes", "holdout"])
    ('data/x224,prepared=central-crop', {'classes': 'imagenet-r'})
    >>> take_options("data,classes", ["classes"])
    ('data,classes', {})
    """
    options = {}
    for name in names:
        if found := re.fullmatch(rf"(.*),{name}=([^,]+){REST}", argument, re.DOTALL):
            argument, options[name] = found[1] + found[3], found[2]
    return argument, options


def check_split(split: str) -> str:
    """A split's name, which becomes part of paths; DatasetError if it could lead elsewhere."""
    if not split or split in (".", "..") or re.search(r"[/\\\0]", split):
        raise DatasetError(f"split {split!r}: expected a plain name such as train, val, test or all")
    return split


def check_path(path: str, where: str) -> str:
    """A path in a list or table; DatasetError if it could lead out of their folder."""
    if ".." in path.split("/"):
        raise DatasetError(
            f"{where}: got {path!r}; '..' is refused: put the list beside or above its images, or use full paths"
        )
    if "\0" in path:
        raise DatasetError(f"{where}: got {path!r}; a path cannot hold a NUL character")
    return path


def default_name(text: str) -> str:
    """A data set's name from that of a file or folder: ``Real World`` becomes ``Real-World``."""
    return re.sub(r"[\s:/\\]+", "-", text).strip("-") or "data"


def name_of_file(file: str, folder: Path) -> str:
    """A data set's name from a list's or table's file name, or from its folder if the file is named by the split."""
    return default_name(Path(file).stem.replace(PLACEHOLDER, "").strip("-_. ") or folder.name)
