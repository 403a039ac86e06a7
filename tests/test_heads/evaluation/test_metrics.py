"""Metrics against scikit-learn and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss, recall_score, top_k_accuracy_score

from featcache.errors import HeadError
from heads import Metrics
from heads.evaluation.metrics import METRICS
from heads.kernels.tally import stats_of_arrays


def measure(logits: np.ndarray, labels: np.ndarray, block: int = 10**9, **options: int) -> dict[str, float]:
    metrics = Metrics(logits.shape[1], **options)
    for start in range(0, len(labels), block):
        metrics.update(logits[start : start + block], labels[start : start + block])
    return metrics.result()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 12), st.sampled_from([0.1, 3.0, 100.0]))
def test_equal_scikit_learns(seed: int, n: int, n_classes: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(n, n_classes)), rng.integers(0, n_classes, n)
    found, classes = measure(logits, labels), np.arange(n_classes)
    p = softmax(logits, axis=1)
    assert set(found) == set(METRICS)
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    if n_classes > 5:
        assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=classes))
    else:
        assert found["top5"] == 1.0
    present = np.unique(labels)
    recall = recall_score(labels, logits.argmax(1), average="macro", labels=present, zero_division=0.0)
    assert found["mean_per_class_recall"] == pytest.approx(recall)
    assert found["nll"] == pytest.approx(-log_softmax(logits, axis=1)[np.arange(n), labels].mean(), rel=1e-12)
    if scale < 100:
        assert found["nll"] == pytest.approx(log_loss(labels, p / p.sum(1, keepdims=True), labels=classes), rel=1e-9)
    assert found["nll_capped"] == pytest.approx(-np.log(p[np.arange(n), labels] + 1e-8).mean(), rel=1e-9)
    onehot = np.eye(n_classes)[labels]
    assert found["brier"] == pytest.approx(((p - onehot) ** 2).sum(axis=1).mean(), rel=1e-9, abs=1e-12)
    if n_classes == 2 and len(set(labels.tolist())) == 2:
        assert found["brier"] == pytest.approx(2 * brier_score_loss(labels, p[:, 1]), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 20))
def test_blocks_change_nothing(seed: int, n: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, 7)).astype(np.float32), rng.integers(0, 7, n)
    whole = measure(logits, labels)
    assert measure(logits, labels, block) == pytest.approx(whole, rel=1e-12)


def test_capped_nll_golden_value() -> None:
    found = measure(np.array([[100.0, 0.0, 0.0]]), np.array([1]))
    assert found["nll"] == 100.0
    assert found["nll_capped"] == pytest.approx(18.42068, abs=5e-6)


def test_ties_rank_by_index_as_argmax_does() -> None:
    labels = np.repeat(np.arange(10), 3)
    constant = measure(np.zeros((30, 10)), labels)
    assert constant["top1"] == pytest.approx(0.1)
    assert constant["top5"] == pytest.approx(0.5)
    assert constant["mean_per_class_recall"] == pytest.approx(0.1)
    assert constant["nll"] == pytest.approx(np.log(10))
    logits = np.random.default_rng(0).integers(0, 3, size=(500, 8)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 8, 500)
    order = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(stats_of_arrays(logits, y).rank, (order == y[:, None]).argmax(1))


def test_calibration_error_by_its_definition() -> None:
    rng = np.random.default_rng(3)
    logits, labels = 2 * rng.normal(size=(800, 4)), rng.integers(0, 4, 800)
    p = softmax(logits, axis=1)
    confidence, hit = p.max(1), p.argmax(1) == labels
    wanted = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        wanted += abs(hit[inside].sum() - confidence[inside].sum()) / 800
    assert measure(logits, labels)["ece"] == pytest.approx(wanted, rel=1e-9)
    assert measure(logits, labels, bins=1)["ece"] == pytest.approx(abs(hit.mean() - confidence.mean()))
    sure = np.where(np.eye(4)[labels] > 0, 200.0, 0.0)
    assert measure(sure, labels)["ece"] == 0.0


def test_brier_score_of_certain_rows() -> None:
    """Terms that cancel leave nothing below zero, and a row that is certainly wrong costs 2."""
    logits = np.float32(200) * np.eye(3, dtype=np.float32)
    assert measure(logits, np.arange(3))["brier"] == 0.0
    assert measure(logits, np.array([1, 2, 0]))["brier"] == pytest.approx(2.0)
    assert measure(np.zeros((4, 4)), np.arange(4))["brier"] == pytest.approx(0.75)


def test_recall_counts_only_classes_with_rows() -> None:
    logits = np.eye(4)[[0, 0, 1, 3]] * 5
    assert measure(logits, np.array([0, 0, 0, 3]))["mean_per_class_recall"] == pytest.approx((2 / 3 + 1) / 2)


def test_masked_classes_and_half_precision() -> None:
    logits = np.array([[1.0, -np.inf, 0.0]])
    assert measure(logits, np.array([0]))["nll"] == pytest.approx(np.log1p(np.exp(-1.0)))
    assert measure(logits, np.array([1]))["nll"] == np.inf
    half = (100 * np.random.default_rng(0).normal(size=(50, 9))).astype(np.float16)
    y = np.arange(50) % 9
    assert measure(half, y)["nll"] == pytest.approx(measure(half.astype(np.float64), y)["nll"], rel=1e-6)


@pytest.mark.parametrize("row", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf], [0.0, np.nan]])
def test_invalid_rows_are_refused(row: list[float]) -> None:
    for label in (0, 1):
        with pytest.raises(HeadError, match=r"rows \[0\]"):
            measure(np.array([row]), np.array([label]))


def test_bad_blocks_are_refused() -> None:
    metrics = Metrics(3)
    with pytest.raises(HeadError, match=r"expected \(2, 3\)"):
        metrics.update(np.zeros((2, 4)), np.array([0, 1]))
    with pytest.raises(HeadError, match="labels are float64, expected class indices"):
        metrics.update(np.zeros((2, 3)), np.array([0.0, 0.7]))
    with pytest.raises(HeadError, match=r"\[0, 3\], expected \[0, 2\]"):
        metrics.update(np.zeros((2, 3)), np.array([0, 3]))
    metrics.update(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(HeadError, match="no rows"):
        metrics.result()
    with pytest.raises(HeadError, match="2 classes"):
        Metrics(1)
