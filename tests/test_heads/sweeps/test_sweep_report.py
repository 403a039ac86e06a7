"""Sweeps as rows and curves of a report: means and spreads over seeds."""

import json
from typing import Any

import numpy as np
import pytest

import featcache
import heads
from featcache.cli.main import main
from heads.sweeps.summary import summarise, summary_rows, sweep_curves

ACCURACY = np.random.default_rng(0).uniform(0.4, 0.9, (2, 3, 3))  # C, shots, seed
CS, SHOTS, SEEDS = (0.1, 10.0), (1, 4, 16), (0, 1, 2)


@pytest.fixture
def rows():
    found = []
    for i, C in enumerate(CS):
        for j, shots in enumerate(SHOTS):
            for k, seed in enumerate(SEEDS):
                value = float(ACCURACY[i, j, k])
                place = {"sweep": f"{i}{j}{k}", "data": "d/train", "model": None, "head": "logistic"}
                setting = {"setting": {"C": C}, "shots": shots, "seed": seed}
                found.append({**place, **setting, "d:top1": value, "d:nll": 1 - value, "select:top1": value})
    return found


def test_rows_are_means_over_seeds_with_their_spread(rows):
    found = summary_rows(summarise(rows))
    assert len(found) == len(CS) * len(SHOTS)
    row = next(row for row in found if row["head"] == "logistic, C=10.0, 4 shots")
    assert row["d:top1"] == pytest.approx(ACCURACY[1, 1].mean())
    assert row["d:top1_spread"] == pytest.approx(ACCURACY[1, 1].std(ddof=1))
    assert not any(key.startswith("select:") for key in row)


def test_curves_run_along_the_shots_one_line_per_setting(rows):
    (curve,) = sweep_curves(summarise(rows))
    assert (curve.x_label, curve.log, curve.title) == ("shots", True, "Accuracy on d by shots")
    for i, C in enumerate(CS):
        label = f"logistic, C={C}"
        np.testing.assert_allclose(curve.lines[label], np.column_stack([SHOTS, 100 * ACCURACY[i].mean(1)]))
        np.testing.assert_allclose(curve.spread[label], 100 * ACCURACY[i].std(1, ddof=1))


def test_a_parameter_with_three_values_has_a_curve_too(rows):
    more = [{**row, "setting": {"C": 100.0}} for row in rows if row["setting"]["C"] == 10.0]
    curves = sweep_curves(summarise([*rows, *more]))
    assert [curve.x_label for curve in curves] == ["shots", "C"]
    assert set(curves[1].lines) == {"logistic, 1 shot", "logistic, 4 shots", "logistic, 16 shots"}


def test_a_results_file_of_a_sweep_is_reported_as_its_means(rows, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:2]]))  # two rows appended twice
    assert main(["report", str(path), "-o", str(tmp_path / "out"), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(CS) * len(SHOTS)
    assert float(lines[1].split(",")[-2]) == pytest.approx(ACCURACY[0, 0].mean())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Accuracy on d by shots" in page
    assert f"± {100 * ACCURACY[0, 0].std(ddof=1):.1f}" in page


def test_sweep_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["encode", "digits", "--split", "val", "test", "--quiet"]) == 0
    command = ["sweep", "nearest_mean", "--train", "digits/val", "--on", "digits/test", "--shots", "1", "2", "--quiet"]
    assert main([*command, "--report", "rep", "--against", "published"]) == 0
    assert "no published figure for these results (model: " in capsys.readouterr().out
    assert "nearest_mean, 2 shots" in (tmp_path / "rep" / "report.html").read_text()


def test_the_report_shows_how_the_picked_setting_is_calibrated_and_what_it_confuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["encode", "digits", "--split", "val", "test", "--quiet"]) == 0
    assert main(["encode", "digits:inverted", "--split", "test", "--quiet"]) == 0
    command = ["sweep", "nearest_mean", "ridge", "--train", "digits/val", "--select", "digits-inverted/test"]
    assert main([*command, "--on", "digits/test", "--shots", "2", "--quiet", "--report", "rep"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    pick = max(rows, key=lambda row: row["select:top1"])
    page = (tmp_path / "rep" / "report.html").read_text()
    assert "after temperature scaling" in page
    assert f"Head: {pick['head']}, 2 shots." in page
    train, test = (featcache.find_store(f"digits/{split}") for split in ("val", "test"))
    kind = {"ridge": heads.Ridge, "nearest_mean": heads.NearestMean}[pick["head"]]
    select = featcache.find_store("digits-inverted/test")
    fitted = kind().fit(heads.few_shot(train, 2, 0), **({"selection": select} if pick["head"] == "ridge" else {}))
    truth, said = test.labels, fitted.predict(test.numpy()[0])
    wrong = {(a, b): int(((truth == a) & (said == b)).sum()) for a in range(10) for b in range(10) if a != b}
    (a, _), count = max(wrong.items(), key=lambda item: item[1])
    assert f"{count} of {int((truth == a).sum())} rows on digits" in page
    assert "data:image/" in page


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_means_over_seeds_leave_out_what_has_no_value(missing, place):
    """A draw without a positive of any class has no mAP, be it the first or not, read from a file or just computed."""
    values = [0.7, 0.9]
    values.insert(place, missing)
    base: dict[str, Any] = {"data": "d", "model": None, "head": "multilabel_ridge", "setting": {}, "shots": 1}
    (found,) = summarise([{**base, "seed": seed, "t:map_macro": value} for seed, value in enumerate(values)])
    assert found.mean["t:map_macro"] == pytest.approx(0.8)
    assert found.spread["t:map_macro"] == pytest.approx(np.std([0.7, 0.9], ddof=1))
