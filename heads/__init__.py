"""Heads: classifiers fitted from stores, evaluated without touching an image again.

A head is one file and one line in `HEADS`; the contract tests and the command line pick it up from there.
"""

from heads.base import HeadClassifier, LinearClassifier
from heads.checks import subset_by_name
from heads.discriminant import LinearDiscriminant, NearestMean
from heads.ensemble import blend, ensemble, stack
from heads.evaluate import choose, evaluate
from heads.few_shot import few_shot
from heads.fitting import Material, fit_head
from heads.interpolate import interpolate
from heads.io import load, save
from heads.joint import join
from heads.judge import Judgement, judge
from heads.knn import KNN
from heads.linear import LinearHead
from heads.logistic import Logistic
from heads.logits import LogitHead
from heads.lp_plus_plus import LPPlusPlus
from heads.metrics import Metrics
from heads.projections import Projection, load_projection
from heads.prompt_weights import score_templates, template_weights
from heads.results import append_rows
from heads.regression import RidgeRegression
from heads.ridge import Ridge
from heads.row_stream import RowStream
from heads.search.leaks import leaks
from heads.temperature import fit_temperature
from heads.tip_adapter import TipAdapter
from heads.zero_shot import ZeroShot

__all__ = [
    "HEADS",
    "HeadClassifier",
    "Judgement",
    "KNN",
    "LPPlusPlus",
    "LinearClassifier",
    "LinearDiscriminant",
    "LinearHead",
    "Logistic",
    "LogitHead",
    "Material",
    "Metrics",
    "NearestMean",
    "Projection",
    "Ridge",
    "RidgeRegression",
    "RowStream",
    "TipAdapter",
    "ZeroShot",
    "append_rows",
    "blend",
    "choose",
    "ensemble",
    "evaluate",
    "few_shot",
    "fit_head",
    "fit_temperature",
    "interpolate",
    "join",
    "judge",
    "leaks",
    "load",
    "load_projection",
    "save",
    "score_templates",
    "stack",
    "subset_by_name",
    "template_weights",
]

HEADS: dict[str, type[HeadClassifier]] = {
    "zero_shot": ZeroShot,
    "ridge": Ridge,
    "logistic": Logistic,
    "nearest_mean": NearestMean,
    "discriminant": LinearDiscriminant,
    "knn": KNN,
    "tip_adapter": TipAdapter,
    "lp_plus_plus": LPPlusPlus,
}
"""Every head by the name that the command line uses."""
