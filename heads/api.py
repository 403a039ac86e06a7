"""The public names of `heads`."""

from heads.combine.ensemble import blend, ensemble, stack
from heads.combine.interpolate import interpolate, interpolate_by_folds
from heads.combine.temperature_scaling import calibrate
from heads.estimators.base import HeadClassifier, LinearClassifier
from heads.estimators.catalogue import HEADS
from heads.estimators.dense.attentive import Attentive
from heads.estimators.discriminant import LinearDiscriminant, NearestMean
from heads.estimators.few_shot.gda import GDA
from heads.estimators.few_shot.lp_plus_plus import LPPlusPlus
from heads.estimators.few_shot.prolip import ProLIP
from heads.estimators.few_shot.prototypes import CLAP, TaskRes
from heads.estimators.few_shot.tip_adapter import TipAdapter, TipAdapterF
from heads.estimators.fit import Material, fit_head, settled
from heads.estimators.kept_moments import store_moments
from heads.estimators.knn import KNN
from heads.estimators.logistic.adamw import AdamW
from heads.estimators.logistic.classifier import Logistic
from heads.estimators.logistic.cosine import Cosine
from heads.estimators.logistic.sgd import SGD
from heads.estimators.multilabel.logistic import MultiLabelLogistic
from heads.estimators.multilabel.ridge import MultiLabelRidge
from heads.estimators.multilabel.zero_shot import MultiLabelZeroShot
from heads.estimators.ridge.classifier import Ridge
from heads.estimators.ridge.regression import RidgeRegression
from heads.estimators.transductive.em_dirichlet import EMDirichlet
from heads.estimators.transductive.label_propagation import LabelPropagation
from heads.estimators.transductive.transclip import TransCLIP
from heads.estimators.zero_shot import ZeroShot, score_templates, template_weights
from heads.evaluation.bootstrap import bootstrap, bootstrap_groups
from heads.evaluation.compare import add_intervals, compare
from heads.evaluation.evaluate import Judgement, choose, evaluate, judge
from heads.evaluation.metrics import Metrics
from heads.evaluation.multilabel import multilabel_metrics
from heads.evaluation.predict import predict_images
from heads.evaluation.projections import Projection, load_projection
from heads.evaluation.retrieval import retrieval_ranks, retrieve
from heads.evaluation.seen import unseen
from heads.fitted.attentive import AttentiveHead
from heads.fitted.base import LogitHead
from heads.fitted.files import load, save
from heads.fitted.linear import LinearHead
from heads.fitted.multilabel import MultiLabelHead
from heads.fitted.provenance import subset_by_name
from heads.report.results import append_rows
from heads.rows.few_shot import few_shot, grouped
from heads.rows.in_memory import ResidentStore, RowStream, resident
from heads.rows.joint import join
from heads.search.leaks import leaks
from heads.solvers.temperature import fit_temperature

__all__ = [
    "SGD",
    "AdamW",
    "Cosine",
    "Attentive",
    "AttentiveHead",
    "CLAP",
    "EMDirichlet",
    "GDA",
    "HEADS",
    "HeadClassifier",
    "Judgement",
    "KNN",
    "LPPlusPlus",
    "LabelPropagation",
    "LinearClassifier",
    "LinearDiscriminant",
    "LinearHead",
    "Logistic",
    "LogitHead",
    "Material",
    "Metrics",
    "MultiLabelHead",
    "MultiLabelLogistic",
    "MultiLabelRidge",
    "MultiLabelZeroShot",
    "multilabel_metrics",
    "NearestMean",
    "ProLIP",
    "Projection",
    "ResidentStore",
    "Ridge",
    "RidgeRegression",
    "RowStream",
    "TaskRes",
    "TipAdapter",
    "TipAdapterF",
    "TransCLIP",
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
    "grouped",
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
    "store_moments",
    "subset_by_name",
    "template_weights",
    "unseen",
]
