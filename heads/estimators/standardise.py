"""The `standardise` option of linear heads."""

import numpy as np
from numpy.typing import ArrayLike

from heads.estimators.base import HeadClassifier
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json
from heads.rows.samples import Float, Samples, finite_blocks, raise_not_finite
from heads.rows.scaling import S, Scaling
from heads.rows.weights import ClassWeight, checked_weights, class_weights


class Standardising(HeadClassifier):
    """Base of linear heads that can fit on standardised features.

    Parameters
    ----------
    standardise
        Whether to fit on features minus their mean, divided by their standard deviation, both of the training rows
        (with their `sample_weight`), as scikit-learn's ``make_pipeline(StandardScaler(), head)``. The scaling is folded
        into weights and intercepts, so the fitted head takes features as they are. Penalties apply to the weights of
        standardised features, held-out rows are scaled by the mean and deviation of all training rows, and a prior is
        converted to the same scale.
    """

    standardise: bool
    _scaling: Scaling | None = None

    def _scaled(self, samples: S, validation: S | None, sample_weight: ArrayLike | None = None) -> tuple[S, S | None]:
        """Training rows and validation split, standardised if `standardise`; sets the scaling."""
        self._scaling = None
        if not self.standardise:
            return samples, validation
        weights = None
        if sample_weight is not None and isinstance(samples, Samples):
            weights = checked_weights(sample_weight, len(samples.labels()))
        blocks = finite_blocks(samples.blocks)
        self._scaling = scaling = Scaling.of(blocks, samples.dim, weights)
        if not np.isfinite(scaling.deviation).all():
            raise_not_finite(x for x, *_ in samples.blocks())
        return scaling.rows(samples), None if validation is None else scaling.rows(validation)

    def _on_scale(self, prior: LinearHead | None) -> tuple[Float, Float] | None:
        """Weights (C, D) and biases (C,) of a prior for the (standardised) features of the fit; None for None."""
        if prior is None:
            return None
        weights, bias = prior.weights.astype(np.float64), prior.bias.astype(np.float64)
        return (weights, bias) if self._scaling is None else self._scaling.unfolded(weights, bias)

    def _folded(self, weights: Float, intercepts: Float) -> tuple[Float, Float]:
        """Weights (..., C, D) and intercepts (..., C) for unstandardised features; missing classes keep theirs."""
        if self._scaling is None:
            return weights, intercepts
        weights, shifted = self._scaling.folded(weights, intercepts)
        return weights, np.where(np.abs(intercepts) == -ABSENT, intercepts, shifted)

    def _settings(self, params: Json) -> Json:
        return params if self._scaling is None else {**params, "standardise": True}


class Weighting(Standardising):
    """Base of standardising heads with class weights.

    Parameters
    ----------
    class_weight : None, "balanced", or weights by class; see `heads.rows.weights.class_weights`
    standardise : see `Standardising`
    """

    class_weight: ClassWeight

    def _class_weights(self, samples: Samples) -> Float | None:
        """Weight (C,) of each class for these rows; None without `class_weight`."""
        if self.class_weight is None:
            return None
        return class_weights(self.class_weight, samples.labels(), samples.classes, samples.classnames)
