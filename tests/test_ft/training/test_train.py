"""Fine-tuning on a small data set: which parts are trained, equivalences, refusals."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import BATCH, N, Pictures, batch_of, log, options, start, train, weights
from safetensors.torch import load_file

from featcache.datasets.base import SampleIndex
from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.errors import DivergedError, TrainingError
from ft.training.loop import finetune
from ft.training.optim import lipsum_schedule, wise_ft_schedule
from ft.training.setup import Run
from ft.training.validation import Judged
from heads import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of the first update, at a learning rate of 0."""
    run.stepper.update(batch_of(run), 0.0)
    return {name: p.grad.clone() for name, p in run.stepper.parameters.items() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference, relative to the largest element."""
    assert one.keys() == two.keys()
    size = max(float(value.abs().max()) for value in one.values())
    return max(float((one[name] - two[name]).abs().max()) for name in one) / size


ALL_TERMS = {
    "lipsum": 1.0,
    "variance_covariance": 1.0,
    "l2sp": 0.1,
    "feature_distillation": 1.0,
    "logit_distillation": 1.0,
    "car": {"weight": 1.0, "templates": "digits"},
}


def test_regularisers_with_zero_at_start_are_zero_at_the_start(model: str, tmp_path: Path) -> None:
    train(tmp_path, model, steps=2, schedule="lipsum", regularizers=ALL_TERMS, log_every=1)  # first rate: exactly 0
    first = log(tmp_path)[0]["terms"]
    assert first["cross_entropy"] > 0.1
    assert first["variance_covariance"] > 0
    for name in ("lipsum", "l2sp", "feature_distillation", "logit_distillation", "car"):
        assert first[name] == pytest.approx(0.0, abs=1e-6), name


@pytest.mark.parametrize("mode", [{"mode": "bank", "bank": 300}, {"mode": "exact", "bank": 300}])
def test_lipsum_over_a_bank_is_zero_at_the_start_and_grows(mode: dict[str, Any], model: str, tmp_path: Path) -> None:
    train(tmp_path, model, regularizers={"lipsum": {"weight": 1.0, **mode}}, log_every=1)
    values = [record["terms"]["lipsum"] for record in log(tmp_path)]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[2] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"regularizers": {"lipsum": 0.1, "l2sp": 0.1}},
        {"regularizers": {"variance_covariance": 1.0}},
        {"objective": "contrastive", "templates": "digits"},
        {"objective": "contrastive", "templates": "digits", "regularizers": {"lipsum": 0.1}, "false_negatives": True},
    ],
    ids=["cross entropy", "separable terms", "variance-covariance", "contrastive", "contrastive with Lipsum"],
)
@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_equal_the_whole_batch(changes: dict[str, Any], parts: int, model: str) -> None:
    whole, split = (gradients(start(model, accumulate=number, **changes)) for number in (1, parts))
    assert largest_difference(whole, split) < 5e-6  # variances near zero amplify rounding


def test_naive_sums_over_micro_batches_differ(model: str) -> None:
    """The covariance of parts differs from that of the whole, so the test above cannot pass by accident."""
    run = start(model, accumulate=2, regularizers={"variance_covariance": 1.0})
    right = gradients(run)
    run.stepper._separable = True
    assert largest_difference(right, gradients(run)) > 1e-4


def test_activation_checkpointing_and_compilation_change_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(start(model))
    assert largest_difference(plain, gradients(start(model, checkpoint_activations=True))) < 1e-5
    compiled = []

    def compile_(function: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    assert largest_difference(plain, gradients(start(model, compile=True, regularizers={"lipsum": 1.0}))) < 1e-5
    assert len(compiled) == 2  # the trained tower and the frozen one: rounding is the same in both


LAST_LAYERS = ("visual.transformer.resblocks.1", "visual.ln_post", "visual.proj")


@pytest.mark.parametrize(
    ("changes", "moving"),
    [
        ({"train": ("head",)}, lambda name: False),
        ({"train": ("image",)}, lambda name: name.startswith("visual.")),
        (
            {"freeze_layers": 1},
            lambda name: name.startswith(("visual.transformer.resblocks.1", "visual.ln_post")) or name == "visual.proj",
        ),
        ({"objective": "contrastive"}, lambda name: True),
        (
            {"objective": "contrastive", "train": ("text",)},
            lambda name: not name.startswith("visual.") and name != "logit_scale",
        ),
    ],
    ids=["head", "image", "last layers", "contrastive", "text"],
)
def test_only_trained_parts_change(
    changes: dict[str, Any], moving: Callable[[str], bool], model: str, tmp_path: Path
) -> None:
    before = weights(Path(model.removeprefix("local-dir:")))
    after = weights(train(tmp_path, model, **changes).last)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {name for name in before if moving(name)}
    if "head" not in changes.get("train", ()):
        expected = {name for name in before if moving(name)}
        # rows of tokens that no caption has get no gradient, so a tensor may stay; most of them move
        assert len(moved) >= 0.8 * len(expected)


def test_the_optimiser_follows_both_schedules_to_the_last_digit(model: str, tmp_path: Path) -> None:
    train(tmp_path, model, steps=12, lr=3e-4, schedule="wise_ft", warmup=4, log_every=1)
    assert [record["lr"] for record in log(tmp_path)] == [wise_ft_schedule(step, 3e-4, 4, 12) for step in range(12)]
    train(tmp_path, model, steps=12, lr=3e-4, schedule="lipsum", log_every=1)
    assert [record["lr"] for record in log(tmp_path)] == [lipsum_schedule(step, 3e-4, 12) for step in range(12)]


@pytest.mark.parametrize(
    ("schedule", "total", "lr", "expected"),
    [
        ("wise_ft", 25020, 3e-5, {0: 6e-8, 249: 1.5e-5, 499: 3e-5, 500: 3e-5, 12760: 1.5e-5, 25019: 1.23e-13}),
        ("lipsum", 5000, 1e-5, {0: 0.0, 1: 2e-8, 250: 5e-6, 499: 9.98e-6, 500: 1e-5, 2500: 5.86824e-6}),
    ],
)
def test_optimiser_gets_the_published_rates(
    schedule: str, total: int, lr: float, expected: dict[int, float], model: str
) -> None:
    warmup = 500 if schedule == "wise_ft" else 0
    run = start(model, steps=total, lr=lr, schedule=schedule, warmup=warmup, layer_decay=0.5)
    batch = batch_of(run)
    for step, rate in expected.items():
        run.stepper.update(batch, run.rate(step))
        group = next(group for group in run.stepper.optimizer.param_groups if group["factor"] == 1.0)
        assert group["lr"] == pytest.approx(rate, rel=2e-3 if rate < 1e-12 else 1e-6, abs=0)


def test_layers_closer_to_the_pixels_learn_slower(model: str) -> None:
    factors = {
        name: group["factor"]
        for run in [start(model, layer_decay=0.5)]
        for group in run.stepper.optimizer.param_groups
        for name, parameter in run.stepper.parameters.items()
        if any(parameter is other for other in group["params"])
    }
    assert factors["head.weight"] == factors["clip.visual.proj"] == 1.0
    assert factors["clip.visual.transformer.resblocks.1.ln_1.bias"] == 0.5
    assert factors["clip.visual.transformer.resblocks.0.ln_1.bias"] == 0.25
    assert factors["clip.visual.conv1.weight"] == factors["clip.visual.class_embedding"] == 0.125


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_losses_are_close_to_float32(precision: str, model: str, tmp_path: Path) -> None:
    train(tmp_path / "wide", model, log_every=1)
    train(tmp_path / "half", model, log_every=1, precision=precision)
    wide, half = ([record["loss"] for record in log(tmp_path / name)] for name in ("wide", "half"))
    np.testing.assert_allclose(half, wide, rtol=0.1, atol=0.05)
    assert half != wide


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averaged_weights_are_saved(average: str, model: str, tmp_path: Path) -> None:
    changes = {"average": average, "ema_decay": 0.5, "swa_start": 0.0, "steps": 6, "schedule": "constant"}
    mean = weights(train(tmp_path / "average", model, **changes).last)
    models = [weights(train(tmp_path / str(n), model, steps=n, schedule="constant").last) for n in range(1, 7)]
    name = "visual.proj"
    if average == "swa":  # 24 images, batches of 8: an epoch is three updates
        expected = (models[2][name] + models[5][name]) / 2
    else:
        expected = weights(Path(model.removeprefix("local-dir:")))[name]
        for value in models:
            expected = 0.5 * expected + 0.5 * value[name]
    torch.testing.assert_close(mean[name], expected, rtol=1e-5, atol=1e-6)


def test_holding_an_average_restores_the_weights_after_evaluation(model: str) -> None:
    trained = start(model).stepper.model
    own = {name: value.clone() for name, value in trained.trained().items()}
    average = {name: value + 1 for name, value in own.items()}
    with trained.holding(average):
        assert all(torch.equal(value, average[name]) for name, value in trained.trained().items())
    assert all(torch.equal(value, own[name]) for name, value in trained.trained().items())


def test_equal_captions_are_not_negatives(model: str) -> None:
    """With one caption for all classes the loss is 0; plain InfoNCE costs ln of the number of copies."""
    dataset = Pictures()
    index = dataset.index
    dataset.index = SampleIndex(index.ids, index.sizes, index.stamps, index.labels, ("crane", "crane", "crane"))
    losses = []
    for false_negatives in (False, True):
        run = start(model, dataset, objective="contrastive", false_negatives=false_negatives)
        losses.append(float(run.stepper.update(batch_of(run), 0.0).terms["contrastive"]))
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert losses[1] > 0.5 * np.log(BATCH)


def test_untrained_text_tower_runs_once(model: str) -> None:
    run = start(model, objective="contrastive", train=("image", "logit_scale"), templates="digits")
    calls: list[Any] = []
    run.stepper.model.text_features = calls.append  # type: ignore[assignment,method-assign]
    before = run.stepper.update(batch_of(run), 0.0)
    assert not calls
    trained = start(model, objective="contrastive", templates="digits")
    again = trained.stepper.update(batch_of(trained), 0.0)
    torch.testing.assert_close(before.terms["contrastive"], again.terms["contrastive"])


class Poisoned(Pictures):
    """From the second epoch on, pictures are NaN."""

    def decode(self, content: bytes, row: int) -> np.ndarray:
        picture = super().decode(content, row).astype(np.float32)
        return picture if next(self.reads) < N + BATCH else picture * np.nan

    reads: Any = None


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(model: str, tmp_path: Path) -> None:
    dataset = Poisoned()
    dataset.reads = itertools.count()
    with pytest.raises(DivergedError, match=r"update 5: cross_entropy nan.*diverged.*last good checkpoint is kept"):
        train(tmp_path, model, dataset, steps=9, save_every=3)
    plain = weights(train(tmp_path / "plain", model, steps=9, save_every=3, eval_every=3).last)
    kept = weights(tmp_path / "last")
    assert all(value.isfinite().all() for value in kept.values() if value.is_floating_point())
    assert not torch.equal(kept["visual.proj"], plain["visual.proj"])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "resume.safetensors").values())
    assert json.loads((tmp_path / "last" / "provenance.json").read_text())["step"] == 3


def test_a_stored_prior_skips_the_frozen_pass_and_changes_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"regularizers": {"lipsum": 1.0, "logit_distillation": 1.0}, "augment": "wise_ft", "log_every": 1}
    online = weights(train(tmp_path / "online", model, **changes).last)
    recorded = weights(train(tmp_path / "recorded", model, prior="store", **changes).last)
    monkeypatch.setattr("ft.training.model.Frozen.image_features", None)  # must not be called
    read = weights(train(tmp_path / "read", model, prior="store", **changes).last)
    for name, value in online.items():
        assert torch.equal(value, recorded[name]), name
        assert torch.equal(value, read[name]), name
    assert log(tmp_path / "read")[2]["terms"]["lipsum"] > 0


def test_best_step_is_chosen_on_the_selection_split(model: str, tmp_path: Path) -> None:
    val = Pictures(12, seed=5, split="val")
    result = finetune(
        Pictures(), model, out=tmp_path, val=val, options=options(steps=9, eval_every=2, select="nll", lr=3e-3)
    )
    assert [row["step"] for row in result.judged] == [2, 4, 6, 8, 9]
    best = min(result.judged, key=lambda row: row["nll"])
    assert result.best_step == best["step"]
    head = load(result.best_head)
    store = encode(val, model=load_encoder(f"local-dir:{result.best}"))
    assert head.provenance["chosen_on"][0]["split"] == "val"
    head.check(store)
    logits = torch.from_numpy(head.logits(store.numpy()[0]))
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(store.labels))
    assert float(nll) == pytest.approx(best["nll"], abs=2e-3)


def test_ties_go_to_the_lower_nll_and_then_to_the_earlier_step(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [(0.5, 0.3), (0.75, 0.0489), (0.75, 0.0398), (0.75, 0.0398), (0.5, 0.01)]
    features = torch.zeros(12, 1)
    results = iter([Judged({"accuracy": accuracy, "nll": nll}, features) for accuracy, nll in given])
    monkeypatch.setattr("ft.training.loop.validate", lambda *_: next(results))
    result = finetune(
        Pictures(), model, out=tmp_path, val=Pictures(12, 5, "val"), options=options(steps=5, eval_every=1)
    )
    assert result.best_step == 3
    assert json.loads((result.best / "provenance.json").read_text())["judged"] == {"accuracy": 0.75, "nll": 0.0398}


def test_selecting_on_the_training_split_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is the training split"):
        finetune(Pictures(), model, out=tmp_path, val=Pictures(), options=options())


def test_an_unreadable_image_is_named(model: str, tmp_path: Path) -> None:
    dataset = Pictures()
    dataset.broken = 5
    with pytest.raises(Exception, match=r"train-5 cannot be read \(truncated\)"):
        train(tmp_path, model, dataset, shuffle=False)


def test_the_callers_random_state_is_left_alone(model: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(tmp_path, model, steps=1)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "hinge"}, "objective is 'hinge', expected 'cross_entropy' or 'contrastive'"),
        ({"lr": -1.0}, "lr is -1.0, expected a number above 0"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to 1,000,000,000"),
        ({"epochs": 2}, "epochs 2 and steps 3: give one of the two"),
        ({"train": ("vision",)}, r"train is \['vision'\], expected a list of values, each of them 'image', 'text'"),
        ({"train": ("text",)}, "not used by the objective cross_entropy"),
        ({"regularizers": {"ewc": 1.0}}, "regularizer 'ewc': expected one of lipsum"),
        ({"regularizers": {"l2sp": "much"}}, "weight 'much'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a number from 0 to below 1"),
        ({"schedule": "lipsum", "warmup": 5}, "warms up over a tenth"),
        ({"objective": "contrastive", "label_smoothing": 0.1}, "belongs to the objective cross_entropy"),
        ({"objective": "contrastive", "regularizers": {"logit_distillation": 1.0}}, "needs a head"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected a number above 0 and at most 1"),
        ({"batch_norm": True, "accumulate": 2}, "batch_norm needs the whole batch"),
    ],
)
def test_invalid_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "nowhere.safetensors"}, "no such file; expected zero_shot, zeros"),
        ({"batch_size": 25}, "the data set has 24 images; use a smaller --batch-size, or --no-drop-last"),
        ({"batch_size": 23, "drop_last": False, "regularizers": {"variance_covariance": 1.0}}, "would hold one image"),
        ({"accumulate": 9}, "only 8 images per update"),
        ({"freeze_layers": 3}, "has 2 blocks"),
        (
            {"regularizers": {"lipsum": {"weight": 1.0, "mode": "fresh"}}},
            "mode is 'fresh', expected 'random', 'bank' or 'exact'",
        ),
        ({"regularizers": {"l2sp": {"weight": 1.0, "gamma": 2}}}, "l2sp: unknown parameter gamma=2; expected beta"),
    ],
)
def test_options_that_do_not_fit_the_run_are_refused(
    changes: dict[str, Any], message: str, model: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(tmp_path / "run", model, **changes)
    assert not (tmp_path / "run").exists() or any((tmp_path / "run").iterdir())  # no empty folder is left


def test_folder_with_other_files_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(TrainingError, match="is not the folder of a run"):
        train(tmp_path, model)


@pytest.mark.nightly
def test_compiled_tower_has_the_same_gradients(model: str) -> None:
    changes = {"regularizers": {"lipsum": 1.0}}
    plain, compiled = (gradients(start(model, compile=on, **changes)) for on in (False, True))
    assert largest_difference(plain, compiled) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_losses_equal_cpu_losses(precision: str, model: str, tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        changes = options(
            log_every=1, precision=precision, regularizers=ALL_TERMS, average="ema", compile=device == "cuda"
        )
        finetune(Pictures(), model, out=out, options=changes, device=device)
        losses.append([record["loss"] for record in log(out)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3 if precision == "fp32" else 0.1)
