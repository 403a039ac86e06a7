"""Options behind a source's argument: ``table:cats.csv,path=file,label=breed``.

They are read from the end while the parts have the form ``name=value``, so a path may hold commas. Commas and equals
signs mean nothing to a shell: no quotes are needed.
"""

import difflib
import re
from collections.abc import Collection

from featcache.errors import DatasetError

OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
REST = r"((?:,[A-Za-z_][A-Za-z0-9_]*=[^,]*)*)"
"""Further options."""


def split_options(source: str, argument: str, known: Collection[str] | None) -> tuple[str, dict[str, str]]:
    """Split ``ARGUMENT,name=value,...`` into the argument and its options.

    Parameters
    ----------
    source : name of the source, for errors
    argument : the text after the source's colon
    known : names of the options; None accepts any name

    Raises
    ------
    DatasetError
        An option is unknown, given twice or empty.

    Examples
    --------
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
        _check(source, name, value, known, options)
        options[name], argument = value, rest
    return argument, dict(reversed(options.items()))


def take_options(argument: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Take the named options out of an argument; returns the rest and the values found.

    Examples
    --------
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


def _check(source: str, name: str, value: str, known: Collection[str] | None, options: dict[str, str]) -> None:
    if known is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise DatasetError(f"{source}: unknown option {name!r}{hint} Expected one of {', '.join(known)}")
    if name in options:
        raise DatasetError(f"{source}: option {name!r} is given twice; give it once")
    if not value:
        raise DatasetError(f"{source}: option {name!r} is empty; write {name}=VALUE, or leave it out")


def split_list(value: str) -> list[str]:
    """The parts of ``region+year``.

    Examples
    --------
    >>> split_list("region+year")
    ['region', 'year']
    """
    return [part for part in value.split("+") if part]
