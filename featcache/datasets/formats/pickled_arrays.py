"""Reading arrays, lists and dicts from a pickled ``.npy`` file without running any code in it.

``numpy.save`` of a dict writes a pickle, and unpickling can call any function. Here the standard library's disassembler
lists the opcodes; those that build containers, numbers, strings and numpy arrays are carried out, and any other is
refused. CIFAR-10.2 is published in such files.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DatasetError

MAX_BYTES = 1 << 31
MAKERS = {"_reconstruct", "ndarray", "dtype", "encode", "_frombuffer", "scalar"}
HOMES = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
MARK = object()


class _Name(str):
    """The name of a function or type that a pickle refers to."""


@dataclass(eq=False)
class _Type:
    """A numpy dtype; a second opcode sets its byte order."""

    code: str
    order: str = "|"

    def type(self) -> np.dtype[np.generic]:
        """As a numpy dtype; ValueError for other than plain numbers."""
        if self.code not in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"):
            raise ValueError(f"an array of type {self.code!r}")
        return np.dtype(self.order.replace("|", "") + self.code)


@dataclass(eq=False)
class _Array:
    """An array; a second opcode fills it."""

    value: object = None


def read_pickled(path: Path) -> object:
    """The dict or list of arrays, numbers and strings that ``numpy.save`` pickled; DatasetError for any other file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(file)
            if kind.kind != "O" or shape != ():
                raise ValueError(f"an array {kind} {shape}")
            found = value_of(file.read())
        return _plain(found)
    except Exception as error:  # numpy's reader of headers raises anything on damaged files
        raise DatasetError(f"{path}: expected a pickled dict of arrays, got {error}; restore the file") from error


def _plain(value: object) -> object:
    """Replace arrays of one object by that object, also within containers."""
    if isinstance(value, _Array):
        inner = value.value
        return _plain(inner[0]) if isinstance(inner, list) and len(inner) == 1 else inner
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


LITERALS = {
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
}
CONSTANTS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}


def value_of(content: bytes) -> object:
    """Carry out the opcodes of a pickle; ValueError at one that does more than build values."""
    stack: list[Any] = []
    memo: dict[object, object] = {}
    for operation, argument, _ in genops(io.BytesIO(content)):
        match operation.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(_popped(stack, int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "SETITEM":
                key, value = _popped(stack, 2)
                stack[-1][key] = value
            case "SETITEMS":
                items = _since_mark(stack)
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND":
                (item,) = _popped(stack, 1)
                stack[-1].append(item)
            case "APPENDS":
                items = _since_mark(stack)
                stack[-1].extend(items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_maker(*str(argument).split(" ")))
            case "STACK_GLOBAL":
                stack.append(_maker(*_popped(stack, 2)))
            case "REDUCE":
                stack.append(_made(*_popped(stack, 2)))
            case "BUILD":
                (state,) = _popped(stack, 1)
                _build(stack[-1], state)
            case name:
                raise ValueError(f"the operation {name}")
    raise ValueError("a pickle without an end")


def _popped(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    del stack[-count:]
    return items


def _since_mark(stack: list[Any]) -> list[Any]:
    above = next(place for place, item in enumerate(reversed(stack)) if item is MARK)
    return _popped(stack, above + 1)[1:]


def _maker(module: str, name: str) -> _Name:
    if name not in MAKERS or module not in (HOMES if name != "encode" else {"_codecs"}):
        raise ValueError(f"a call of {module}.{name}")
    return _Name(name)


def _made(maker: object, arguments: Any) -> object:
    """The value of a call; arrays and dtypes are completed by `_build`."""
    if not isinstance(maker, _Name):
        raise ValueError("a call of a value")
    match maker, arguments:
        case "_reconstruct", _:
            return _Array()
        case "dtype", (str(code), *_):
            return _Type(code)
        case "encode", (str(text), "latin1"):
            return text.encode("latin1")
        case "scalar", (_Type() as kind, bytes(content)):
            return np.frombuffer(content, kind.type())[0]
        case "_frombuffer", (buffer, _Type() as kind, tuple(shape), order):
            return _Array(_filled(bytes(buffer), kind, shape, fortran=order == "F"))
        case _:
            raise ValueError(f"a call of {maker}")


def _build(value: object, state: object) -> None:
    match value, state:
        case _Type() as kind, (_, str(order), *_):
            kind.order = order
        case _Array() as array, (_, tuple(shape), _Type() as kind, bool(fortran), bytes(content)):
            array.value = _filled(content, kind, shape, fortran=fortran)
        case _Array() as array, (_, tuple(), _Type(code="O8"), _, list(items)):
            array.value = items
        case _:
            raise ValueError("a state of something other than an array")


def _filled(content: bytes, kind: _Type, shape: tuple[int, ...], *, fortran: bool) -> npt.NDArray[np.generic]:
    return np.frombuffer(content, kind.type()).reshape(shape, order="F" if fortran else "C")
