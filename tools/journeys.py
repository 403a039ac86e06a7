"""Traces a parameter through the code, function by function: ``python -m tools.journeys``.

A function is on the path of a value if it gets the value as an argument, or an argument (including ``self``) that has
it in an attribute whose name the function uses. The value is what the user passed (a text, or the part of it after the
source's name) and the data set opened from it; or the heads. A function counts once, when it is first called. Methods
of the value itself, nested functions and comprehensions do not count. A return is a step back to an earlier file.

The journeys: ``data`` through `ft.finetune`, ``data`` through ``featcache encode``, ``heads`` through `heads.evaluate`.
"""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / package}/" for package in ("featcache", "heads", "ft"))
VARARGS = 4
"""The flag of functions with ``*args``."""


@dataclass
class Journey:
    """The functions on the path of a value, as (file, name), in the order of their first calls."""

    passed: tuple[str, ...]
    opened: type
    stops: dict[CodeType, tuple[str, str]] = field(default_factory=dict)

    @property
    def entered(self) -> list[str]:
        """Files in the order visited."""
        return [file for file, _ in groupby(file for file, _ in self.stops.values())]

    @property
    def files(self) -> int:
        """Number of different files."""
        return len(set(self.entered))

    @property
    def returns(self) -> int:
        """Number of steps back to an earlier file."""
        return len(self.entered) - self.files

    def __str__(self) -> str:
        """Markdown list, as in docs/architecture.md."""
        stays = groupby(self.stops.values(), key=lambda stop: stop[0])
        lines = [
            f"{number}. `{file}`: {', '.join(name for _, name in stops)}"
            for number, (file, stops) in enumerate(stays, 1)
        ]
        return "\n".join(lines)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Record the calls in a block, including those in threads."""
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in self.stops or not code.co_filename.startswith(PACKAGES):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & VARARGS)]
        given = [frame.f_locals.get(name) for name in names]
        own = bool(given) and names[0] == "self" and self._is_value(given[0])
        if own or code.co_name.startswith("<") or "<locals>" in code.co_qualname:
            return
        if any(self._is_value(value) or self._is_held(value, _names(code)) for value in given):
            self.stops[code] = str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname

    def _is_value(self, value: object) -> bool:
        if isinstance(value, list | tuple):
            return any(map(self._is_value, value[:9]))
        return str(value) in self.passed if isinstance(value, str | Path) else isinstance(value, self.opened)

    def _is_held(self, value: object, names: frozenset[str]) -> bool:
        held = getattr(value, "__dict__", {})
        return any(self._is_value(held[name]) for name in names & held.keys())


@cache
def _names(code: CodeType) -> frozenset[str]:
    """Names used in a function, including nested functions and comprehensions."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def journeys(folder: Path) -> dict[str, Journey]:
    """The three journeys on tiny data in `folder`, which becomes the working directory."""
    import featcache
    import ft
    import heads
    from featcache.cli import encode, main  # noqa: F401
    from featcache.datasets import open_dataset
    from ft.training import loop  # noqa: F401
    from heads.evaluation import evaluate  # noqa: F401
    from heads.fitted.base import LogitHead

    rng = np.random.default_rng(0)
    for place in (folder / "pets" / split / name for split in ("train", "test") for name in ("cat", "dog")):
        place.mkdir(parents=True)
        for number in range(3 + place.match("test/*")):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    os.chdir(folder)
    spec = f"imagefolder:{folder / 'pets'}"
    passed, kind = (spec, str(folder / "pets")), type(open_dataset(spec, "train"))
    found = {
        "`data` through `ft.finetune`": Journey(passed, kind),
        "`data` through `featcache encode`": Journey(passed, kind),
        "`heads` through `heads.evaluate`": Journey((), LogitHead),
    }
    fine_tuned, encoded, evaluated = found.values()
    with encoded.followed():
        main.main(["encode", spec])
    with fine_tuned.followed():
        ft.finetune(spec, out=folder / "run", options={"steps": 1, "batch_size": 4})
    head = heads.Ridge().fit(featcache.encode(spec, "train"))
    test = featcache.encode(spec, "test")
    with evaluated.followed():
        heads.evaluate([head.linear()], [test])
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEATCACHE_ROOT"] = f"{folder}/cache"
        for name, journey in journeys(Path(folder)).items():
            print(f"\n### {name}: {journey.files} files, {journey.returns} returns\n\n{journey}")
