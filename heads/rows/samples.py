"""Training and test rows: arrays, torch tensors and feature sources become blocks of (features, labels).

A source streams: `Samples.blocks` never holds more than one of its blocks. Arrays are one block. Tensors on a GPU stay
there (`heads.rows.device`); blocks of them are copies on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import DataConversionWarning

from featcache.errors import HeadError
from featcache.store import ImageStore
from featcache.store.protocol import Encoded, FeatureSource, FeatureTable, TextSource
from featcache.store.reading.tokens import tokens_remedy
from heads.rows.arrays import to_numpy

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Array = NDArray[Any]
Features = NDArray[np.floating]
Ints = NDArray[np.int64]
Labels = Ints
Float = NDArray[np.float64]
Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
Block = tuple[Features, Labels]

Rows = FeatureSource | ArrayLike
"""What fits and predictions take: a source, or an array or tensor (N, D)."""
Selection = FeatureSource | tuple[ArrayLike, ArrayLike]
"""A validation split: a source, or ``(X, y)``."""


@dataclass(frozen=True)
class Samples:
    """Labelled rows of C classes.

    Attributes
    ----------
    dim : feature dimension D
    classes : (C,) the label values that `predict` returns; ``arange(C)`` for sources
    classnames : C names, in class order
    source : a source, or ``(X, y)``: y class indices (N,), X an array (N, D), or a tensor on a GPU
    """

    dim: int
    classes: Array
    classnames: tuple[str, ...]
    source: FeatureSource | tuple[Features | torch.Tensor, Labels]

    def __post_init__(self) -> None:
        if len(self.classnames) < 2:
            raise HeadError(
                f"got {len(self.classnames)} class ({', '.join(self.classnames)}), expected at least 2: "
                "a classifier can't train when only one class is present"
            )

    def blocks(self) -> Iterator[Block]:
        """Blocks ``(X (n, D), y (n,) class indices)``; a block is valid until the next is requested."""
        if isinstance(self.source, tuple):
            yield to_numpy(self.source[0]), self.source[1]
        else:
            yield from self.source.blocks()  # type: ignore[misc]  # as_samples refuses multi-label sources

    def labels(self) -> Labels:
        """Class indices (N,) of all rows; of a stream, in a pass."""
        if isinstance(self.source, tuple):
            return self.source[1]
        if isinstance(self.source, ImageStore):  # knows its labels without reading features
            return self.source.labels[self.source.valid]
        return np.concatenate([np.zeros(0, np.int64), *(labels.copy() for _, labels in self.blocks())])

    @property
    def store(self) -> FeatureSource | None:
        """The source behind the rows; None for arrays."""
        return None if isinstance(self.source, tuple) else self.source

    @property
    def groups(self) -> Labels | None:
        """Image index of each row if the rows of the source are views, else None."""
        return None if isinstance(self.source, tuple) else self.source.groups

    @property
    def n_rows(self) -> int | None:
        """Number of rows, unreadable images included; None for a stream."""
        return len(self.source[1]) if isinstance(self.source, tuple) else self.source.n_rows


def is_store(value: object) -> TypeIs[FeatureSource]:
    """Whether a value is a source of features, not an array."""
    return hasattr(value, "blocks") and hasattr(value, "classnames")


def is_table(source: FeatureSource) -> TypeIs[FeatureTable]:
    """Whether the rows of a source can be read by index."""
    return hasattr(source, "gather")


def is_multilabel(store: object) -> bool:
    """Whether a source is multi-label; sources of other programs may lack the attribute."""
    return bool(getattr(store, "multilabel", False))


def check_width(X: Features, dim: int, name: str) -> None:
    """Refuse features (..., D) of another width than a head's, in scikit-learn's words."""
    if X.shape[-1] != dim:
        raise HeadError(f"X has {X.shape[-1]} features, but {name} is expecting {dim} features as input")


def is_text(value: object) -> TypeIs[TextSource]:
    """Whether a value is a source of text embeddings."""
    return hasattr(value, "raw")


def is_on_device(features: object) -> TypeIs[torch.Tensor]:
    """Whether features are a tensor in the memory of another device than the CPU.

    >>> is_on_device(np.eye(2))
    False
    """
    return isinstance(features, torch.Tensor) and features.device.type != "cpu"


def refuse_tokens(source: Encoded, what: str) -> None:
    """Raise HeadError, beginning with `what`, if the source has tokens: only some heads take them."""
    if source.tokens is not None:
        raise HeadError(f"{what}: {source.name} has {tokens_remedy(source.tokens, source.dim)}")


def feature_blocks(X: Rows, *, tokens: bool = False) -> Iterator[Features]:
    """Blocks of features alone, of a source or of a 2-D array-like, with `tokens` also of a 3-D one."""
    if is_store(X):
        yield from (features for features, _ in X.blocks())
    else:
        yield to_numpy(_checked_features(X, tokens))


def as_samples(
    X: Rows,
    y: ArrayLike | None = None,
    *,
    classnames: Sequence[str] | None = None,
    classes: Array | None = None,
    tokens: bool = False,
) -> Samples:
    """Samples of a source, or of arrays with labels.

    HeadError for shapes that do not fit, labels outside the class list, fewer than two classes.

    Parameters
    ----------
    X : source, or array-like (N, D), float16/32/64
    y
        Labels (N,), only with arrays: any values that `numpy.unique` sorts; class indices, or the names themselves, if
        `classnames` is given.
    classnames
        Names of all C classes, for arrays; classes without a training row then keep their index. Names may repeat.
    classes : label values of the training rows, for a selection split given as arrays
    tokens : take features (N, P, D), too
    """
    if is_store(X):
        if y is not None:
            raise HeadError("a store brings its own labels: pass y=None, or pass X, y = store.numpy()")
        if is_multilabel(X):
            raise HeadError(
                f"{X.name}/{X.split} is multi-label (any number of its {len(X.classnames)} classes applies to a row), "
                "and this head takes one label per row; fit multilabel_logistic"
            )
        if not tokens:
            refuse_tokens(X, "this head takes one vector per image")
        names = tuple(str(c) for c in X.classnames)
        return Samples(int(X.dim), np.arange(len(names)), names, X)
    features, labels = _checked_features(X, tokens), _checked_labels(y)
    if len(features) != len(labels):
        raise HeadError(f"X has {len(features)} rows and y has {len(labels)} labels; they must be equal")
    if classnames is not None and classes is None:
        classes = _values_of(classnames, labels)
    if classes is None:
        classes, indices = np.unique(labels, return_inverse=True)
    else:
        indices = _as_indices(labels, classes)
    names = tuple(str(c) for c in (classes if classnames is None else classnames))
    return Samples(int(features.shape[-1]), classes, names, (features, indices.astype(np.int64)))


def gathered(samples: Samples) -> Block:
    """All rows in memory: arrays as they are, blocks as float16 where that loses nothing (an image store's)."""
    if samples.store is None:
        ((features, labels),) = samples.blocks()
        return features, labels
    blocks = [(narrowed(features), labels.copy()) for features, labels in samples.blocks()]
    return np.concatenate([x for x, _ in blocks]), np.concatenate([y for _, y in blocks])


def narrowed(features: Features) -> Features:
    """A copy as float16 if no value changes by it, else in the type of the features."""
    with np.errstate(over="ignore"):
        narrow = features.astype(np.float16)
    return narrow if np.array_equal(narrow, features) else np.array(features, np.result_type(features, np.float16))


def require_finite(samples: Samples, moment_diagonal: Features) -> None:
    """Raise, naming rows, if features hold NaN or infinity.

    `moment_diagonal` is the diagonal of ``X.T @ X``. It is finite exactly if all features are (short of overflow), so
    rows are only searched when there is something to find.
    """
    if not np.isfinite(moment_diagonal).all():
        raise_not_finite(features for features, _ in samples.blocks())


def finite_blocks(
    blocks: Callable[[], Iterator[tuple[Array, ...]]], what: str = "features"
) -> Iterator[tuple[Array, ...]]:
    """Blocks ``(X, ...)``, refused at the first with NaN or infinity in X.

    `blocks` starts them from the first at every call: a second pass, made for the error alone, names all such rows. A
    sum is finite only if all its terms are, and costs less than a look at every number.

    HeadError naming the rows, and `what` they are.

    >>> [x.shape for (x,) in finite_blocks(lambda: iter([(np.eye(2),), (np.ones((1, 2)),)]))]
    [(2, 2), (1, 2)]
    """
    for block in blocks():
        features = block[0]
        with np.errstate(invalid="ignore", over="ignore"):
            total = features.sum(dtype=np.result_type(features.dtype, np.float32))
        if not np.isfinite(total) and not np.isfinite(features).all():
            raise_not_finite((found[0] for found in blocks()), what)
        yield block


def overflow(what: str, features: Features) -> HeadError:
    """The error for features that are too large; `what` says what overflows, such as "their squares overflow"."""
    size = f"{np.abs(features).max():.3g}"
    return HeadError(f"{what} float32: features reach {size}; scale them, for instance to rows of length 1")


def raise_not_finite(blocks: Iterable[Features], what: str = "features") -> NoReturn:
    """Raise a `HeadError` that names the rows with NaN or infinity."""
    bad: list[int] = []
    offset, largest = 0, 0.0
    for features in blocks:
        largest = max(largest, float(np.abs(features).max(initial=0)))
        bad += (np.flatnonzero(~np.isfinite(features).all(axis=tuple(range(1, features.ndim)))) + offset).tolist()
        offset += len(features)
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    if not bad:
        raise HeadError(
            f"{what} are finite, but reach {largest:.3g}, and their squares overflow; scale them, for instance to rows "
            "of length 1"
        )
    where = f"{len(bad)} rows (of {offset} valid ones, from 0): {shown}"
    raise HeadError(f"{what} hold NaN or infinity in {where}; drop these rows or encode the images again")


def _checked_features(X: object, tokens: bool = False) -> Features | torch.Tensor:
    """Features (N, D), with `tokens` also (N, P, D): floating-point, an array or a tensor on a GPU."""
    if hasattr(X, "tocsr"):  # scipy's sparse matrices and arrays
        raise HeadError("features are a sparse matrix, and sparse input is not supported; pass X.toarray()")
    if is_on_device(X) and X.is_floating_point():
        _check_shape(X.shape, tokens)
        return X.detach()
    features = to_numpy(X)
    if features.dtype.kind == "c":
        raise HeadError("Complex data not supported: features must be real; pass X.real or X.imag")
    _check_shape(features.shape, tokens)
    try:
        return features if features.dtype.kind == "f" else features.astype(np.float64)
    except ValueError as error:
        raise HeadError(f"features must be numbers, got dtype {features.dtype}: {error}") from error


def _check_shape(shape: Sequence[int], tokens: bool = False) -> None:
    if len(shape) != 2 and not (tokens and len(shape) == 3):
        raise HeadError(
            f"features must be 2-D, (N, D), got {tuple(shape)}. Reshape your data: X.reshape(1, -1) for one sample"
        )
    for size, what in zip((shape[0], shape[-1]), ("sample(s)", "feature(s)"), strict=True):
        if not size:  # in the words that scikit-learn's checks look for
            raise HeadError(f"0 {what} (shape={tuple(shape)}) while a minimum of 1 is required.")


def _checked_labels(y: ArrayLike | None) -> Array:
    """Labels (N,)."""
    if y is None:
        raise HeadError(
            "this head requires y to be passed, but the target y is None; only a store brings its own labels"
        )
    labels = to_numpy(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        what = "A column-vector y was passed when a 1d array was expected: it is flattened"
        warnings.warn(what, DataConversionWarning, stacklevel=4)
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise HeadError(f"labels must be (N,), got {labels.shape}; pass class labels, not one-hot targets")
    if labels.dtype.kind == "c":
        raise HeadError("Complex data not supported: labels must be real; pass y.real or y.imag")
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise HeadError("labels hold NaN or infinity; drop these rows")
        if (labels != np.floor(labels)).any():
            raise HeadError("Unknown label type: continuous values; heads classify, give class labels")
    if labels.dtype.kind == "O" and not _have_an_order(labels):
        kinds = ", ".join(sorted({type(label).__name__ for label in labels.tolist()}))
        raise HeadError(f"labels mix values that have no order ({kinds}); give all as text, and drop rows without one")
    return labels


def _have_an_order(labels: Array) -> bool:
    """Whether labels (N,) of any type can be sorted: not text with numbers, and no None or NaN."""
    try:
        return all(label == label for label in np.unique(labels).tolist())
    except TypeError:
        return False


def accuracy(predicted: Array, y: ArrayLike) -> float:
    """Share of equal labels (N,), in [0, 1].

    HeadError for another number of labels, or if one side is text and the other numbers, which are never equal.

    >>> accuracy(np.array([0, 1, 1]), [0.0, 1.0, 2.0]).__round__(3)
    0.667
    """
    labels = _checked_labels(y)
    if len(labels) != len(predicted):
        raise HeadError(f"X has {len(predicted)} rows and y has {len(labels)} labels; they must be equal")
    text = [bool(len(values)) and isinstance(values.tolist()[0], str) for values in (labels, predicted)]
    if text[0] != text[1]:
        raise HeadError(
            f"labels such as {labels.tolist()[0]!r} are never equal to predictions such as {predicted.tolist()[0]!r}; "
            "give labels as predict returns them"
        )
    return float((predicted == labels).mean())


def _values_of(classnames: Sequence[str], labels: Array) -> Array:
    """Label values of all classes: their names where the labels are among these, else their indices."""
    names = np.asarray([str(name) for name in classnames])
    by_name = labels.dtype.kind in "OU" and len(set(names)) == len(names) and np.isin(labels, names).all()
    return names if by_name else np.arange(len(names))


def _as_indices(labels: Array, classes: Array) -> NDArray[np.intp]:
    """Position of each label in `classes`; unknown labels are an error that names them."""
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise HeadError(
            f"labels {unknown[:10].tolist()} are not among the {len(classes)} classes "
            f"{classes[:5].tolist()}...; labels are indices into classnames, these names, or values seen in training"
        )
    order = np.argsort(classes)
    return np.asarray(order[np.searchsorted(classes, labels, sorter=order)])
