"""Every recipe can be read, holds the published numbers, and names its source and results."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from featcache.encoding.augment import AUGMENTATIONS
from featcache.errors import TrainingError
from featcache.prompts import load_templates
from ft.recipes import RECIPES, load_recipe, recipe_header
from ft.training.options import FinetuneOptions

FREE = {"accumulate", "checkpoint_activations", "compile", "ema_decay", "keep_every", "log_every", "prior"}
FREE |= {"save_every", "eval_start"}
FREE |= {"swa_start", "tensorboard", "workers"}
"""Options without influence on published results, and those of averages, which no recipe uses."""
OF_HEADS = {"head", "head_scale", "head_bias"}  # a contrastive run has none

USUAL: dict[str, Any] = {
    "objective": "cross_entropy",
    "objective_weight": 1.0,
    "head": "zero_shot",
    "templates": "openai-imagenet",
    "prompts": None,
    "false_negatives": False,
    "eval_templates": None,
    "eval_names": {},
    "shots": None,
    "train": ["image", "head"],
    "regularizers": {},
    "epochs": 10,
    "steps": None,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "warmup": 0,
    "clip": None,
    "label_smoothing": 0.0,
    "layer_decay": 1.0,
    "freeze_layers": 0,
    "lora_rank": 0,
    "lora_alpha": None,
    "lora_tower": "trained",
    "lora_targets": ["query", "key", "value"],
    "batch_norm": False,
    "average": "none",
    "preprocess": None,
    "seed": 0,
    "shuffle": True,
    "select": "accuracy",
    "eval_every": 0,
    "drop_last": True,
}
# Lipsum-FT: logits are s v W without bias, W kept apart from s; 10 % of warm-up within the schedule; towers in bf16
OF_LIPSUM = {"head_scale": "separate", "head_bias": False, "schedule": "lipsum", "augment": "lipsum"}
OF_LIPSUM |= {"precision": "bf16", "batch_size": 256, "lr": 1e-5}
LIPSUM = USUAL | OF_LIPSUM | {"epochs": None, "weight_decay": 0.0, "eval_every": 1000}
LIPSUM |= {
    "preprocess": "central-crop",
    "regularizers": {"lipsum": {"weight": 1.0, "mode": "random", "m": 80, "length": 8}},
}
# WiSE-FT: s inside the head, which has a bias; float32; 500 updates of warm-up; gradient norm of 1 at most
WISE = USUAL | {"head_scale": "folded", "head_bias": True, "schedule": "wise_ft", "warmup": 500, "clip": 1.0}
WISE |= {"precision": "fp32", "augment": "wise_ft", "batch_size": 512, "lr": 3e-5, "drop_last": False}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAIRS = {"objective": "contrastive", "train": ["image", "text", "logit_scale"], "precision": "fp32"}
TABLE: dict[str, dict[str, Any]] = {
    "lipsum_domainnet": LIPSUM | {"steps": 5_000},
    "lipsum_imagenet": LIPSUM | {"steps": 50_000},
    "plain_ft": USUAL | OF_LIPSUM,
    "lp_ft": USUAL | OF_LIPSUM | {"head": "logistic", "head_scale": "folded", "head_bias": True, "templates": "simple"},
    "wise_ft": WISE,
    "regft": WISE
    | {"batch_size": 128, "augment": "regft", "templates": "simple"}
    | {"regularizers": {"variance_covariance": {"weight": 1.0, "variance": 0.16, "covariance": 0.02}}},
    "flyp": WISE | PAIRS | {"lr": 1e-5, "clip": None, "drop_last": True},
    "carot": WISE
    | PAIRS
    | {"lr": 1e-5, "clip": None, "drop_last": True}
    | {
        "regularizers": {
            "orthogonality": {"weight": 0.2},
            "self_distillation": {"weight": 1.5, "start": 0.05, "decay": 0.9, "warmup": 0.2, "every": 500},
        }
    },
    "mnist_list": USUAL
    | PAIRS
    | {"templates": "bare", "false_negatives": True, "optimizer": "adam", "lr": 1e-6, "schedule": "constant"}
    | {"drop_last": False, "epochs": 20, "batch_size": 10, "augment": "none", "shuffle": False}
    | {"eval_templates": "clip-example", "eval_names": {str(digit): word for digit, word in enumerate(DIGITS)}},
    "transferlearning": USUAL
    | PAIRS
    | {"templates": "picture", "false_negatives": True, "optimizer": "adam", "lr": 5e-5, "schedule": "constant"}
    | {"drop_last": False}
    | {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2, "batch_size": 32, "augment": "none", "seed": 42},
}
"""Every option of the published runs; where the sources do not give one, the header names the choice."""

DIFFERENCES = ("first moment in bfloat16; here it is float32", "central 7/8", "--preprocess central-crop")
FIGURES: dict[str, tuple[str, ...]] = {
    "lipsum_domainnet": (
        *("Real 88.90/0.4246", "Painting 66.38/1.519", "Clipart 68.08/1.389"),
        *("Infograph 46.29/3.061", "Sketch 56.57/2.143"),
        "82.46/0.7305, 66.69/1.498, 65.57/1.524, 43.77/3.072, 56.98/2.046",
        *DIFFERENCES,
    ),
    "lipsum_imagenet": (
        "IN 83.32/0.5935 V2 73.56/1.011 R 75.86/0.9702 A 49.87/1.988 Sketch 51.48/2.127",
        "68.17/1.184, 61.98/1.490, 76.35/0.927, 52.00/1.924, 46.66/2.245",
        "0.05, 0.12, 0.14, 0.28, 0.12",
        "R 77.64, A 49.92, Sketch 48.16",  # the same zero-shot weights under OpenAI's own preparation
        *DIFFERENCES,
    ),
    "plain_ft": (
        "IN 83.62/0.601 V2 73.54/1.082 R 70.90/1.316 A 42.80/2.544 Sketch 50.15/2.442",
        "79.47/0.765, 68.24/1.301, 61.95/1.777, 23.69/3.875, 43.54/2.867",
    ),
    "lp_ft": ("IN 81.7 R 73.5 A 42.5 V2 72.1 Sketch 50.3 ObjectNet 55.1", "not known"),
    "wise_ft": (
        "IN V2 R Sketch ObjectNet A",
        *("0 68.3 61.9 77.6 48.2 53.0 49.8", "0.5 81.7 72.8 78.7 53.9 57.3 52.2", "1 81.3 70.9 65.6 46.3 49.6 36.7"),
        "IN 75.5, R 71.5, A 34.5, Sketch 47.0",
    ),
    "regft": ("no table of the paper", "50 a class", "10 for EuroSAT, Flowers and Pets", "inherited 1e-3"),
    "flyp": ("IN 82.6 R 71.6 A 48.9 V2 72.8 Sketch 49.6 ObjectNet 55.5", "not checked"),
    "carot": ("not quoted", "0.05 times the norm", "--false-negatives"),
    "mnist_list": (
        "digit labels RN50 58->60 RN101 54->68 B/16 66->88 B/32 44->68",
        "word labels RN50 34->54 RN101 38->48 B/16 54->82 B/32 22->32",
        "ln 5 = 1.609",
    ),
    "transferlearning": ("82.78 66.67 89.50 89.90",),
}


def test_recipes_of_the_published_systems_exist() -> None:
    assert set(RECIPES) == set(TABLE) == set(FIGURES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_published_numbers(name: str) -> None:
    options = FinetuneOptions.from_dict(load_recipe(name)).to_dict()
    unsaid = FREE | (OF_HEADS if options["objective"] == "contrastive" else set())
    assert set(options) == {option.name for option in fields(FinetuneOptions)}
    expected = {key: value for key, value in TABLE[name].items() if key not in unsaid}
    assert {key: value for key, value in options.items() if key not in unsaid} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_holds_the_published_results(name: str) -> None:
    header = " ".join(recipe_header(name).replace(" / ", "/").replace(" -> ", "->").split())
    assert not [figure for figure in FIGURES[name] if figure not in header]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_its_header_names_source_and_results(name: str) -> None:
    values = load_recipe(name)
    options = FinetuneOptions.from_dict(values)
    assert {key: options.to_dict()[key] for key in values if key != "regularizers"} == {
        key: value for key, value in values.items() if key != "regularizers"
    }
    assert options.augment in {"none", *AUGMENTATIONS}
    assert load_templates(options.templates)
    header = recipe_header(name)
    assert "Published" in header
    assert any(source in header for source in ("arXiv", "CLIP-fine-tune-example", "transferlearning/clip"))
    assert (options.steps is None) != (options.epochs is None)


def test_recipe_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# mine\nlr = 1e-3\n[regularizers]\nl2sp = 0.1\n")
    assert load_recipe(tmp_path / "mine.toml") == {"lr": 1e-3, "regularizers": {"l2sp": 0.1}}
    assert recipe_header(tmp_path / "mine.toml") == "mine"


def test_refuses_invalid_recipes(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("lr: 3")
    with pytest.raises(TrainingError, match="cannot be read as TOML"):
        load_recipe(tmp_path / "broken.toml")
    with pytest.raises(TrainingError, match="expected one of carot, flyp"):
        load_recipe("unknown")
