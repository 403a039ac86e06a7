"""The tables of heads run on drawn features: every head is there, beside scikit-learn's."""

import json
from pathlib import Path

import numpy as np
import pytest

import heads
from benchmarks import table_channels, table_choosing, table_heads
from heads.combine.interpolate import ALPHAS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features of three classes with a text head, in the files' form."""
    rng = np.random.default_rng(0)
    means = np.linalg.qr(rng.normal(size=(8, 3)))[0].T

    def split(name: str, per_class: int) -> dict[str, np.ndarray]:
        labels = np.repeat(np.arange(3), per_class)
        rows = means[labels] + 0.3 * rng.normal(size=(len(labels), 8))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return {f"{name}_features": rows.astype(np.float16), f"{name}_labels": labels}

    np.savez(tmp_path / "toys.npz", **split("train", 16), **split("val", 8), **split("test", 30))
    text = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    np.savez(tmp_path / "imagenet_fewshot.npz", **split("train", 8), **split("test", 40), text_weights=text)
    return tmp_path


def test_tables_hold_every_head_and_its_peer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    flags = ["--shots", "2", "4", "--seeds", "0", "1", "--imagenet-shots", "8", "--work", str(folder / "work")]
    command = [str(folder), "--out", str(out), "--sets", "toys", *flags]
    table_heads.main(command)
    record = json.loads((out / "heads-table.json").read_text())
    by_head = {row["head"]: row for row in record["full"]}
    labels = {table_heads.label_of(grid.name, grid.fixed) for grid in table_heads.IMAGE_HEADS}
    assert labels < set(by_head)
    assert all("against logistic" in by_head[label] for label in labels - {"logistic"})
    assert abs(by_head["ridge"]["top1"] - by_head["scikit-learn RidgeClassifierCV"]["top1"]) < 0.03
    assert len(record["few_shot"]) == len(labels) * 2 * 2
    last = [row for row in record["imagenet"] if row["shots"] == 8]
    combined = [row for row in last if "against zero_shot" in row]
    alone = {row["head"] for row in last} - {row["head"] for row in combined}
    assert alone == {"ridge", "logistic", "discriminant", "nearest_mean"}
    assert {row["head"] for row in combined} >= {*table_heads.TEXT_HEADS, "ridge to prior", "logistic to prior"}
    for name in ("ridge", "logistic", "discriminant", "nearest_mean"):  # beside its parents, alpha by folds of train
        (row,) = (row for row in combined if row["head"] == f"{name}, alpha by folds")
        assert {key for key in row if key.startswith("against ")} == {"against zero_shot", f"against {name}"}
        assert (row["params"]["selection"], row["params"]["folds"], row["params"]["candidates"]) == ("folds", 5, 21)
        assert row["alpha"] in ALPHAS
    for row in combined:
        low, high = row["against zero_shot"]["top1"][1:]
        assert low <= row["against zero_shot"]["top1"][0] <= high
    page = (out / "heads-table.md").read_text()
    shown = capsys.readouterr().out
    assert page.strip() in shown
    assert "imagenet, 8 rows: discriminant, alpha by folds: " in shown  # a line a fit, as it is done
    assert "95% paired bootstraps" in page
    assert "not told apart from zero_shot: " in page
    table_heads.main(command)  # finished rows are not made again
    again = json.loads((out / "heads-table.json").read_text())
    assert {**again, "machine": 0} == {**record, "machine": 0}
    assert "alpha by folds: " not in capsys.readouterr().out


def test_differences_that_are_not_significant_stand_in_brackets() -> None:
    rows = [
        {"data": "toys/train", "head": head, "setting": {}, "shots": 4, "seed": seed, "toys:top1": top1}
        for head, found in {"logistic": (0.5, 0.6), "ridge": (0.6, 0.7001), "knn": (0.4, 0.8)}.items()
        for seed, top1 in enumerate(found)
    ]
    lines = table_heads._differences(rows).splitlines()
    assert lines[2:] == ["| ridge | +10.0 ± 0.1 |", "| knn | [+5.0 ± 190.6] |"]  # t of one degree of freedom: 12.706


def test_ways_of_choosing_are_compared_with_zero_shot(folder: Path) -> None:
    shots = ["--shots", "2", "--seeds", "1"]
    table_choosing.main([str(folder), "--out", str(folder / "out"), "--sets", "toys", *shots])
    rows = json.loads((folder / "out" / "choosing.json").read_text())["rows"]
    of_set = 2 * (len(table_choosing.ALONE) + len(table_choosing.NEIGHBOURS))
    combined = [row["head"] for row in rows if "against zero-shot" in row]
    assert combined == [*table_choosing.TO_PRIOR, "gda", "Tip-Adapter, top1", "Tip-Adapter, nll"]
    few = [(row["data"], row["head"], row["metric"]) for row in rows if "shots" in row]
    metrics = [("toys", head, metric) for head, known in table_choosing.LOSSES.items() for metric in known]
    with_texts = [("imagenet_fewshot", head, m) for head in table_choosing.WITH_TEXTS for m in ("top1", "nll")]
    assert few == [*metrics, *with_texts]
    transductive = [row["head"] for row in rows if "before" in row]
    assert transductive[:2] == ["transclip on zero-shot", "transclip on gda"]
    assert len(rows) == of_set + 1 + len(combined) + len(few) + len(transductive)
    assert (folder / "out" / "choosing.md").read_text().count("\n| ") == len(rows) + 3
    stores = table_heads.stores_of(folder, "toys")
    by_hand = heads.Ridge(metric="nll").fit(heads.few_shot(stores["train"], 2, 1))
    row = next(row for row in rows if row.get("shots") and row["metric"] == "nll")
    assert row["top1"] == pytest.approx(by_hand.score(stores["test"]))


def test_all_channels_are_tip_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table_channels.main([str(folder), "--channels", "8", "4", "--shots", "4"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [["4", "8"], ["4", "4"]]
    stores = table_heads.stores_of(folder, "imagenet_fewshot")
    text = table_heads.zero_shot_head(folder, stores["train"])
    head = heads.TipAdapter().fit(heads.few_shot(stores["train"], 4, 0), texts=text)
    assert float(lines[0][2]) == pytest.approx(100 * head.top1_.max(), abs=0.06)
    (row,) = heads.evaluate([head], [stores["test"]])
    assert float(lines[0][3]) == pytest.approx(100 * row["imagenet_fewshot:top1"], abs=2)  # ties go to the lower NLL


def test_channels_are_ranked_by_similarity_less_variance() -> None:
    T = np.random.default_rng(0).normal(size=(4, 6))
    pairs = [T[i] * T[j] for i in range(4) for j in range(4) if i != j]
    wanted = 0.7 * np.mean(pairs, axis=0) - 0.3 * T.var(axis=0)
    assert table_channels.ranked_channels(T).tolist() == np.argsort(wanted).tolist()
