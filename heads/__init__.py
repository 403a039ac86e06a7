"""Heads: classifiers that are fitted from stores and evaluated without opening an image again.

The public names are those of heads/api.py, imported on first use. A head is one file in heads/estimators and one line
in the table `HEADS` of heads/estimators/catalogue.py; the contract tests and the command line pick it up.
"""

from typing import TYPE_CHECKING

from featcache import lazy_names

if TYPE_CHECKING:
    from heads.api import *  # noqa: F403
else:
    __getattr__, __dir__ = lazy_names(__name__)
