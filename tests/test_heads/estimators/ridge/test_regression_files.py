"""Ridge regression and where it belongs: its encoder, its record, its file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError, MismatchError
from heads import Ridge, RidgeRegression


def targets(store: Any, k: int) -> Any:
    Y = store.X.astype(np.float64) @ np.random.default_rng(0).normal(size=(12, k))
    return Y if k > 1 else Y[:, 0]


def test_a_store_of_another_encoder_is_refused(images: Any) -> None:
    store = images()
    other = images(encoder_key="enc-2", encoder_name="other")
    model = RidgeRegression().fit(store, targets(store, 1))
    for refused in (model.predict, lambda s: model.score(s, targets(s, 1))):
        with pytest.raises(MismatchError, match="ridge_regression was fitted on features of encoder enc-1"):
            refused(other)
    with pytest.raises(MismatchError, match="enc-1"):
        RidgeRegression().fit(store, targets(store, 1), selection=(other, targets(other, 1)))
    assert model.predict(images(split="test")).shape == (200,)
    assert RidgeRegression().fit(*store.numpy()).predict(other).shape == (200,)  # arrays have no encoder


def test_provenance_records_the_fit(images: Any) -> None:
    store, val = images(), images(seed=6, split="val", dataset_key="data-3")
    model = RidgeRegression().fit(store, targets(store, 1), selection=(val, targets(val, 1)))
    record = model.provenance_
    assert json.loads(json.dumps(record)) == record
    assert (record["encoder_key"], record["encoder"]["name"]) == ("enc-1", "tiny")
    assert [entry["split"] for entry in record["fitted_on"] + record["chosen_on"]] == ["train", "val"]
    assert record["params"] == {"alpha": model.alpha_, "fit_intercept": True}
    assert RidgeRegression().fit(*store.numpy()).provenance_["fitted_on"] == []


@pytest.mark.parametrize("k", [1, 3])
def test_saved_and_loaded_is_the_same_model(images: Any, tmp_path: Path, k: int) -> None:
    store, test = images(), images(seed=3)
    model = RidgeRegression(fit_intercept=k == 1).fit(store, targets(store, k))
    loaded = RidgeRegression.load(model.save(tmp_path / "deep" / "ages.safetensors"))
    np.testing.assert_array_equal(loaded.predict(test), model.predict(test))
    assert loaded.predict(test).shape == targets(test, k).shape
    assert loaded.score(test, targets(test, k)) == model.score(test, targets(test, k))
    assert (loaded.alpha_, loaded.provenance_, loaded.n_features_in_) == (model.alpha_, model.provenance_, 12)
    np.testing.assert_array_equal(loaded.cv_errors_, model.cv_errors_)
    assert loaded.get_params()["fit_intercept"] == (k == 1)
    with pytest.raises(MismatchError, match="enc-1"):
        loaded.predict(images(encoder_key="enc-2"))
    with pytest.raises(HeadError, match="fit it again for the path"):
        loaded.path()


def test_each_loader_refuses_the_other_kind_of_file(images: Any, tmp_path: Path) -> None:
    store = images()
    regression = RidgeRegression().fit(store, targets(store, 1)).save(tmp_path / "regression.safetensors")
    classes = Ridge().fit(store).save(tmp_path / "classes.safetensors")
    with pytest.raises(HeadError, match=r"heads\.RidgeRegression\.load"):
        heads.load(regression)
    with pytest.raises(HeadError, match=r"read it with heads\.load"):
        RidgeRegression.load(classes)
    with pytest.raises(HeadError, match="not a classifier"):
        heads.save(RidgeRegression().fit(store, targets(store, 1)), tmp_path / "other.safetensors")
    with pytest.raises(HeadError, match="featcache fit"):
        RidgeRegression.load(tmp_path / "none")
