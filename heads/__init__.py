"""Heads: classifiers fitted from stores, evaluated without touching an image again.

A head is one file and one line in `HEADS` (heads/api.py, where all public names are); the contract tests and the
command line pick it up from there. Names are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from featcache.lazy import lazy_package

if TYPE_CHECKING:
    from heads.api import *  # noqa: F403

lazy_package(
    __name__,
    "heads.api",
    functions=frozenset({"bootstrap", "compare", "ensemble", "evaluate", "few_shot", "interpolate", "judge"}),
)
