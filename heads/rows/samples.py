"""One door for training and test rows: arrays, torch tensors and image stores become blocks of (features, labels).

A store streams: `Samples.blocks` never holds more than a block. Arrays are one block. Anything with `blocks()`,
`classnames` and `dim` counts as a store. Tensors on a GPU stay there (`heads.rows.device`); blocks of them are copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import DataConversionWarning

from featcache.errors import HeadError
from featcache.store import ImageStore
from featcache.store.protocol import FeatureSource, TextSource

Block = tuple[NDArray[np.floating], NDArray[np.int64]]


@dataclass(frozen=True)
class Samples:
    """Labelled rows behind one interface.

    Attributes
    ----------
    dim : feature dimension D
    classes : (C,) the label values that `predict` returns; ``arange(C)`` for stores
    classnames : C names, in class order
    source : the store, or ``(X, y)`` with y already as class indices (an array) and X an array, or a tensor on a GPU
    """

    dim: int
    classes: NDArray[Any]
    classnames: tuple[str, ...]
    source: Any

    def blocks(self) -> Iterator[Block]:
        """Blocks ``(X (n, D), y (n,) int64 class indices)``; a block is good until the next one."""
        if isinstance(self.source, tuple):
            yield to_numpy(self.source[0]), self.source[1]
        else:
            yield from self.source.blocks()

    def labels(self) -> NDArray[np.int64]:
        """Class indices (N,) of all rows; in a pass over what streams."""
        if self.store is None:
            labels: NDArray[np.int64] = self.source[1]
            return labels
        if isinstance(self.store, ImageStore):  # one that knows its labels without reading features
            return np.asarray(self.store.labels[self.store.valid])
        return np.concatenate([np.zeros(0, np.int64), *(labels.copy() for _, labels in self.blocks())])

    @property
    def store(self) -> FeatureSource | None:
        """The store behind the rows, or None for arrays."""
        return None if isinstance(self.source, tuple) else self.source

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """The image of each row, where the store's rows are views."""
        return None if self.store is None else self.store.groups


def is_store(value: object) -> TypeGuard[FeatureSource]:
    """Whether what a caller gave is a source of features, not an array."""
    return hasattr(value, "blocks") and hasattr(value, "classnames")


def is_text(value: object) -> TypeGuard[TextSource]:
    """Whether what a caller gave is a source of text embeddings."""
    return hasattr(value, "raw")


def lies_elsewhere(features: Any) -> bool:
    """Whether features are a tensor in the memory of another device than the CPU.

    Examples
    --------
    >>> lies_elsewhere(np.eye(2))
    False
    """
    return hasattr(features, "detach") and str(features.device) != "cpu"


def to_numpy(value: Any) -> NDArray[Any]:
    """Array of any array-like; torch tensors without a copy where they are on the CPU (bfloat16 becomes float32)."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        value = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return np.asarray(value)


def feature_blocks(X: Any) -> Iterator[NDArray[np.floating]]:
    """Blocks of features alone, of a store or of a 2-D array-like."""
    if is_store(X):
        for features, _ in X.blocks():
            yield features
    else:
        yield _matrix(X)


def as_samples(
    X: Any, y: Any = None, *, classnames: Sequence[str] | None = None, classes: NDArray[Any] | None = None
) -> Samples:
    """Wrap a store, or arrays with labels.

    Parameters
    ----------
    X
        Image store, or array-like (N, D), float16/32/64.
    y
        Labels (N,), only with arrays: any values that `numpy.unique` sorts; class indices if `classnames` is given.
    classnames
        Names of all C classes, for arrays; it lets classes without a training row keep their place. Names may repeat.
    classes
        Label values already known (of the training rows), for a selection split given as arrays.

    Raises
    ------
    HeadError
        For shapes that do not fit, labels outside the class list, fewer than two classes.
    """
    if is_store(X):
        if y is not None:
            raise HeadError("a store brings its own labels: pass y=None, or pass X, y = store.numpy()")
        return _checked(Samples(int(X.dim), np.arange(len(X.classnames)), tuple(str(c) for c in X.classnames), X))
    features, labels = _matrix(X, anywhere=True), _labels(y)
    if len(features) != len(labels):
        raise HeadError(f"X has {len(features)} rows and y has {len(labels)} labels; they must be equal")
    if classnames is not None and classes is None:
        classes = np.arange(len(classnames))
    if classes is None:
        classes, indices = np.unique(labels, return_inverse=True)
    else:
        indices = _as_indices(labels, classes)
    names = tuple(str(c) for c in (classes if classnames is None else classnames))
    return _checked(Samples(int(features.shape[1]), classes, names, (features, indices.astype(np.int64))))


def gathered(samples: Samples) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """All rows in memory: arrays as they are, blocks as float16 where that is all they hold (an image store's)."""
    if samples.store is None:
        ((features, labels),) = samples.blocks()
        return features, labels
    blocks = [(_narrowed(features), labels.copy()) for features, labels in samples.blocks()]
    return np.concatenate([x for x, _ in blocks]), np.concatenate([y for _, y in blocks])


def _narrowed(features: NDArray[np.floating]) -> NDArray[np.floating]:
    """A copy as float16, if no value changes by it."""
    with np.errstate(over="ignore"):
        narrow = features.astype(np.float16)
    return narrow if np.array_equal(narrow, features) else np.array(features, np.result_type(features, np.float16))


def require_finite(samples: Samples, moment_diagonal: NDArray[np.float64]) -> None:
    """Raise, naming rows, if features hold NaN or infinity.

    `moment_diagonal` is the diagonal of ``X.T @ X``: it is finite exactly if all features are (short of overflow),
    so that the rows are searched only when there is something to find.
    """
    if np.isfinite(moment_diagonal).all():
        return
    raise_not_finite(features for features, _ in samples.blocks())


def finite_blocks(
    blocks: Callable[[], Iterator[tuple[NDArray[Any], ...]]], what: str = "features"
) -> Iterator[tuple[NDArray[Any], ...]]:
    """Blocks ``(X, ...)`` as they come, refused at the first with NaN or infinity in X.

    `blocks` gives them anew at every call: a second pass, made for the error alone, names all such rows. A sum is
    finite only if all that it sums is, and costs less than looking at every number.

    Raises
    ------
    HeadError
        Naming the rows, and `what` they are.

    Examples
    --------
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


def raise_not_finite(blocks: Iterable[NDArray[np.floating]], what: str = "features") -> NoReturn:
    """Raise a `HeadError` that names the rows with NaN or infinity."""
    bad: list[int] = []
    offset = 0
    for features in blocks:
        bad += (np.flatnonzero(~np.isfinite(features).all(axis=1)) + offset).tolist()
        offset += len(features)
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    where = f"{len(bad)} rows (of {offset} valid ones, from 0): {shown}" if bad else "no single row: they overflow"
    raise HeadError(f"{what} hold NaN or infinity in {where}; drop these rows or encode the images again")


def _matrix(X: Any, *, anywhere: bool = False) -> Any:
    """A 2-D floating array; integers become float64. With `anywhere`, a tensor on another device stays one."""
    if hasattr(X, "tocsr"):
        raise HeadError("features are a sparse matrix, and sparse input is not supported; pass X.toarray()")
    stays = anywhere and lies_elsewhere(X) and X.is_floating_point()
    features = X.detach() if stays else to_numpy(X)
    kind = "f" if stays else features.dtype.kind
    if kind == "c":
        raise HeadError("Complex data not supported: features must be real; pass X.real or X.imag")
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise HeadError(
            f"features must be 2-D, (N, D), got {shape}. Reshape your data: X.reshape(1, -1) for one sample"
        )
    for axis, what in enumerate(("sample(s)", "feature(s)")):
        if not features.shape[axis]:
            raise HeadError(f"0 {what} (shape={tuple(features.shape)}) while a minimum of 1 is required.")
    if kind == "f":
        return features
    try:
        return features.astype(np.float64)
    except ValueError as error:
        raise HeadError(f"features must be numbers, got dtype {features.dtype}: {error}") from error


def _labels(y: Any) -> NDArray[Any]:
    """A 1-D label vector."""
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
        raise HeadError(f"labels must be (N,), got {labels.shape}; one-hot targets are made inside")
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise HeadError("labels hold NaN or infinity; drop these rows")
        if (labels != np.floor(labels)).any():
            raise HeadError("Unknown label type: continuous values; heads classify, give class labels")
    return labels


def _as_indices(labels: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.intp]:
    """Position of each label in `classes`; unknown labels are an error that names them."""
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise HeadError(
            f"labels {unknown[:10].tolist()} are not among the {len(classes)} classes "
            f"{classes[:5].tolist()}...; labels are indices into classnames, or values seen in training"
        )
    order = np.argsort(classes)
    return np.asarray(order[np.searchsorted(classes, labels, sorter=order)])


def _checked(samples: Samples) -> Samples:
    """A classifier needs two classes."""
    if len(samples.classnames) < 2:
        raise HeadError(
            f"got {len(samples.classnames)} class ({', '.join(samples.classnames)}), expected at least 2: "
            "a classifier can't train when only one class is present"
        )
    return samples
