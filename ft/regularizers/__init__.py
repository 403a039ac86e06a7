"""Terms that keep a fine-tuned model robust; each is one file and one line in `REGULARIZERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.parameters import Plugins

if TYPE_CHECKING:
    from ft.regularizers.base import Regularizer

__all__ = ["REGULARIZERS"]

REGULARIZERS: Plugins[type[Regularizer]] = Plugins(
    {
        "lipsum": "ft.regularizers.lipsum:Lipsum",
        "variance_covariance": "ft.regularizers.variance_covariance:VarianceCovariance",
        "l2sp": "ft.regularizers.l2sp:L2SP",
        "feature_distillation": "ft.regularizers.distill:FeatureDistillation",
        "logit_distillation": "ft.regularizers.distill:LogitDistillation",
        "orthogonality": "ft.regularizers.carot:Orthogonality",
        "self_distillation": "ft.regularizers.carot:SelfDistillation",
        "car": "ft.regularizers.car:ContextDistillation",
    }
)
"""All regularisers, under the names in recipes."""
