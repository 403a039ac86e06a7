"""A sweep equals merging, encoding and evaluating each model by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_sections import check_sections
from small_pictures import write_pictures

import featcache
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.datasets.base import SampleIndex
from featcache.errors import EncoderError, HeadError, LabelsChangedError, MismatchError, TrainingError
from featcache.store import list_stores
from ft.checkpoints.folder import model_folder, read_state, weights_file, write_model_folder
from ft.merging.greedy import greedy
from ft.merging.interpolate import interpolate, soup
from ft.merging.sweep import WiseOptions, sweep, sweep_unchosen
from heads import LinearHead, ZeroShot, evaluate, load, save
from heads.fitted.provenance import Provenance

ALPHAS = [0.0, 0.5, 1.0]


class Few:
    """The first rows of a split of the digits, under another name."""

    decoding = prepared = opened_as = None

    def __init__(self, split: str, n: int = 60, name: str = "few") -> None:
        self.base, self.name, self.split = open_dataset("digits", split), name, split
        index = self.base.index
        self.index = SampleIndex(index.ids[:n], index.sizes[:n], index.stamps[:n], index.labels[:n], index.classnames)
        self.read, self.decode = self.base.read, self.base.decode


def disturbed(folder: Path, seed: int, size: float) -> Path:
    """`tiny` with another image tower."""
    state = read_state(weights_file(model_folder("tiny")))
    generator = torch.Generator().manual_seed(seed)
    for key, value in state.items():
        if key.startswith("visual.") and value.is_floating_point():
            state[key] = value + size * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    return write_model_folder("tiny", state, folder)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return disturbed(tmp_path / "tuned", 0, 0.3)


def by_hand(tuned: Path, alpha: float, dataset: Few, tmp_path: Path) -> dict:
    theta0, theta1 = (read_state(weights_file(model_folder(name))) for name in ("tiny", tuned))
    folder = write_model_folder("tiny", interpolate(theta0, theta1, alpha), tmp_path / f"hand{alpha}")
    model = f"local-dir:{folder}"
    text = featcache.embed_text(dataset.index.classnames, "digits", model)
    return evaluate([ZeroShot().fit(text)], [featcache.encode(dataset, model=model)])[0]


def test_a_sweep_equals_encoding_and_evaluating_every_merged_model(tuned: Path, tmp_path: Path) -> None:
    val, test = Few("val"), Few("test")
    found = sweep(
        "tiny", tuned, ALPHAS, tmp_path / "out", val, WiseOptions(on=[test], templates="digits", metric="nll")
    )
    assert [row["alpha"] for row in found.rows] == ALPHAS
    for row, alpha in zip(found.rows, ALPHAS, strict=True):
        for dataset in (val, test):
            expected = by_hand(tuned, alpha, dataset, tmp_path / dataset.split)
            for metric in ("top1", "nll"):
                key = f"few/val:{metric}" if dataset is val else f"few:{metric}"
                assert row[key] == pytest.approx(expected[f"few:{metric}"], abs=1e-6)
    nll = [row["few/val:nll"] for row in found.rows]
    assert found.alpha == ALPHAS[int(np.argmin(nll))]
    assert found.best["few:nll"] == found.rows[int(np.argmin(nll))]["few:nll"]


def test_the_best_model_and_its_head_are_saved(tuned: Path, tmp_path: Path) -> None:
    val, test = Few("val"), Few("test")
    found = sweep(
        "tiny", tuned, ALPHAS, tmp_path / "out", val, WiseOptions(on=[test], templates="digits", best_only=True)
    )
    head = load(found.head)
    store = featcache.encode(test, model=f"local-dir:{found.folder}")
    row = evaluate([head], [store])[0]
    assert row["few:top1"] == found.best["few:top1"]
    assert json.loads((found.folder / "provenance.json").read_text())["alpha"] == found.alpha
    with pytest.raises(HeadError, match="was chosen on few/val"):
        evaluate([head], [featcache.encode(val, model=f"local-dir:{found.folder}")])
    assert all("few/val:top1" in row and "few:top1" not in row for row in found.rows)  # the others were not encoded


def test_a_second_sweep_encodes_nothing(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = Few("val")
    first = sweep("tiny", tuned, ALPHAS, tmp_path / "out", val, WiseOptions(templates="digits"))
    stores = len(list_stores(tmp_path / "cache"))
    monkeypatch.setattr("featcache.encoders.openclip.OpenClipEncoder.encode_images", None)
    again = sweep("tiny", tuned, ALPHAS, tmp_path / "out", val, WiseOptions(templates="digits", overwrite=True))
    assert again.rows == first.rows
    assert len(list_stores(tmp_path / "cache")) == stores


def test_heads_are_interpolated_with_the_weights(tuned: Path, tmp_path: Path) -> None:
    val = Few("val")
    rng = np.random.default_rng(0)
    names = val.index.classnames
    one, two = (LinearHead(rng.normal(size=(10, 128)), rng.normal(size=10), names, f"h{k}") for k in range(2))
    paths = [save(head, tmp_path / f"{head.name}.safetensors") for head in (one, two)]
    found = sweep("tiny", tuned, [0.25], tmp_path / "out", val, WiseOptions(heads=paths))
    head: Any = load(found.head).linear()
    assert np.abs(head.weights - (0.75 * one.weights + 0.25 * two.weights)).max() < 1e-6
    assert np.abs(head.bias - (0.75 * one.bias + 0.25 * two.bias)).max() < 1e-6
    mixed = sweep(
        "tiny", tuned, [0.0], tmp_path / "zs", val, WiseOptions(heads=["zero_shot", paths[1]], templates="digits")
    )
    text = featcache.embed_text(names, "digits")
    assert np.abs(load(mixed.head).linear().weights - ZeroShot().fit(text).linear().weights).max() < 1e-5


def test_greedy_keeps_models_that_do_not_hurt() -> None:
    asked = []
    quality = {(0,): 0.5, (1,): 0.9, (2,): 0.8, (1, 2): 0.85, (0, 1): 0.9}

    def value(chosen: list[int]) -> float:
        asked.append(tuple(chosen))
        return quality[tuple(sorted(chosen))]

    assert greedy(3, value) == [1, 0]
    assert asked == [(0,), (1,), (2,), (1, 2), (1, 0)]


def test_a_greedy_soup_leaves_a_broken_model_out(tuned: Path, tmp_path: Path) -> None:
    models = [disturbed(tmp_path / "broken", 5, 30.0), tuned, disturbed(tmp_path / "good", 2, 0.05)]
    val, options = Few("val"), WiseOptions(templates="digits", metric="nll")
    found = sweep("tiny", models, [1.0], tmp_path / "out", val, replace(options, soup="greedy"))
    assert 0 not in found.ingredients
    expected = soup([read_state(weights_file(models[k])) for k in found.ingredients])
    assert all(torch.equal(value, expected[key]) for key, value in read_state(found.folder).items())
    uniform = sweep("tiny", models, [1.0], tmp_path / "uniform", val, options)
    assert uniform.ingredients == [0, 1, 2]
    assert found.best["few/val:nll"] < uniform.best["few/val:nll"]
    assert not (tmp_path / "out" / ".soup").exists()


def test_the_command_line(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, results = tmp_path / "out", tmp_path / "results.jsonl"
    command = ["wise", "tiny", str(tuned), "--alphas", "0", "1", "--out", str(out), "--templates", "digits"]
    assert main([*command, "--select", "digits:val", "--best-only", "--results", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "best on digits:val: alpha = " in shown
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["alpha"] for row in rows[:2]] == [0.0, 1.0]
    assert rows[2]["chosen_on"][-1]["split"] == "val"
    assert main([*command, "--on", "digits:test", "--best-only"]) == 2
    assert "--select" in capsys.readouterr().err


def test_the_page_shows_results_of_the_chosen_model_by_class(tmp_path: Path) -> None:
    select = f"{write_pictures(Path('pets/val'), 8).rpartition('/')[0]}:val"
    on = f"{write_pictures(Path('pets/test'), 12).rpartition('/')[0]}:test"
    models = ["tiny", str(disturbed(Path("tuned"), 0, 0.3))]
    assert main(["wise", *models, "--alphas", "0", "1", "--out", "out", "--select", select, "--on", on]) == 0
    store = featcache.encode("imagefolder:pets", "test", model="local-dir:out/best")
    check_sections(Path("out/report.html").read_text(), load("out/best_head.safetensors"), store)


@pytest.mark.parametrize("best_only", [False, True])
def test_selection_split_is_not_reported_as_a_shift(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, best_only: bool
) -> None:
    shifts = {name: Few("train", n, name) for name, n in (("drawn", 40), ("dim", 30))}
    places = {"val": Few("val", 10), "test": Few("test"), **shifts}
    monkeypatch.setattr("ft.training.loop.open_split", places.__getitem__)
    results = tmp_path / "results.jsonl"
    command = ["wise", "tiny", str(tuned), "--alphas", "0.25", "1", "--out", str(tmp_path / "out")]
    command += ["--templates", "digits", "--select", "val", "--on", "test", "drawn", "dim", "--results", str(results)]
    assert main([*command, *["--best-only"] * best_only]) == 0
    shown = capsys.readouterr().out
    selection, reported, *rest = shown.split("\n\n")
    assert selection.splitlines()[0].split() == ["few/val"]
    assert "wise α=0.25 " in selection
    assert "alpha=" not in selection + reported
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows = rows[-1:] if best_only else rows[:2]
    titles, _, *lines = reported.replace("*", "").splitlines()
    assert re.split(r"\s{2,}", titles.strip()) == ["few", "drawn", "dim", "shifted mean", "drop / rise"]
    for line, row in zip(lines, rows, strict=True):
        cells = line.split()[2:]
        assert cells[6:8] == [f"{100 * row['shifted_mean_top1']:.1f}", f"{row['shifted_mean_nll']:.3f}"]
        assert row["shifted_mean_top1"] == pytest.approx((row["drawn:top1"] + row["dim:top1"]) / 2)
        assert cells[0] == f"{100 * row['few:top1']:.1f}"
        assert cells[8] == f"{100 * (row['few:top1'] - row['shifted_mean_top1']):.1f}"
    assert " % there, best of 2" in rest[0]


def test_ties_go_to_the_lower_nll_then_to_the_smaller_alpha(tuned: Path, tmp_path: Path) -> None:
    val = Few("val", 3)
    found = sweep("tiny", tuned, [1.0, 0.0, 0.5], tmp_path / "out", val, WiseOptions(templates="digits"))
    top1 = max(row["few/val:top1"] for row in found.rows)
    tied = [row for row in found.rows if row["few/val:top1"] == top1]
    assert len(tied) > 1
    assert found.alpha == min(tied, key=lambda row: (row["few/val:nll"], row["alpha"]))["alpha"]
    assert found.best["chosen_on"][-1]["tied"] == len(tied)


def test_invalid_sweeps_are_refused(tuned: Path, tmp_path: Path) -> None:
    val, out = Few("val"), tmp_path / "out"
    with pytest.raises(TrainingError, match="uniform, greedy"):
        sweep("tiny", tuned, ALPHAS, out, val, WiseOptions(soup="stew"))
    with pytest.raises(TrainingError, match="expected 2"):
        sweep("tiny", tuned, ALPHAS, out, val, WiseOptions(heads=["zero_shot"]))
    other = save(LinearHead(np.zeros((2, 128)), np.zeros(2), ("a", "b")), tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="other classes"):
        sweep("tiny", tuned, ALPHAS, out, val, WiseOptions(heads=["zero_shot", other]))
    with pytest.raises(HeadError, match="unknown metric"):
        sweep("tiny", tuned, [0.0], out, val, WiseOptions(metric="luck"))
    (out / "best").mkdir(parents=True)
    with pytest.raises(EncoderError, match="already exists"):
        sweep("tiny", tuned, ALPHAS, out, val)


def start_and_chosen(folder: Path, rows: int = 25) -> list[Path]:
    """A head that has seen nothing, and one that was chosen on the first rows of the test split."""
    rng, names = np.random.default_rng(0), open_dataset("digits", "test").index.classnames
    chosen = Provenance(fitted_on=[]).chosen(featcache.encode(Few("test", rows, "validation")))
    records = {"start_head": Provenance(), "best_head": chosen}
    return [
        save(
            LinearHead(rng.normal(size=(10, 128)), rng.normal(size=10), names, "finetuned", record),
            f"{name}.safetensors",
        )
        for name, record in records.items()
    ]


def test_rows_that_chose_a_head_are_refused_before_anything_is_merged(tuned: Path, tmp_path: Path) -> None:
    heads, test, out = start_and_chosen(tmp_path), Few("test"), tmp_path / "out"
    with pytest.raises(
        HeadError, match=r"^25 of the 60 rows of few/test .* which best_head was chosen on.*--exclude-seen"
    ):
        sweep_unchosen("tiny", tuned, ALPHAS, out, WiseOptions(heads=heads, on=[test]))
    assert not out.exists()
    for seen in ("exclude", "allow"):
        options = WiseOptions(heads=heads, on=[test], seen=seen, overwrite=True)
        found = sweep_unchosen("tiny", tuned, ALPHAS, out, options)
        for row, folder, head in zip(found.rows, found.folders, map(load, found.heads), strict=True):
            features, labels = featcache.encode(test, model=f"local-dir:{folder}").numpy(np.float64)
            kept = slice(25, None) if seen == "exclude" else slice(None)  # at every alpha, the unseen start as well
            right = (features[kept] @ head.linear().weights.T + head.linear().bias).argmax(axis=1) == labels[kept]
            assert row["few:top1"] == pytest.approx(right.mean(), abs=1e-9)
            assert row.get("few:n_excluded") == (25 if seen == "exclude" else None)
    at_start = sweep_unchosen("tiny", tuned, [0.0], tmp_path / "start", WiseOptions(heads=heads, on=[test]))
    assert len(at_start.rows) == 1  # the head that was chosen has no share in it


def test_flags_for_seen_rows_and_what_was_left_out(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads, out = [str(head) for head in start_and_chosen(tmp_path)], tmp_path / "out"
    command = [
        "wise",
        "tiny",
        str(tuned),
        "--alphas",
        "0.5",
        "--out",
        str(out),
        "--heads",
        *heads,
        "--on",
        "digits:test",
    ]
    assert main(command) == 2
    assert "which best_head was chosen on" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--exclude-seen"]) == 0
    assert "25 rows that a head was fitted or chosen on left out of digits" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_another_class_order_is_refused_before_anything_is_merged(tuned: Path, tmp_path: Path) -> None:
    turned, out = Few("test", name="turned"), tmp_path / "out"
    turned.index = replace(turned.index, classnames=turned.index.classnames[::-1])
    for heads in (None, start_and_chosen(tmp_path)):
        with pytest.raises(MismatchError, match=r"first difference is class 0: .*--update-labels"):
            sweep_unchosen("tiny", tuned, [0.0], out, WiseOptions(heads=heads, on=[Few("test"), turned]))
        assert not out.exists()


def test_changed_labels_are_stored_on_request(tuned: Path, tmp_path: Path) -> None:
    test, options = Few("test"), WiseOptions(templates="digits", overwrite=True)
    before = sweep_unchosen("tiny", tuned, [0.5], tmp_path / "out", replace(options, on=[test]))
    test.index = replace(test.index, labels=np.roll(test.index.labels, 1))
    with pytest.raises(LabelsChangedError, match=r"--update-labels .*`wise`: with --overwrite"):
        sweep_unchosen("tiny", tuned, [0.5], tmp_path / "out", replace(options, on=[test]))
    after = sweep_unchosen("tiny", tuned, [0.5], tmp_path / "out", replace(options, on=[test], update_labels=True))
    assert after.rows[0]["few:top1"] != before.rows[0]["few:top1"]
