"""Stores of what a model says of other things than data sets and prompts: banks of random texts, frozen priors."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import MismatchError
from featcache.store.base import Store
from featcache.store.images import KINDS, open_store
from featcache.store.places import StorePath
from featcache.store.readers import Array, Rows


class BankStore(Store):
    """Features (M, D) of M random texts, float32, L2-normalised, with their second-moment matrix."""

    kind = "banks"

    def __len__(self) -> int:
        return self.manifest.arrays["features"].shape[0]

    def __repr__(self) -> str:
        return f"BankStore({self.name}: {len(self):,} random texts x {self.dim}, {self.encoder_name}, {self.path})"

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """(M, D): one unit vector a text."""
        return self.array("features")

    @cached_property
    def moment(self) -> npt.NDArray[np.float64]:
        """(D, D) float64: ``features.T @ features / M``."""
        return self.array("moment")

    @property
    def error(self) -> float:
        """Standard error of `moment` as an estimate over all random texts, in relative Frobenius norm."""
        error = self.info["error"]
        return float("inf") if error is None else float(error)


class PriorStore(Store):
    """Features (N, D) of one augmented view of a split under a frozen tower: float32 as they came, not normalised."""

    kind = "priors"

    def __len__(self) -> int:
        return self.manifest.arrays["features"].shape[0]

    def __repr__(self) -> str:
        return f"PriorStore({self.name}: {int(self.valid.sum()):,} of {len(self):,} views x {self.dim}, {self.path})"

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) True where the view was recorded."""
        return self.array("valid").astype(bool)

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float32 of the given rows, NaN where they were not recorded."""
        return self.reader("features").gather(rows)


def open_bank_store(path: str | StorePath) -> BankStore:
    """`open_store` for a bank of random texts; MismatchError where it holds something else."""
    store: Any = open_store(path)
    if not isinstance(store, BankStore):
        raise MismatchError(f"{path}: a store of {store.kind}; expected one made by `featcache text --random M`")
    return store


def open_prior_store(path: str | StorePath) -> PriorStore:
    """`open_store` for a frozen prior; MismatchError where it holds something else."""
    store: Any = open_store(path)
    if not isinstance(store, PriorStore):
        raise MismatchError(f"{path}: a store of {store.kind}; expected one of priors, made by `featcache finetune`")
    return store


KINDS |= {BankStore.kind: BankStore, PriorStore.kind: PriorStore}
