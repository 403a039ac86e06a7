"""End-to-end fine-tuning: objectives, regularisers, schedules, weight averages and weight-space ensembles.

A trained model is written to a model folder (`ft.checkpoints.folder`), and encoded and evaluated like any other. The
public names are those in ft/api.py, imported on first use.
"""

from typing import TYPE_CHECKING

from featcache import lazy_names

if TYPE_CHECKING:
    from ft.api import *  # noqa: F403
else:
    __getattr__, __dir__ = lazy_names(__name__)
