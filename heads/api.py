"""The public names of `heads`, and the table of heads."""

from heads.alpha_by_folds import interpolate_by_folds
from heads.base import HeadClassifier, LinearClassifier
from heads.bootstrap import bootstrap, bootstrap_groups
from heads.calibration import calibrate
from heads.checks import subset_by_name
from heads.compare import add_intervals, compare
from heads.discriminant import LinearDiscriminant, NearestMean
from heads.ensemble import blend, ensemble, stack
from heads.evaluate import choose, evaluate
from heads.few_shot import few_shot
from heads.fitting import Material, fit_head, settled
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
from heads.prediction import predict_images
from heads.projections import Projection, load_projection
from heads.prompt_weights import score_templates, template_weights
from heads.regression import RidgeRegression
from heads.resident_store import ResidentStore, resident
from heads.results import append_rows
from heads.retrieval import retrieval_ranks, retrieve
from heads.ridge import Ridge
from heads.row_stream import RowStream
from heads.search.leaks import leaks
from heads.temperature import fit_temperature
from heads.tip_adapter import TipAdapter
from heads.tip_adapter_f import TipAdapterF
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
    "ResidentStore",
    "Ridge",
    "RidgeRegression",
    "RowStream",
    "TipAdapter",
    "TipAdapterF",
    "ZeroShot",
    "add_intervals",
    "append_rows",
    "bootstrap",
    "bootstrap_groups",
    "blend",
    "calibrate",
    "choose",
    "compare",
    "ensemble",
    "evaluate",
    "few_shot",
    "fit_head",
    "fit_temperature",
    "interpolate",
    "interpolate_by_folds",
    "join",
    "judge",
    "leaks",
    "load",
    "load_projection",
    "predict_images",
    "resident",
    "retrieval_ranks",
    "retrieve",
    "save",
    "score_templates",
    "settled",
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
    "tip_adapter_f": TipAdapterF,
    "lp_plus_plus": LPPlusPlus,
}
"""Every head by the name that the command line uses."""
