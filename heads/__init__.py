"""Heads: classifiers fitted from stores, evaluated without touching an image again.

A head is one file and one line in `HEADS`; the contract tests and the command line pick it up from there.
"""

from heads.base import LinearClassifier
from heads.checks import subset_by_name
from heads.discriminant import LinearDiscriminant, NearestMean
from heads.evaluate import choose, evaluate
from heads.few_shot import few_shot
from heads.interpolate import interpolate
from heads.io import load, save
from heads.knn import KNN
from heads.linear import LinearHead
from heads.logistic import Logistic
from heads.logits import LogitHead
from heads.lp_plus_plus import LPPlusPlus
from heads.metrics import Metrics
from heads.results import append_rows
from heads.ridge import Ridge
from heads.search.leaks import leaks
from heads.temperature import fit_temperature
from heads.tip_adapter import TipAdapter
from heads.zero_shot import ZeroShot

__all__ = [
    "HEADS",
    "KNN",
    "LPPlusPlus",
    "LinearClassifier",
    "LinearDiscriminant",
    "LinearHead",
    "Logistic",
    "LogitHead",
    "Metrics",
    "NearestMean",
    "Ridge",
    "TipAdapter",
    "ZeroShot",
    "append_rows",
    "choose",
    "evaluate",
    "few_shot",
    "fit_temperature",
    "interpolate",
    "leaks",
    "load",
    "save",
    "subset_by_name",
]

HEADS: dict[str, type[LinearClassifier]] = {
    "zero_shot": ZeroShot,
    "ridge": Ridge,
    "logistic": Logistic,
    "nearest_mean": NearestMean,
    "discriminant": LinearDiscriminant,
}
"""Every head by the name that the command line uses."""
