"""Plug-ins by name, and validation of their parameters against the annotations of their constructors.

A head, data source, encoder or regulariser is one line in a table of `Plugins`. The annotations of its constructor
give type, default, and allowed range or choices of each parameter. Values from outside, such as ``--set NAME=JSON`` or
a sweep plan, are checked against them:

>>> from collections.abc import Sequence
>>> def probe(C: Positive = 1.0, metric: Literal["top1", "nll"] = "nll", alphas: Sequence[Positive] | None = None): ...
>>> declared = parameters_of(probe)
>>> declared["C"].check(0.5)
0.5
>>> declared["metric"].check("foo")
Traceback (most recent call last):
    ...
ValueError: metric is 'foo', expected 'top1' or 'nll'
>>> declared["alphas"].expected
'a list of numbers above 0, or null'
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import reprlib
import stat
import types
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Plugins(UserDict[str, T]):
    """Name -> plug-in, given as "module:name" and imported on access; listing the names imports nothing."""

    def __init__(self, places: Mapping[str, str | T]) -> None:
        self.data: dict[str, Any] = dict(places)

    def __getitem__(self, name: str) -> T:
        place: T | str = self.data[name]
        found: T = resolve_name(place) if isinstance(place, str) else place
        return found


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `open` excludes `low`, and `below` excludes `high`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (
            (self.open and value == self.low) or (self.below and value == self.high)
        )

    def __repr__(self) -> str:
        """The limits that are set, since `help` prints the annotations of every parameter."""
        pairs = [(field, getattr(self, field.name)) for field in fields(self)]
        return f"Range({', '.join(f'{field.name}={value!r}' for field, value in pairs if value != field.default)})"

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f" {'above' if self.open else 'from'} {_number(self.low)}"
        if self.high == math.inf:
            return low
        limit = ("and below" if self.below else "and at most") if self.open else ("to below" if self.below else "to")
        return f"{low} {limit} {_number(self.high)}"


class OneOf:
    """A choice among strings."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __contains__(self, value: object) -> bool:
        return value in self.names

    def __repr__(self) -> str:
        return f"OneOf{self.names!r}"

    def __str__(self) -> str:
        return _either(self.names)


Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, below=True)]
Tolerance = Annotated[float, Range(0, 1, open=True, below=True)]
MAX_RATE, MAX_DECAY = 1e30, 1e6
"""Limits of learning rate and weight decay: torch's optimisers fail if their product overflows float32."""
Rate = Annotated[float, Range(0, MAX_RATE, open=True)]
Decay = Annotated[float, Range(0, MAX_DECAY)]
Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Precision = Annotated[str, OneOf("fp32", "bf16", "fp16")]
"""Of matrix products; what is float32 all the same, is said where it is used."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a plug-in."""

    name: str
    kind: Any
    """Annotation, with a `Range` or a ``Literal`` if not every value of the type is allowed."""
    default: Any
    """Default value, or `inspect.Parameter.empty` if required."""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The allowed strings of a parameter that is a choice among strings."""
        (limit,) = get_args(self.kind)[1:2] or (None,)
        return limit.names if isinstance(limit, OneOf) else None

    @property
    def expected(self) -> str:
        """The allowed values, in words."""
        return _words(self.kind)

    @property
    def given(self) -> Parameter:
        """The parameter of a value that is not left out: None is not allowed."""
        kinds = tuple(part for part in _parts(self.kind) if part is not type(None))
        return Parameter(self.name, Union[kinds], self.default)  # noqa: UP007

    def parsed(self, text: str) -> object:
        """The unchecked value that a text means: a number, ``yes`` or ``no``, a list ``region+year``, or the text."""
        kinds = [get_args(part)[0] if get_origin(part) is Annotated else part for part in _parts(self.kind)]
        for kind in kinds:
            if get_origin(kind) is not None and ("+" in text or str not in kinds):
                item = Parameter(self.name, get_args(kind)[0], None)
                return [item.parsed(part) for part in text.split("+") if part]
            if kind in (bool, Any) and text in ("yes", "true", "no", "false"):
                return text in ("yes", "true")
            if kind in (int, float):
                with contextlib.suppress(ValueError):
                    return kind(text)
        return text

    def check(self, value: T) -> T:
        """The value itself; arrays, tensors and their scalars are checked as lists and numbers.

        ValueError, with the parameter, the value and what is allowed, for an empty list or a value not allowed.
        """
        if self.kind in (Any, object):
            return value
        plain: object = value.tolist() if hasattr(value, "tolist") else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        if plain == [] or not _fits(plain, self.kind):
            raise ValueError(f"{self.name} is {plain!r}, expected {self.expected}")
        return value


def check_parameters(declared: Mapping[str, Parameter], values: Mapping[str, object]) -> None:
    """Check the values of parameters, by name; ValueError for the first that is not allowed."""
    for name, value in values.items():
        declared[name].check(value)


def parameters_of(plugin: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a plug-in's constructor or function, by name, in order."""
    function: Any = plugin.__init__ if inspect.isclass(plugin) else plugin
    kinds = get_type_hints(function, include_extras=True)
    return {
        name: Parameter(name, kinds.get(name, Any), found.default)
        for name, found in inspect.signature(plugin).parameters.items()
    }


def descriptions_of(plugin: Callable[..., Any]) -> dict[str, str]:
    """What each parameter means, by name, from the section Parameters of a plug-in's docstring."""
    _, _, section = (inspect.getdoc(plugin) or "").partition("\nParameters\n----------\n")
    entries = re.findall(r"^(\w+)(?: : |$)((?:.*\n)(?: .*\n)*)", section.partition("\n\n")[0] + "\n", re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()).rstrip(".") for name, text in entries}


def described(declared: Mapping[str, Parameter], texts: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """A line for each parameter: its name, what is allowed, the default as JSON, and what it means, if `texts` says so.

    Returns "none" without a parameter. A default that is not an allowed value, such as None for a parameter left out,
    is not shown.

    >>> def probe(C: Positive = 1.0, metric: Annotated[str, OneOf("top1", "nll")] = "nll"): ...
    >>> print(described(parameters_of(probe), {"C": "inverse penalty"}))
      C       a number above 0 (default: 1.0); inverse penalty
      metric  'top1' or 'nll' (default: "nll")
    """
    width = max(map(len, declared), default=0)
    lines = []
    for name, parameter in declared.items():
        what = f"; {texts[name]}" if name in texts else ""
        lines.append(f"  {name:<{width}}  {parameter.expected}{_default(parameter)}{what}")
    return "\n".join(lines) or "  none"


def _default(parameter: Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return " (required)"
    try:
        parameter.check(parameter.default)
    except ValueError:
        return ""
    text = json.dumps(parameter.default, default=str)
    return f" (default: {text if len(text) <= 60 else f'{text[:57]}...'})"


def check_record(
    record: object, kinds: Mapping[str, object], where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Check the fields of a record from a file or a flag against annotations, and return it; other fields are allowed.

    ValueError, which starts with `where`, if it is not a dict, lacks a required field, or has an invalid one.

    >>> check_record({"k": 3}, {"k": Count}, "head.safetensors")
    {'k': 3}
    >>> check_record({"k": "x"}, {"k": Count}, "head.safetensors")
    Traceback (most recent call last):
        ...
    ValueError: head.safetensors: k is 'x', expected a whole number from 1 to 2,147,483,647
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: holds {reprlib.repr(record)}, expected an object {{name: value}}")
    if lacking := [name for name in required if name not in record]:
        raise ValueError(f"{where}: lacks {', '.join(map(repr, lacking))}")
    for name, kind in kinds.items():
        if name in record and not _fits(record[name], kind):
            raise ValueError(f"{where}: {name} is {reprlib.repr(record[name])}, expected {_words(kind)}")
    return record


def json_value(text: str | bytes) -> Any:
    """Parsed JSON; ValueError if it is malformed or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _parts(kind: Any) -> tuple[Any, ...]:
    """The kinds that a union allows; of another annotation, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value matches an annotation."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return _fits(value, parts[0]) and all(value in limit for limit in parts[1:] if isinstance(limit, Range | OneOf))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    if origin is not None:  # sequences
        return (
            isinstance(value, Iterable)
            and not isinstance(value, str | Mapping)
            and all(_fits(item, parts[0]) for item in value)
        )
    if kind in (int, float):
        number = Integral if kind is int else Real
        return not isinstance(value, bool) and isinstance(value, number) and _is_finite(value)
    return isinstance(value, kind)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of float
        return False


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}


def _words(kind: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return "a value"
    if origin is Annotated:
        if isinstance(parts[1], OneOf):
            return str(parts[1])
        return _words(parts[0]) + "".join(str(limit) for limit in parts[1:] if isinstance(limit, Range))
    if origin is Literal:
        return _either(parts)
    if origin in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(part) for part in parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"an object {{name: {'value' if parts[1] is Any else _words(parts[1])}}}"
    if origin is not None:
        return f"a list of {_plural(parts[0])}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _plural(kind: Any) -> str:
    """An annotation in words, for several values."""
    words = _words(kind)
    if " or " in words:
        return f"values, each of them {words}"
    return re.sub(r"^an? ((?:whole )?\w+)", r"\1s", words)


def _either(values: Sequence[object]) -> str:
    *most, last = map(repr, values)
    return f"{', '.join(most)} or {last}" if most else last


OPENED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Files opened by the shell; ``list:/dev/stdin`` may read a pipe, since it has a writer."""


def check_regular(path: str | Path) -> None:
    """OSError for a pipe or a device, where opening may block forever and reading may not end.

    Missing or inaccessible files and folders pass, since opening them raises an error anyway.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if kind in (stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFIFO and str(path).startswith(OPENED)):
        return
    raise OSError("a pipe, a device or a socket; name a regular file")
