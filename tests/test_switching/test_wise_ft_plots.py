"""Results files of WiSE-FT, and our rows as its plotting script reads them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from featcache.cli.main import main

ZERO_SHOT = {"ImageNet": 0.633, "ImageNetV2": 0.559, "ImageNetR": 0.693, "ImageNetA": 0.316, "ImageNetSketch": 0.423}
TUNED = {"ImageNet": 0.760, "ImageNetV2": 0.650, "ImageNetR": 0.600, "ImageNetA": 0.220, "ImageNetSketch": 0.400}
SHIFTS = [name for name in ZERO_SHOT if name != "ImageNet"]


@pytest.fixture
def results(tmp_path):
    """As ``src/wise_ft.py`` appends them: all arguments, then the metrics; a list of alphas while it trains."""
    arguments = {
        "data_location": "~/data",
        "eval_datasets": list(ZERO_SHOT),
        "train_dataset": "ImageNet",
        "template": "t",
        "classnames": "openai",
        "exp_name": None,
        "results_db": "results.jsonl",
        "model": "ViT-B/32",
        "wd": 0.1,
        "batch_size": 512,
        "lr": 3e-5,
        "epochs": 2,
        "freeze_encoder": False,
        "fisher": None,
        "device": "cuda",
    }
    rows = [
        {
            **arguments,
            "alpha": [0, 0.5, 1],
            "current_epoch": e,
            **{f"{d}:top1": TUNED[d] - 0.1 * (1 - e) for d in TUNED},
        }
        for e in range(2)
    ]
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        mixed = {f"{d}:top1": (1 - alpha) * ZERO_SHOT[d] + alpha * TUNED[d] for d in ZERO_SHOT}
        rows.append({**arguments, "alpha": alpha, **mixed})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_plot_per_shift_and_the_mean(results, tmp_path):
    assert main(["report", str(results), "-o", str(tmp_path / "plots")]) == 0
    names = {path.name for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"accuracy.png", *(f"accuracy-{shift}.png" for shift in SHIFTS)}
    for name in names:
        with Image.open(tmp_path / "plots" / name) as picture:
            assert min(picture.size) > 600


def test_plots_have_logit_axes_in_steps_of_five_and_wise_ft_s_markers(results, tmp_path):
    from heads.report.plots import plot_robustness
    from heads.report.read import is_epoch, latest, read_rows

    rows = latest(row for row in read_rows([results]) if not is_epoch(row))
    chosen = {"datasets": ["ImageNet", "ImageNetR"], "reference": "ImageNet"}
    svg = plot_robustness(rows, tmp_path / "r.svg", **chosen).read_text()
    labels = re.findall(r"<!-- (\d+) -->", svg)
    assert {"65", "70", "75"} <= set(labels)
    assert all(int(label) % 5 == 0 for label in labels if label != "1")  # which names alpha 1
    # Markers are drawn as uses of three shapes: a star at alpha 0, a diamond at 1, thin diamonds along the line.
    places = [(float(x), float(y)) for x, y in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"', svg)]
    alphas = np.linspace(0, 1, 5)
    expected = [
        np.log(p / (1 - p))
        for p in ((1 - alphas) * ZERO_SHOT[name] + alphas * TUNED[name] for name in ("ImageNet", "ImageNetR"))
    ]
    runs = [np.array(places[i : i + 5]).T for i in range(len(places) - 4)]
    assert any(all(_linear(*pair) for pair in zip(run, expected, strict=True)) for run in runs)


def _linear(pixels, values):
    return np.ptp(pixels) > 0 and abs(np.corrcoef(pixels, values)[0, 1]) > 1 - 1e-9


def test_rows_of_epochs_become_a_chart_not_heads(results, tmp_path, capsys):
    assert main(["report", str(results), "-o", str(tmp_path / "plots"), "--format", "csv"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 5
    assert printed[0].startswith("head,alpha,model,ImageNet:top1,ImageNetV2:top1")
    page = (tmp_path / "plots" / "report.html").read_text()
    assert "Accuracy by epoch" in page


def test_a_file_of_epochs_alone_is_shown_too(results, tmp_path, capsys):
    rows = [line for line in results.read_text().splitlines() if "current_epoch" in line]
    results.write_text("\n".join(rows) + "\n")
    assert main(["report", str(results), "--metric", "top1"]) == 0
    assert "76.0" in capsys.readouterr().out


def their_points(path, shift):
    """What scatter_plot.py draws: rows with a float alpha, ImageNet's accuracy against the shift's."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if isinstance(row.get("alpha"), float)]
    return sorted((row["alpha"], row["ImageNet:top1"], row[f"{shift}:top1"]) for row in kept)


def test_our_rows_have_the_keys_that_their_script_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for source, name in (("digits", "ImageNet"), ("digits:noisy", "ImageNetV2")):
        assert main(["encode", source, "--split", "test", "--name", name, "--quiet"]) == 0
    assert main(["text", "digits", "--templates", "digits", "--quiet"]) == 0
    assert main(["fit", "zero_shot", "texts/digits", "-o", "zs.safetensors"]) == 0
    assert main(["fit", "nearest_mean", "ImageNet/test", "-o", "mean.safetensors"]) == 0
    heads = ["zs.safetensors", "mean.safetensors"]
    evaluate = ["evaluate", *heads, "--on", "ImageNet/test", "ImageNetV2/test", "--alphas", "0", "0.5", "1"]
    assert main([*evaluate, "--results", "ours.jsonl"]) == 0
    points = their_points(tmp_path / "ours.jsonl", "ImageNetV2")
    assert [alpha for alpha, *_ in points] == [0.0, 0.5, 1.0]
    assert all(0 < x <= 1 and 0 < y <= 1 for _, x, y in points)
