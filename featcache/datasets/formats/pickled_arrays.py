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


@dataclass(frozen=True)
class _Name:
    """The name of a function or type that a pickle refers to."""

    name: str


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
    """The value that ``numpy.save`` pickled into a file: dicts and lists of arrays, numbers and strings.

    Raises
    ------
    DatasetError
        It is no such file, or holds anything else.
    """
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


def value_of(content: bytes) -> object:
    """Carry out the opcodes of a pickle; ValueError at one that does more than build values."""
    machine = _Machine()
    for operation, argument, _ in genops(io.BytesIO(content)):
        if operation.name == "STOP":
            return machine.stack.pop()
        machine.step(operation.name, argument)
    raise ValueError("a pickle without an end")


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


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[object, object] = {}

    def step(self, name: str, argument: object) -> None:
        """Carry out one opcode."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack[-int(name[-1]) :] = [tuple(self.stack[-int(name[-1]) :])]
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise ValueError(f"the operation {name}")
            handler(argument)

    def _since_mark(self) -> list[object]:
        place = len(self.stack) - 1 - next(n for n, item in enumerate(reversed(self.stack)) if item is MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _tuple(self, _: object) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _setitem(self, _: object) -> None:
        key, value = self.stack[-2:]
        del self.stack[-2:]
        self.stack[-1][key] = value

    def _setitems(self, _: object) -> None:
        items = self._since_mark()
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _append(self, _: object) -> None:
        item = self.stack.pop()
        self.stack[-1].append(item)

    def _appends(self, _: object) -> None:
        items = self._since_mark()
        self.stack[-1].extend(items)

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" "))

    def _stack_global(self, _: object) -> None:
        module, name = self.stack[-2:]
        del self.stack[-2:]
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        if name not in MAKERS or module not in (HOMES if name != "encode" else {"_codecs"}):
            raise ValueError(f"a call of {module}.{name}")
        self.stack.append(_Name(name))

    def _reduce(self, _: object) -> None:
        made, arguments = self.stack[-2:]
        del self.stack[-2:]
        if not isinstance(made, _Name):
            raise ValueError("a call of a value")
        match made.name, arguments:
            case "_reconstruct", _:
                self.stack.append(_Array())
            case "dtype", (str(code), *_):
                self.stack.append(_Type(code))
            case "encode", (str(text), "latin1"):
                self.stack.append(text.encode("latin1"))
            case "scalar", (_Type() as kind, bytes(content)):
                self.stack.append(np.frombuffer(content, kind.type())[0])
            case "_frombuffer", (buffer, _Type() as kind, tuple(shape), order):
                self.stack.append(_Array(_filled(bytes(buffer), kind, shape, fortran=order == "F")))
            case _:
                raise ValueError(f"a call of {made.name}")

    def _build(self, _: object) -> None:
        state = self.stack.pop()
        match self.stack[-1], state:
            case _Type() as kind, (_, str(order), *_):
                kind.order = order
            case _Array() as array, (_, tuple(shape), _Type(), bool(fortran), bytes(content)):
                array.value = _filled(content, state[2], shape, fortran=fortran)
            case _Array() as array, (_, tuple(), _Type(code="O8"), _, list(items)):
                array.value = items
            case _:
                raise ValueError("a state of something else than an array")


def _filled(content: bytes, kind: _Type, shape: tuple[int, ...], *, fortran: bool) -> npt.NDArray[np.generic]:
    return np.frombuffer(content, kind.type()).reshape(shape, order="F" if fortran else "C")
