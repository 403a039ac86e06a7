"""The `standardise` option of linear heads."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict, TypeVar, Unpack, get_type_hints

import numpy as np
from numpy.typing import NDArray

from heads.estimators.base import HeadClassifier
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json
from heads.rows.multilabel import MultiLabelSamples
from heads.rows.samples import Samples, finite_blocks, raise_not_finite
from heads.rows.scaling import Scaling
from heads.rows.weights import class_weights

Float = NDArray[np.float64]
S = TypeVar("S", Samples, MultiLabelSamples)


class Shared(TypedDict, total=False):
    """Parameters of `Standardising`."""

    standardise: bool


class Standardising(HeadClassifier):
    """Base of linear heads that can fit on standardised features.

    The constructor of a subclass takes the parameter as ``**shared: Unpack[Shared]``; its signature lists it by name.

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

    def __init__(self, standardise: bool = False) -> None:
        self.standardise = standardise

    def __init_subclass__(cls, **options: object) -> None:
        """List the parameters of the base's constructor in the signature, where scikit-learn and `--set` look them up.

        Parameters that the subclass names itself are left as they are.
        """
        super().__init_subclass__(**options)
        if "__init__" not in vars(cls):
            return
        constructor, base = vars(cls)["__init__"], super(cls, cls).__init__
        own = inspect.signature(constructor)
        *named, rest = own.parameters.values()
        if rest.kind is not inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"{cls.__name__}.__init__ lacks **shared: Unpack[Shared]")
        inherited = [
            p for name, p in inspect.signature(base).parameters.items() if name not in (*own.parameters, "self")
        ]
        named += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in inherited]
        constructor.__signature__ = own.replace(parameters=named)
        kinds = get_type_hints(base, include_extras=True)
        del constructor.__annotations__[rest.name]
        constructor.__annotations__ |= {parameter.name: kinds[parameter.name] for parameter in inherited}

    def _scaled(self, samples: S, validation: S | None, weights: Float | None = None) -> tuple[S, S | None]:
        """Training rows and validation split, standardised if `standardise`; sets the scaling."""
        self._scaling = None
        if not self.standardise:
            return samples, validation
        blocks = finite_blocks(samples.blocks)
        self._scaling = scaling = Scaling.of(((x, y) for x, y in blocks), samples.dim, weights)
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


class Weighted(Shared, total=False):
    """Parameters of `Weighting`."""

    class_weight: Any


class Weighting(Standardising):
    """Base of standardising heads with class weights.

    Parameters
    ----------
    class_weight : None, "balanced", or weights by class; see `heads.rows.weights.class_weights`
    standardise : see `Standardising`
    """

    class_weight: Any

    def __init__(self, class_weight: Any = None, **shared: Unpack[Shared]) -> None:
        super().__init__(**shared)
        self.class_weight = class_weight

    def _class_weights(self, samples: Samples) -> Float | None:
        """Weight (C,) of each class for these rows; None without `class_weight`."""
        if self.class_weight is None:
            return None
        return class_weights(self.class_weight, samples.labels(), samples.classes, samples.classnames)
