"""Stores of prompt embeddings, of random texts, and of features under a frozen image tower."""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from featcache.store.layout import Array
from featcache.store.reading.base import Store
from featcache.store.reading.readers import Rows


class TextStore(Store):
    """Text embeddings of C classes x T prompts, each L2-normalised (Lipsum-FT's `raw`, `cls` and `ctx`)."""

    kind, made_by = "texts", "featcache text"

    def __repr__(self) -> str:
        return f"TextStore({self.name}: {self.counted}, {self.encoder_name}, {self.path})"

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """`cls`, for ``np.asarray(store)`` and functions that take arrays."""
        return np.array(self.cls, dtype, copy=copy)

    @property
    def counted(self) -> str:
        """Size for messages: ``10 classes x 9 prompts``."""
        prompts = self.manifest.arrays["raw"].shape[1]
        return f"{len(self):,} classes x {prompts} prompt{'s' * (prompts != 1)}"

    @property
    def text_key(self) -> str:
        """Key of the text encoder's identity."""
        return self.manifest.encoder_key

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The T templates; None if the store was made from a prompt file."""
        return None if self.info["templates"] is None else tuple(self.info["templates"])

    @cached_property
    def raw(self) -> npt.NDArray[np.float32]:
        """(C, T, D): one unit vector per prompt, NaN if a class has fewer than T prompts."""
        return self.array("raw")

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """(C,): number of prompts per class."""
        return self.array("counts")

    @cached_property
    def cls(self) -> npt.NDArray[np.float32]:
        """(C, D): normalised mean over the prompts of each class, the zero-shot weights before the logit scale."""
        return self.array("cls")

    @cached_property
    def ctx(self) -> npt.NDArray[np.float32] | None:
        """(T, D): normalised mean over the classes of each template; None if the store was made from a prompt file."""
        return self.array("ctx") if "ctx" in self.manifest.whole else None


class BankStore(Store):
    """Features (M, D) of M random texts, float32 and L2-normalised, with their second-moment matrix."""

    kind, made_by = "banks", "featcache text --random M"

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """`features`, for ``np.asarray(store)``."""
        return np.array(self.features, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"BankStore({self.name}: {len(self):,} random texts x {self.dim}, {self.encoder_name}, {self.path})"

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """(M, D): one unit vector per text."""
        return self.array("features")

    @cached_property
    def moment(self) -> npt.NDArray[np.float64]:
        """(D, D) float64: ``features.T @ features / M``."""
        return self.array("moment")

    @property
    def error(self) -> float:
        """Standard error of `moment` as an estimate of the population moment, in relative Frobenius norm."""
        error = self.info["error"]
        return float("inf") if error is None else float(error)


class PriorStore(Store):
    """Features (N, D) of one augmented view of a split under a frozen image tower: float32, not normalised."""

    kind, made_by = "priors", "featcache finetune"

    def __repr__(self) -> str:
        return f"PriorStore({self.name}: {int(self.valid.sum()):,} of {len(self):,} views x {self.dim}, {self.path})"

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,), True for rows that were recorded."""
        return self.array("valid").astype(bool)

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float32 of the given rows, NaN for rows that were not recorded."""
        return self.reader("features").gather(rows)
