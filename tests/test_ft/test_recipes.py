"""Every recipe can be read, fits the options of a run, and says where it comes from."""

from pathlib import Path

import pytest

from featcache.augment import AUGMENTATIONS
from featcache.prompts import load_templates
from ft.errors import TrainingError
from ft.options import FinetuneOptions
from ft.recipes import RECIPES, load_recipe, recipe_header

WANTED = {"flyp", "lipsum_domainnet", "lipsum_imagenet", "lp_ft", "mnist_list", "plain_ft", "regft", "wise_ft"}


def test_the_published_systems_are_there() -> None:
    assert set(RECIPES) >= WANTED


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
    assert "arXiv" in header or "CLIP-fine-tune-example" in header
    assert (options.steps is None) != (options.epochs is None)


def test_lipsums_recipes_differ_in_length_alone() -> None:
    domainnet, imagenet = (load_recipe(f"lipsum_{name}") for name in ("domainnet", "imagenet"))
    assert (domainnet.pop("steps"), imagenet.pop("steps")) == (5000, 50000)
    assert domainnet == imagenet
    assert domainnet["regularizers"]["lipsum"] == {"weight": 1.0, "mode": "random", "m": 80, "length": 8}


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# mine\nlr = 1e-3\n[regularizers]\nl2sp = 0.1\n")
    assert load_recipe(tmp_path / "mine.toml") == {"lr": 1e-3, "regularizers": {"l2sp": 0.1}}
    assert recipe_header(tmp_path / "mine.toml") == "mine"


def test_refuses_what_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("lr: 3")
    with pytest.raises(TrainingError, match="cannot be read as TOML"):
        load_recipe(tmp_path / "broken.toml")
    with pytest.raises(TrainingError, match="expected one of flyp"):
        load_recipe("unknown")
