"""Groups, intervals and the page of multi-label heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from sklearn.metrics import average_precision_score, f1_score

import heads
from featcache.errors import HeadError
from heads.evaluation.multilabel import ScoreTable, _drawn, multilabel_intervals
from heads.report import write_report
from heads.report.remarks import worst_lines
from heads.report.results import write_samples
from heads.report.web import group_tables, multilabel_tables

GROUPS = np.array(["north", "south", "north", ""])


@pytest.fixture
def fitted(tagged: Any) -> Any:
    return heads.MultiLabelRidge().fit(tagged(), selection=tagged(seed=7, split="val", dataset_key="data-7"))


@pytest.fixture
def store(tagged: Any) -> Any:
    """A test split whose rows have a region, which is not known of every fourth."""
    found = tagged(seed=5, split="test", dataset_key="data-2")
    region = np.resize(GROUPS, len(found)).astype(object)
    return replace(found, metadata={"region": region})


def test_metrics_of_a_group_are_those_of_its_rows(fitted: Any, store: Any) -> None:
    (row,) = heads.evaluate([fitted], [store], groups=["region"])
    scores, Y, region = fitted.frozen().logits(store.X), store.targets, store.metadata["region"]
    found = row["animals:group_map_macro"]
    assert set(found) == set(GROUPS)
    for name in found:
        rows = (region == name) & store.valid
        precision = []
        for column in range(Y.shape[1]):
            known = rows & (Y[:, column] >= 0)
            if (Y[known, column] == 1).any():
                precision.append(average_precision_score(Y[known, column], scores[known, column]))
        assert found[name] == pytest.approx(np.mean(precision), abs=1e-9)
        assert row["animals:group_rows"][name] == rows.sum()
    worst = min(("north", "south"), key=lambda name: found[name])  # rows of no group are none
    assert (row["animals:worst_group"], row["animals:worst_group_map_macro"]) == (worst, found[worst])
    (table,) = group_tables([row])
    assert table.title == "mAP by group on animals, %"


def test_a_resample_is_a_weighted_sample() -> None:
    """Metrics of rows drawn so many times are scikit-learn's with these weights, equal scores included."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 3)).round(1)
    targets = (scores + rng.normal(size=scores.shape) > 0.5).astype(np.int8)
    targets[rng.random(targets.shape) < 0.1] = -1
    cuts, counts = np.array([0.0, 0.3, -0.2]), rng.integers(0, 4, (5, 60)).astype(np.float64)
    found = _drawn(scores, targets, cuts, counts)
    for k, weights in enumerate(counts):
        precision, f1 = [], []
        for column in range(3):
            known = targets[:, column] >= 0
            y, s, w = targets[known, column], scores[known, column], weights[known]
            precision.append(average_precision_score(y, s, sample_weight=w))
            f1.append(f1_score(y, s >= cuts[column], sample_weight=w))
        assert found["map_macro"][k] == pytest.approx(np.mean(precision), abs=1e-12)
        assert found["f1_macro"][k] == pytest.approx(np.mean(f1), abs=1e-12)
        y, s, w = targets.ravel(), (scores >= cuts).ravel(), np.repeat(weights, 3)
        micro = f1_score(y[y >= 0], s[y >= 0], sample_weight=w[y >= 0])
        assert found["f1_micro"][k] == pytest.approx(micro, abs=1e-12)


def test_a_class_without_a_drawn_positive_is_left_out() -> None:
    targets = np.array([[1, 0], [0, 1], [0, 0]], np.int8)
    scores = np.array([[3.0, 0.0], [1.0, 2.0], [2.0, 1.0]])
    found = _drawn(scores, targets, np.zeros(2), np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]]))
    assert found["map_macro"][0] == 1.0
    assert np.isnan(found["map_macro"][1])
    alone = ScoreTable(np.arange(3), np.zeros((3, 2), np.int8), scores[None].astype(np.float32), np.zeros((1, 2)))
    assert list(multilabel_intervals(alone, draws=10)[0]) == ["f1_micro_interval"]


def test_intervals_hold_the_value_and_narrow_with_rows(fitted: Any, store: Any, tagged: Any) -> None:
    larger = tagged(n=1600, seed=5, split="test", dataset_key="data-3")
    widths = []
    for split in (store, larger):
        judged = heads.judge([fitted], [split], per_sample=True)
        (row,) = heads.add_intervals(judged, draws=200)
        for metric in ("map_macro", "f1_macro", "f1_micro"):
            low, high = row[f"animals:{metric}_interval"]
            assert low < row[f"animals:{metric}"] < high
        widths.append(np.diff(row["animals:map_macro_interval"])[0])
    assert widths[1] < widths[0]
    with pytest.raises(HeadError, match="per_sample=True"):
        heads.add_intervals(heads.judge([fitted], [store]))


def test_the_page_has_a_table_of_classes(fitted: Any, store: Any, tmp_path: Path) -> None:
    rows = heads.evaluate([fitted], [store])
    (table,) = multilabel_tables(rows)
    names = [name for name, _ in table.lines]
    assert names == [name for name, value in rows[0]["animals:class_ap"].items() if value is not None]
    first = [cell.text for cell in table.lines[0][1]]
    values = [100 * rows[0][f"animals:class_{metric}"][names[0]] for metric in ("ap", "auroc", "f1")]
    assert first == [*(f"{value:.1f}" for value in values), str(rows[0]["animals:class_positives"][names[0]])]
    page, *_ = write_report(rows, tmp_path, metrics=["map_macro", "f1_macro"])
    assert "By class, multilabel_ridge on animals" in page.read_text()


def test_the_worst_of_several_stores_is_printed_by_its_map(fitted: Any, store: Any, tagged: Any) -> None:
    stores = [store, *(tagged(seed=seed, split="test", dataset_key=f"data-{seed}") for seed in (8, 9))]
    (row,) = heads.evaluate([fitted], stores, names=["a", "b", "c"])
    worst = min("bc", key=lambda name: row[f"{name}:map_macro"])
    (line,) = worst_lines([row])
    assert line == f"worst domain of multilabel_ridge: {worst}, {100 * row[f'{worst}:map_macro']:.1f} %"


def test_decisions_at_one_half_and_prevalences_are_reported(fitted: Any, store: Any) -> None:
    (row,) = heads.evaluate([fitted], [store])
    scores, Y = fitted.frozen().logits(store.X), store.targets
    known = Y >= 0
    said = 1 / (1 + np.exp(-scores)) >= 0.5
    by_class = [f1_score(Y[k, c], said[k, c]) for c, k in enumerate(known.T)]
    assert row["animals:f1_macro_at_half"] == pytest.approx(np.mean(by_class))
    assert row["animals:f1_micro_at_half"] == pytest.approx(f1_score(Y[known], said[known]))
    assert row["animals:subset_accuracy_at_half"] == ((said == Y) | ~known).all(axis=1).mean()
    prevalence = [(Y[:, c] == 1).sum() / known[:, c].sum() for c in range(Y.shape[1])]
    assert list(row["animals:class_prevalence"].values()) == pytest.approx(prevalence)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_logits_and_targets_of_every_sample_are_written(fitted: Any, store: Any, tmp_path: Path, suffix: str) -> None:
    judged = heads.judge([fitted], [store], per_sample=True)
    ids = [f"image {row}" for row in range(len(store))]
    path = write_samples(judged, tmp_path / f"samples{suffix}", {"animals": ids})
    scores = fitted.frozen().logits(store.X)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            np.testing.assert_array_equal(found["animals/logits"], scores[None])
            np.testing.assert_array_equal(found["animals/targets"], store.targets)
            np.testing.assert_array_equal(found["animals/thresholds"][0], fitted.thresholds_)
            assert found["animals/classnames"].tolist() == list(store.classnames)
            assert found["animals/ids"].tolist() == ids
        return
    frame = parquet.read_table(path).to_pandas()
    line = frame[(frame["id"] == "image 7") & (frame["class"] == store.classnames[1])].iloc[0]
    assert (line["logit"], line["target"], line["row"]) == (scores[7, 1], store.targets[7, 1], 7)
    assert len(frame) == store.targets.size
