"""`LinearHead`: class weights whose outputs are logits, with a record of where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.checks import check_classes, check_encoder
from heads.samples import feature_blocks, is_store, to_numpy

__all__ = ["LinearHead"]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits = X @ weights.T + bias; logit scale and temperature are folded in, so their cross entropy is the NLL.

    Parameters
    ----------
    weights : (C, D) float32
        One row a class (scikit-learn's ``coef_``; open_clip's zero-shot matrix is the transpose).
    bias : (C,) float32
    classnames : C names; they may repeat
    name : how results rows call it
    provenance : JSON-able: head, params, encoder_key, text_digest, classnames, fitted_on, featcache
    alpha : interpolation coefficient, None for a head that is no interpolation
    parents : the two heads that an interpolation lies between; evaluation then needs two products for a whole path

    Examples
    --------
    >>> head = LinearHead(np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> head.predict(np.array([[0.2, 0.9], [0.8, 0.1]])).tolist()
    [1, 0]
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    classnames: tuple[str, ...]
    name: str = "linear"
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    alpha: float | None = None
    parents: tuple[LinearHead, LinearHead] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for key in ("weights", "bias"):
            object.__setattr__(self, key, np.ascontiguousarray(to_numpy(getattr(self, key)), np.float32))
        object.__setattr__(self, "classnames", tuple(self.classnames))
        classes = len(self.classnames)
        if self.weights.ndim != 2 or len(self.weights) != classes or self.bias.shape != (classes,):
            raise HeadError(
                f"weights {self.weights.shape}, bias {self.bias.shape} and {classes} class names do not fit; "
                "expected (C, D), (C,) and C names"
            )
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()):
            raise HeadError(f"head {self.name!r} has NaN or infinite weights; fit it again on finite features")

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.weights.shape[1])

    def logits(self, X: Any) -> NDArray[np.float32]:
        """Logits (n, C) of features (n, D), as float32."""
        features = to_numpy(X)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise HeadError(f"head {self.name!r} takes features (n, {self.dim}), got {features.shape}")
        return features.astype(np.float32, copy=False) @ self.weights.T + self.bias

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Class index (n,) of the largest logit, of arrays or a store's valid rows; ties go to the lower index."""
        return np.concatenate([logits.argmax(axis=1) for logits in self._all_logits(X)])

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Softmax of the logits (n, C), of arrays or a store's valid rows."""
        logits = np.concatenate(list(self._all_logits(X)))
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits

    def score(self, X: Any, y: Any = None) -> float:
        """Accuracy, a fraction in [0, 1]; with arrays, `y` holds class indices."""
        if is_store(X):
            y = np.concatenate([labels for _, labels in X.blocks()])
        if y is None:
            raise HeadError("arrays need labels: score(X, y); only a store brings its own")
        return float((self.predict(X) == to_numpy(y)).mean())

    def _all_logits(self, X: Any) -> Iterator[NDArray[np.float32]]:
        """Logits block by block, refused where they are not finite."""
        if is_store(X):
            self.check(X)
        done = 0
        for features in feature_blocks(X):
            logits = self.logits(features)
            if not np.isfinite(logits).all():
                bad = (np.flatnonzero(~np.isfinite(logits).all(axis=1))[:10] + done).tolist()
                raise HeadError(f"features hold NaN or infinity, for instance in rows {bad}; drop these rows")
            done += len(logits)
            yield logits

    def linear(self) -> LinearHead:
        """Itself: every head answers `linear`."""
        return self

    def check(self, store: Any) -> None:
        """Refuse a store of another encoder, text tower or class list (MismatchError)."""
        check_encoder({"head": self.name, **self.provenance}, self.dim, store)
        check_classes(self.classnames, store, self.name)

    def restrict(self, class_subset: Sequence[int] | NDArray[np.integer]) -> LinearHead:
        """The same head over some classes only, in the order given (ImageNet-R and -A keep 200 of 1000).

        Raises
        ------
        HeadError
            For indices outside [0, C), repeated ones, or fewer than two.
        """
        index = np.asarray(class_subset)
        if index.ndim != 1 or index.dtype.kind not in "iu" or len(set(index.tolist())) != index.size or index.size < 2:
            raise HeadError(f"class_subset must be at least two different class indices, got {class_subset!r}")
        if index.min() < 0 or index.max() >= len(self.classnames):
            raise HeadError(
                f"class_subset reaches from {index.min()} to {index.max()}; "
                f"head {self.name!r} has classes 0 to {len(self.classnames) - 1}"
            )
        names = tuple(self.classnames[i] for i in index.tolist())
        parents = self.parents and (self.parents[0].restrict(index), self.parents[1].restrict(index))
        return replace(self, weights=self.weights[index], bias=self.bias[index], classnames=names, parents=parents)

    def with_temperature(self, temperature: float) -> LinearHead:
        """The same head with its logits divided by a positive temperature."""
        if not np.isfinite(temperature) or temperature <= 0:
            raise HeadError(f"temperature must be a positive number, got {temperature!r}")
        params = {**self.provenance.get("params", {}), "temperature_after": float(temperature)}
        parents = self.parents and (
            self.parents[0].with_temperature(temperature),
            self.parents[1].with_temperature(temperature),
        )
        return replace(
            self,
            weights=self.weights / np.float32(temperature),
            bias=self.bias / np.float32(temperature),
            provenance={**self.provenance, "params": params},
            parents=parents,
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; see `heads.io.save`."""
        from heads.io import save

        return save(self, path)
