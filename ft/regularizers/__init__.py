"""Terms that keep a fine-tuned model robust; each is one file and one line in `REGULARIZERS`."""

from ft.regularizers.base import Regularizer, Step
from ft.regularizers.car import ContextDistillation
from ft.regularizers.distill import FeatureDistillation, LogitDistillation
from ft.regularizers.l2sp import L2SP
from ft.regularizers.lipsum import Lipsum
from ft.regularizers.variance_covariance import VarianceCovariance

__all__ = ["REGULARIZERS", "Regularizer", "Step"]

REGULARIZERS: dict[str, type[Regularizer]] = {
    "lipsum": Lipsum,
    "variance_covariance": VarianceCovariance,
    "l2sp": L2SP,
    "feature_distillation": FeatureDistillation,
    "logit_distillation": LogitDistillation,
    "car": ContextDistillation,
}
"""All regularisers, by the name that recipes use."""
