"""docs/switching.md: every line names tests that exist, and every habit of the five systems has a line."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from docs_pages import ROOT

PAGE = (ROOT / "docs" / "switching.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
TEST = re.compile(r"`(test_[\w/]+\.py)::(test_\w+)`")
HABITS = {
    "Lipsum-FT": [
        "80 templates, 1,000 ImageNet names, 345 DomainNet names",
        "--data_name imagenet2012",
        "--data_name domainnet",
        "`raw` (D, T, C)",
        "the shapes",
        "output `domainnet.ckpt`",
        "--clip_cls_init",
        "`visual_projection.ckpt` as input",
        "ten sets",
        "sets of equal shape",
        "`nll` with 1e-8",
        "200 logits",
        "DomainNetReal/acc",
        "TFDS",
        "and its defaults",
        "squared logit scale",
        "`best_acc.ckpt` as output",
        ".log`",
        "`best_acc.ckpt` as input",
        "the best model on all test sets",
    ],
    "RegFT": [
        "generate_datasets.py",
        "0001_0000.png",
        "--gpt_prompt_file",
        "--vc_reg",
        "learning rate 1e-3",
        "--alpha 0 0.1",
        "mixing_weights.py",
        "64shots",
        "CoOp's order",
        "--scheduler none",
        "--save-freq",
        "--lambda-ce",
        "--zeroshot-checkpoint",
    ],
    "The MNIST list example": [
        "data/MNIST_train_0.txt",
        "digits and words",
        "no shuffling",
        "loss per epoch",
        "before and after",
        "mnistCLIP.pt",
        "train the output layer",
    ],
    "WiSE-FT": [
        "val_in_folder",
        "CIFAR-10.1",
        "FMOWID",
        "IWildCamID",
        "ImageNetVidRobust",
        "YTBBRobust",
        "fmow_template",
        "--load zeroshot.pt,finetuned.pt",
        "--warmup_length",
        "--eval-datasets",
        "--freeze-encoder",
        "alphas of a linear classifier",
        "--alpha 0` is zero-shot",
        "ImageNet:top1",
        "scatter_plot.py",
        "features.pt",
        "--fisher",
        "wise_ft_alpha=0.500.pt",
        "ViT-B/32",
    ],
    "transferlearning/code/clip": [
        "Office-Home",
        "VisDA",
        "a picture of a X",
        "--mode zs",
        "--model 0..8",
        "tables of backbones x domains",
        "--mode fe",
        "--mode ft",
        "best epoch",
        "download_data.py",
        "its tables as data",
    ],
    "Probes and benchmarks": [
        "log_regression",
        "kNN",
        "linear evaluation",
        "released linear heads",
        "--task linear_probe",
        "mean_per_class_recall",
        "image_retrieval_recall@k",
        "mteb's image classification",
        "CachedEmbeddingWrapper",
        "open_clip's `linear_probe.py`",
        "multi-label",
        "linear_cross_entropy",
        "Ray Data",
        "UniBench",
    ],
}
"""System -> what the first column of its table has a line for: its commands, flags, files and tables."""


def lines(section: str) -> list[list[str]]:
    """The cells of a table's lines, without its head."""
    rows = [row for row in section.splitlines() if row.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[1:]]


@cache
def defined_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("system", HABITS)
def test_every_habit_has_a_line(system: str) -> None:
    first = [line[0] for line in lines(SECTIONS[system])]
    assert not [habit for habit in HABITS[system] if not any(habit in cell for cell in first)]


@pytest.mark.parametrize("system", HABITS)
def test_every_line_names_tests_that_exist(system: str) -> None:
    for line in lines(SECTIONS[system]):
        assert len(line) == 4, line
        named = TEST.findall(line[-1])
        assert named, f"no test: {line[0]}"
        for file, test in named:
            path = ROOT / "tests" / file
            assert path.is_file(), f"{line[0]}: no {file}"
            assert test in defined_in(path), f"{line[0]}: no {test} in {file}"


def test_no_page_has_a_table_of_its_own_for_other_systems() -> None:
    """One page says how to come over; the others link to it."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if page.name != "switching.md":
            found = re.search(
                r"^\| *(wise-ft|lipsum-ft|regft|transferlearning|clip-fine-tune)", page.read_text(), re.M | re.I
            )
            assert not found, page
    assert "docs/switching.md" in (ROOT / "README.md").read_text()
