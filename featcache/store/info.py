"""What the ``info`` of a manifest must say, by kind of store, so that readers never trip over it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _number_or_none(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


COMMON: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "classnames": _texts,
    "encoder_name": _text,
    "dim": lambda value: type(value) is int and value > 0,
    "text_digests": _texts,
    "logit_scale": _number_or_none,
    "logit_bias": _number_or_none,
}
INFO: dict[str, dict[str, Callable[[Any], bool]]] = {
    "images": COMMON | {"split": _text, "labels_digest": _text, "bad": lambda value: isinstance(value, list)},
    "parts": {"name": _text, "split": _text, "encoder_name": _text, "dim": COMMON["dim"]},
    "texts": COMMON | {"templates": lambda value: value is None or _texts(value)},
}


def check_info(kind: str, info: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError where the info of a store of images or texts lacks something, or does not fit its arrays.

    Other kinds of store look after their own.
    """
    for name, fits in INFO.get(kind, {}).items():
        if name not in info or not fits(info[name]):
            raise ValueError(f"info says {name!r}: {info.get(name, 'nothing')!r}")
    if kind == "parts" and _expected(shapes, info["dim"]) != {**shapes, "labels": shapes["features"][:1]}:
        raise ValueError(f"arrays of a tap or view have the shapes {dict(shapes)}, with a width of {info['dim']}")
    if kind == "images" and _expected(shapes, info["dim"]) != dict(shapes):
        raise ValueError(f"arrays of images have the shapes {dict(shapes)}, with a width of {info['dim']}")
    if kind == "texts" and shapes.get("cls") != (len(info["classnames"]), info["dim"]):
        raise ValueError(f"{len(info['classnames'])} class names, {info['dim']} wide, for arrays of {dict(shapes)}")


def _expected(shapes: Shapes, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes with those of the arrays that every store of images has put right; more arrays may have joined."""
    rows = shapes.get("features", (0,))[0]
    known = {"features": (rows, dim), "norm": (rows,), "valid": (rows,), "content": (rows, 16), "labels": (rows,)}
    return dict(shapes) | known
