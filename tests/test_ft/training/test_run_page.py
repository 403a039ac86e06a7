"""The page of a fine-tuning run, from its log and options."""

import json
import re

import pytest

from ft.training.page import write_run_page

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


def test_of_a_resumed_run_the_later_line_of_an_update_counts(run):
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
