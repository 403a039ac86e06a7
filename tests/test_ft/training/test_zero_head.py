"""A head of zeros is new: it has no predictions to distil and no initial values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import batch_of, log, options, start, train

from featcache.errors import TrainingError
from ft.training.setup import Run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


def term(run: Run, name: str) -> float:
    batch = batch_of(run)
    with torch.no_grad():
        return float(run.stepper.terms(run.stepper.model.image_features(batch.images), None, batch)[name])


def move_head(run: Run, by: float) -> int:
    """Add a constant to every weight and bias of the head; returns their number."""
    parameters = [value for name, value in run.stepper.parameters.items() if name.startswith("head.")]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by)
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("given", [1.0, {"weight": 0.5, "temperature": 2.0}])
def test_logit_distillation_of_a_zero_head_is_refused(given: Any) -> None:
    with pytest.raises(TrainingError, match=r"logit_distillation with head 'zeros'.*expected a head.*zero_shot, ridge"):
        options(head="zeros", regularizers={"logit_distillation": given})


def test_feature_distillation_with_a_zero_head(model: str, tmp_path: Path) -> None:
    train(tmp_path, model, head="zeros", regularizers={"feature_distillation": 1.0}, lr=1e-2, log_every=1)
    values = [record["terms"]["feature_distillation"] for record in log(tmp_path)]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[2] > 0


def test_l2sp_ignores_a_zero_head(model: str) -> None:
    run = start(model, head="zeros", regularizers={"l2sp": 1.0})
    assert set(run.stepper.initial) == {name for name in run.stepper.parameters if name.startswith("clip.visual.")}
    assert move_head(run, 3.0) > 0
    assert term(run, "l2sp") == 0.0


def test_l2sp_with_beta_pulls_a_new_head_to_zero(model: str) -> None:
    run = start(model, head="zeros", regularizers={"l2sp": {"weight": 2.0, "beta": 0.25}})
    size = move_head(run, 3.0)
    assert term(run, "l2sp") == pytest.approx(2.0 * 0.5 * 0.25 * 9 * size, rel=1e-6)


def test_l2sp_pulls_a_fitted_head_to_its_initial_weights(model: str) -> None:
    run = start(model, regularizers={"l2sp": 1.0})
    assert "head.weight" in run.stepper.initial
    assert term(run, "l2sp") == 0.0
    size = move_head(run, 3.0)
    assert term(run, "l2sp") == pytest.approx(0.5 * 9 * size, rel=1e-5)
