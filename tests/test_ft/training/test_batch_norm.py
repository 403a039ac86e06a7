"""Batch statistics come only from training batches, never from validation or frozen passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import BATCH, HERE, N, Pictures, batch_of, options, start, train, weights

from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.errors import TrainingError
from featcache.store import list_stores, open_prior_store
from ft.training.loop import finetune
from ft.training.model import Trainable
from ft.training.setup import Run
from ft.training.validation import validate
from heads import load

RESNET: dict[str, Any] = {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}}
DISTILLED = {"feature_distillation": 1.0}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("resnet"), make_model(**RESNET), **RESNET)


@pytest.fixture
def val() -> Pictures:
    return Pictures(12, seed=5, split="val")


def statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in module.named_buffers() if "running" in name or "tracked" in name}
    assert found
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


def modes(model: Trainable) -> list[str]:
    return [name for name, module in model.named_modules() if module.training]


def trained(model: str, steps: int = 2, **changes: Any) -> Run:
    run = start(model, batch_norm=True, **changes)
    for step in range(steps):
        run.stepper.update(batch_of(run, step), 1e-2)
    return run


def features(model: str, dataset: Pictures) -> torch.Tensor:
    """Features from `encode`, with running statistics."""
    encoder = load_encoder(model)
    return torch.from_numpy(encoder.encode_images([encoder.prepare(picture) for picture in dataset.pixels]))


def test_training_uses_and_updates_batch_statistics(resnet: str) -> None:
    run = start(resnet, batch_norm=True)
    model, images = run.stepper.model, batch_of(run).images
    before = statistics(model)
    run.stepper.update(batch_of(run), 0.0)
    after = statistics(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        whole, part = model.image_features(images), model.image_features(images[:4])
    assert float((whole[:4] - part).abs().max()) > 0.01 * float(whole.abs().max())


def test_validation_keeps_statistics_and_modes(resnet: str, val: Pictures) -> None:
    run = trained(resnet)
    model = run.stepper.model
    before, training = statistics(model), modes(model)
    assert training
    validate(model, run.stepper.objective, val, HERE, 1)
    assert same(statistics(model), before)
    assert modes(model) == training


def test_modes_are_restored_when_validation_fails(resnet: str, val: Pictures) -> None:
    run = trained(resnet)
    training = modes(run.stepper.model)
    val.broken = 3
    with pytest.raises(Exception, match="val-3 cannot be read"):
        validate(run.stepper.model, run.stepper.objective, val, HERE, 1)
    assert modes(run.stepper.model) == training


def test_validation_is_independent_of_the_batch_size(
    resnet: str, val: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(resnet)
    whole = validate(run.stepper.model, run.stepper.objective, val, HERE, 1).metrics
    monkeypatch.setattr("ft.training.validation.BATCH", 5)
    parts = validate(run.stepper.model, run.stepper.objective, val, HERE, 1).metrics
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-5)


def test_validation_does_not_change_the_trained_model(resnet: str, val: Pictures, tmp_path: Path) -> None:
    chosen = options(steps=4, eval_every=1, batch_norm=True)
    judging = finetune(Pictures(), resnet, out=tmp_path / "judging", val=val, options=chosen, device="cpu")
    alone = weights(train(tmp_path / "alone", resnet, steps=4, batch_norm=True).last)
    assert same(weights(judging.last), alone)
    untrained = weights(Path(resnet.removeprefix("local-dir:")))
    assert not torch.equal(alone["visual.bn1.running_mean"], untrained["visual.bn1.running_mean"])


def test_validation_results_equal_those_of_the_saved_model(resnet: str, val: Pictures, tmp_path: Path) -> None:
    chosen = options(steps=4, batch_norm=True, average="ema", ema_decay=0.5)
    result = finetune(Pictures(), resnet, out=tmp_path, val=val, options=chosen, device="cpu")
    store = encode(val, model=load_encoder(f"local-dir:{result.last}"))
    logits = torch.from_numpy(load(result.last_head).logits(store.numpy()[0])).double()
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(store.labels))
    assert result.judged[-1]["nll"] == pytest.approx(float(nll), abs=5e-3)


def test_frozen_passes_keep_all_statistics(resnet: str) -> None:
    run = trained(resnet)
    model, images = run.stepper.model, batch_of(run).images
    frozen = model.frozen()
    before = statistics(frozen.model), statistics(model)
    found = frozen.image_features(images)
    assert torch.equal(frozen.image_features(images), found)
    torch.testing.assert_close(frozen.image_features(images[:3]), found[:3], rtol=1e-4, atol=1e-5)
    assert same(statistics(frozen.model), before[0])
    assert same(statistics(model), before[1])
    run.stepper.update(batch_of(run, 2), 1e-2)
    assert torch.equal(frozen.image_features(images), found)


def test_v0_uses_running_statistics(resnet: str) -> None:
    run = trained(resnet, steps=3, regularizers=DISTILLED)
    batch = batch_of(run)
    assert run.stepper.prior is not None
    found = run.stepper.prior.features(batch.rows, 0, batch.images)
    torch.testing.assert_close(found, features(resnet, Pictures())[batch.rows], rtol=1e-4, atol=1e-5)


def test_stored_v0_does_not_depend_on_batch_norm(resnet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "with", resnet, batch_norm=True, prior="store", regularizers=DISTILLED)
    (entry,) = [entry for entry in list_stores(tmp_path / "cache") if entry.kind == "priors"]
    stored = torch.from_numpy(open_prior_store(entry.path).gather(np.arange(N)))
    torch.testing.assert_close(stored, features(resnet, Pictures()), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("ft.training.model.Frozen.image_features", None)
    train(tmp_path / "without", resnet, prior="store", regularizers=DISTILLED)


def test_layers_that_are_not_trained_keep_their_statistics(resnet: str) -> None:
    run = start(resnet, batch_norm=True, freeze_layers=2)
    before = statistics(run.stepper.model)
    run.stepper.update(batch_of(run), 1e-2)
    moved = {name for name, value in statistics(run.stepper.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layer3" in name or "layer4" in name}


def test_batch_norm_with_recomputation_or_micro_batches_is_refused() -> None:
    with pytest.raises(TrainingError, match="twice in their running statistics; leave one of the two off"):
        options(batch_norm=True, checkpoint_activations=True)
    with pytest.raises(TrainingError, match="needs the whole batch"):
        options(batch_norm=True, accumulate=BATCH)
