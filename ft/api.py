"""The public names of `ft`."""

from ft.checkpoints.convert import Converted, convert
from ft.checkpoints.folder import read_state, write_model_folder, write_state
from ft.merging import MERGES
from ft.merging.fisher import fisher, write_fisher
from ft.merging.interpolate import interpolate, soup
from ft.merging.merge import merge, merge_heads
from ft.merging.moments import layer_moments
from ft.merging.sweep import ChosenSweep, Sweep, WiseOptions, sweep, sweep_unchosen
from ft.merging.wise import wise
from ft.objectives import contrastive, cross_entropy
from ft.recipes import RECIPES, load_recipe
from ft.regularizers import REGULARIZERS
from ft.training.averages import EMA, SWA
from ft.training.loop import FinetuneResult, finetune
from ft.training.options import FinetuneOptions

__all__ = [
    "EMA",
    "MERGES",
    "RECIPES",
    "REGULARIZERS",
    "SWA",
    "ChosenSweep",
    "Converted",
    "FinetuneOptions",
    "FinetuneResult",
    "Sweep",
    "WiseOptions",
    "contrastive",
    "convert",
    "cross_entropy",
    "finetune",
    "fisher",
    "interpolate",
    "layer_moments",
    "load_recipe",
    "merge",
    "merge_heads",
    "read_state",
    "soup",
    "sweep",
    "sweep_unchosen",
    "wise",
    "write_fisher",
    "write_model_folder",
    "write_state",
]
