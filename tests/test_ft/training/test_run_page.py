"""The page of a fine-tuning run, from its log and options."""

import json
import re

import numpy as np
import pytest
import torch
from page_sections import check_sections
from PIL import Image

from featcache import encode
from featcache.encoders import load_encoder
from ft import finetune, write_state
from ft.training.loop import open_split
from ft.training.page import write_run_page
from heads import LinearHead, load, save

OPTIONS = {
    "featcache": "1",
    "model": "tiny<b>",
    "start": {"model": "tiny", "weights": ["abc"]},
    "dataset": {"name": "digits", "split": "train"},
    "val": {"name": "digits", "split": "val"},
    "steps": 4,
    "device": "cpu",
    "options": {"batch_size": 10, "lr": 1e-4, "train": ["image", "head"], "prompts": None},
}
LOG = [
    {"step": 2, "loss": 3.0, "terms": {"cross_entropy": 2.0, "l2sp": 1.0}, "lr": 1e-4, "seconds": 5.0},
    {"step": 2, "val": {"accuracy": 0.5, "nll": 1.5}},
    {"step": 4, "loss": 9.0, "terms": {"cross_entropy": 9.0}, "lr": 0.0, "seconds": 9.0},
    {"step": 4, "loss": 2.0, "terms": {"cross_entropy": 1.5, "l2sp": 0.5}, "lr": 0.0, "seconds": 8.0},
    {"step": 4, "val": {"accuracy": 0.75, "nll": 1.0}},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(OPTIONS))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG) + '{"step": 5')
    return tmp_path


def test_evaluations_losses_and_cost_are_shown(run):
    text = write_run_page(run).read_text()
    assert re.findall(r'<th scope="row">(update \d)</th><td data-v="([\d.]+)"', text)[:2] == [
        ("update 2", "0.5"),
        ("update 4", "0.75"),
    ]
    assert "digits/val" in text
    assert "5.0 images/s" in text  # 40 images in 8 seconds
    assert "tiny&lt;b&gt; fine-tuned on digits/train" in text
    assert "image, head" in text


def test_cost_counts_the_images_of_smaller_batches(run):
    (run / "options.json").write_text(json.dumps(OPTIONS | {"steps": 4, "images": 24}))
    text = write_run_page(run).read_text()
    assert "4, over 24 images" in text
    assert "3.0 images/s" in text  # 24 images in 8 seconds


def test_the_later_log_line_of_an_update_counts_after_resuming(run):
    text = write_run_page(run).read_text()
    tips = re.findall(r'data-t="(\w+)\nupdate (\d)\nloss ([\d.]+)"', text)
    assert tips == [
        ("loss", "2", "3"),
        ("loss", "4", "2"),
        ("cross_entropy", "2", "2"),
        ("cross_entropy", "4", "1.5"),
        ("l2sp", "2", "1"),
        ("l2sp", "4", "0.5"),
    ]


def test_a_run_without_a_selection_split_says_so(run):
    (run / "log.jsonl").write_text(json.dumps(LOG[0]) + "\n")
    text = write_run_page(run).read_text()
    assert "There is no selection split" in text
    assert '<section id="results">' not in text


def test_results_of_the_best_checkpoint_are_shown_by_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog", "<script>")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for k in range(4 if split == "train" else 5):
                pixels = np.clip(rng.normal(60 + 60 * label, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{k}.png")
    options = {"steps": 3, "batch_size": 4, "eval_every": 1, "lr": 1e-6}
    result = finetune("imagefolder:pets", out="run", val="imagefolder:pets:val", options=options, root="stores")
    val = open_split("imagefolder:pets:val")
    text = write_run_page("run", val).read_text()

    best = encode(val, model=load_encoder(f"local-dir:{result.best}"), root="stores")  # the truth, by another way
    check_sections(text, load(result.best_head), best)
    assert f"those of update {result.best_step} on pets/val" in text


def test_features_of_another_update_are_left_alone(tmp_path, run):
    write_state({"features": torch.zeros(297, 128)}, run / "best_val.safetensors", {"step": "2"})
    provenance = {"params": {"step": 4}, "classnames": [str(c) for c in range(10)]}
    head = LinearHead(np.zeros((10, 128)), np.zeros(10), tuple(map(str, range(10))), provenance=provenance)
    save(head, run / "best_head.safetensors")
    assert "Confusions" not in write_run_page(run, open_split("digits:val")).read_text()
