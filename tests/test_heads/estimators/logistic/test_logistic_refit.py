"""Logistic regression refitted on training and selection rows together, whether they are in memory or not."""

from typing import Any

import numpy as np
import pytest
from logistic_reference import objective, reference

from featcache.errors import HeadError
from heads import Logistic


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_out_of_core_is_the_optimum_of_both_splits(images: Any, fit_intercept: bool) -> None:
    train = images(n=300, noise=0.5, block_rows=64)
    val = images(n=130, seed=9, noise=0.5, split="val", dataset_key="data-9", block_rows=50)
    passes = {"train": 0, "val": 0}
    for store in (train, val):

        def counted(*args: Any, store: Any = store, own: Any = store.blocks) -> Any:
            passes[store.split] += 1
            return own(*args)

        store.blocks = counted
    options: dict[str, Any] = {"C": [0.1, 10.0], "refit": True, "fit_intercept": fit_intercept, "tol": 1e-9}
    found = Logistic(**options, in_memory=False).fit(train, selection=val)
    assert passes["val"] > 5  # the refit reads the selection rows anew for every evaluation
    whole = Logistic(**options, in_memory=True).fit(train, selection=val)
    assert found.C_ == whole.C_
    np.testing.assert_allclose(found.coef_, whole.coef_, atol=2e-3 * np.abs(whole.coef_).max())
    X, y = np.concatenate([train.X, val.X]), np.concatenate([train.y, val.y])
    model = reference(X, y, found.C_, fit_intercept)
    best = objective(X, y, found.C_, model.coef_, model.intercept_)
    assert objective(X, y, found.C_, found.coef_, found.intercept_) == pytest.approx(best, rel=1e-6)
    alone = reference(train.X, train.y, found.C_, fit_intercept)
    assert objective(X, y, found.C_, alone.coef_, alone.intercept_) > best * (1 + 1e-4)  # so the refit is one
    assert [entry["split"] for entry in found.provenance_["fitted_on"]] == ["train", "val"]
    assert found.provenance_["params"]["refit"] is True


def test_out_of_core_names_bad_rows_of_the_second_split(images: Any) -> None:
    val = images(n=60, seed=9, split="val", dataset_key="data-9")
    val.X[[4, 50], 1] = np.nan, np.inf
    with pytest.raises(HeadError, match="4, 50"):
        Logistic(C=[0.1, 1.0], refit=True, in_memory=False).fit(images(), selection=val)
