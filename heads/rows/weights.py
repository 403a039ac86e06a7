"""Row weights and groups as estimators take them: scikit-learn's `sample_weight` and `class_weight`, checked."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.parameters import NotNegative, OneOf
from heads.rows.arrays import to_numpy
from heads.rows.samples import Array, Float, Ints, Samples

ClassWeight = Annotated[str, OneOf("balanced")] | Mapping[Any, NotNegative] | Sequence[NotNegative] | None
"""As in scikit-learn: "balanced", weights by label or class name, or weights (C,)."""


def class_weights(
    class_weight: ClassWeight,
    labels: NDArray[np.integer],
    classes: Array,
    classnames: Sequence[str] = (),
    weights: Float | None = None,
) -> Float:
    """Weight of each class (C,): "balanced" is N / (C n_c) over the classes that have rows, as in scikit-learn.

    With weights (N,) of rows, N and n_c are sums of them.

    A mapping gives weights by label, by class name, or by a label in digits, as JSON has it (a key that is both a name
    and digits is the name); classes that it leaves out weigh 1. A sequence gives weights by class index.

    HeadError for negative or infinite weights or another number of them; for keys that name no class, several, or one
    twice.

    >>> class_weights("balanced", np.array([0, 0, 0, 1]), np.arange(3)).round(3).tolist()
    [0.667, 2.0, 1.0]
    >>> class_weights({"cat": 3.0, "1": 0.5}, np.array([0, 1, 2]), np.arange(3), ("cat", "dog", "emu")).tolist()
    [3.0, 0.5, 1.0]
    """
    if isinstance(class_weight, str) and class_weight == "balanced":
        counts = np.bincount(labels, weights, minlength=len(classes))
        present = counts > 0
        found = np.ones(len(classes))
        found[present] = counts.sum() / (present.sum() * counts[present])
        return found
    if isinstance(class_weight, Mapping):
        class_weight = _by_class(class_weight, classes.tolist(), classnames)
    try:
        found = to_numpy(class_weight).astype(np.float64)
    except (TypeError, ValueError):
        raise HeadError(
            f"class_weight is {class_weight!r}, expected 'balanced', a mapping or one number per class"
        ) from None
    if found.shape != classes.shape or not (np.isfinite(found) & (found >= 0)).all():
        raise HeadError(f"class_weight needs {len(classes)} finite numbers, at least 0; got {class_weight!r}")
    return found


def _by_class(weights: Mapping[Any, float], labels: list[object], classnames: Sequence[str]) -> list[float]:
    """Weights of a mapping, in class order."""
    names, digits = list(classnames), [str(label) for label in labels]
    found = [1.0] * len(labels)
    places: dict[int, object] = {}
    for key, weight in weights.items():
        known = next((column for column in (labels, names, digits) if key in column), None)
        if known is None:
            some = ", ".join(map(repr, (names or labels)[:5])) + (", ..." if len(labels) > 5 else "")
            raise HeadError(f"class_weight has {key!r}, neither a label nor a class name; the classes are {some}")
        if known.count(key) > 1:
            raise HeadError(f"class_weight has {key!r}, the name of {known.count(key)} classes; give their labels")
        place = known.index(key)
        if place in places:
            raise HeadError(f"class_weight has {places[place]!r} and {key!r}, which are the same class; give one")
        places[place], found[place] = key, weight
    return found


def plain_weights(class_weight: ClassWeight) -> object:
    """Class weights for a JSON record."""
    if isinstance(class_weight, str):
        return class_weight
    if isinstance(class_weight, Mapping):
        return {str(label): float(weight) for label, weight in class_weight.items()}
    return to_numpy(class_weight).astype(np.float64).tolist()


def row_weights(samples: Samples, class_weight: ClassWeight, sample_weight: ArrayLike | None) -> Float | None:
    """Weights (N,) of the rows, the product of both; None where neither is given.

    HeadError for negative, infinite or only zero weights, or another number of them.
    """
    if class_weight is None and sample_weight is None:
        return None
    labels = samples.labels()
    found = np.ones(len(labels)) if sample_weight is None else checked_weights(sample_weight, len(labels))
    if class_weight is not None:
        found = found * class_weights(class_weight, labels, samples.classes, samples.classnames, found)[labels]
    if not found.any():
        raise HeadError("every row has a weight of zero; give at least one row a positive weight")
    return found


def checked_weights(sample_weight: ArrayLike, rows: int) -> Float:
    """Weights (N,) of rows; one number is the weight of all."""
    found = to_numpy(sample_weight).astype(np.float64)
    if found.ndim == 0:
        found = np.full(rows, float(found))
    if found.shape != (rows,) or not (np.isfinite(found) & (found >= 0)).all():
        raise HeadError(
            f"sample_weight must be 1D with {rows} finite numbers, at least 0, one for each valid row; got shape "
            f"{found.shape}"
        )
    return found


def group_ids(groups: ArrayLike | None, rows: int) -> Ints | None:
    """Groups (N,), any values that `numpy.unique` sorts (names, a store's metadata column), as numbers from 0.

    HeadError if there is not one per row, or only one group.

    >>> group_ids(["b", "a", "b"], 3).tolist()
    [1, 0, 1]
    """
    if groups is None:
        return None
    values = to_numpy(groups)
    if values.shape != (rows,):
        raise HeadError(f"groups must have one entry for each of the {rows} valid rows, got shape {values.shape}")
    _, found = np.unique(values, return_inverse=True)
    if not found.any():
        raise HeadError("all rows are in one group, and none remains when it is left out; give at least two groups")
    return np.asarray(found, np.int64)
