"""Loaded heads where scikit-learn and torch take fitted models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from heads import KNN, LogitHead, Ridge, load


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    X = rng.normal(size=(3, 8))[y] + 0.7 * rng.normal(size=(120, 8))
    return X.astype(np.float32), np.array(["ant", "bee", "cat"])[y]


@pytest.fixture(scope="module", params=[Ridge, KNN])
def head(request: pytest.FixtureRequest, data: tuple[np.ndarray, np.ndarray], tmp_path_factory) -> LogitHead:
    path: Path = tmp_path_factory.mktemp("head") / "head.safetensors"
    request.param().fit(*data).save(path)
    return load(path)


def test_a_loaded_head_is_a_fitted_classifier(head: LogitHead, data: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = data
    assert is_classifier(head)
    check_is_fitted(head)
    assert clone(head) is head
    assert (head.classes_.tolist(), head.n_features_in_) == (["ant", "bee", "cat"], 8)
    found = ConfusionMatrixDisplay.from_estimator(head, X, y).confusion_matrix
    assert np.trace(found) / len(y) == pytest.approx(accuracy_score(y, head.predict(X)))
    assert make_pipeline(FrozenEstimator(head)).score(X, y) == head.score(X, y)
    calibrated = CalibratedClassifierCV(FrozenEstimator(head)).fit(X, y)
    assert calibrated.predict_proba(X).shape == (120, 3)
    with pytest.raises(HeadError, match="fitted already"):
        head.fit(X, y)
    assert len(repr(head)) < 80


def test_probabilities_follow_from_coef(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = data
    ridge = Ridge().fit(X, y)
    head: Any = load(ridge.save(tmp_path / "head.safetensors"))
    expected = softmax((X.astype(np.float64) @ ridge.coef_.T + ridge.intercept_) / ridge.temperature_, axis=1)
    np.testing.assert_allclose(ridge.predict_proba(X), expected, atol=1e-12)
    np.testing.assert_allclose(softmax(X @ head.coef_.T + head.intercept_, axis=1), expected, atol=1e-5)
    layer = head.to_torch()
    np.testing.assert_allclose(torch.softmax(layer(torch.from_numpy(X)), 1).detach(), expected, atol=1e-5)
    with torch.no_grad():
        layer.weight.zero_()
    assert np.abs(head.coef_).max() > 0


def test_a_head_without_weights_has_no_layer(data: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(HeadError, match="not linear"):
        KNN().fit(*data).frozen().to_torch()
