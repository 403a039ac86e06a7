"""LoRA: only factors are trained, the saved model holds the sum, and a killed run resumes exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import Pictures, options, start, train, weights

import ft
from featcache.encoders import load_encoder
from featcache.errors import TrainingError
from ft.checkpoints.folder import read_state
from ft.training.loop import finetune
from ft.training.lora import LowRank, _matrices
from ft.training.options import FinetuneOptions
from ft.training.step import Stepper

LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": ("query", "value", "mlp")}
IN_PROJ = "visual.transformer.resblocks.0.attn.in_proj_weight"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_folder(tmp_path / "model", make_model())


def test_the_update_is_that_of_the_paper_block_by_block() -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(12, 5)))
    layer = LowRank(weight, 2, 1.5, (True, False, True), torch.Generator().manual_seed(0))
    assert torch.equal(layer(weight), weight)  # B is zero
    assert layer.lora_A.abs().max() <= 1 / np.sqrt(5)
    with torch.no_grad():
        layer.lora_B.copy_(torch.from_numpy(rng.normal(size=(2, 4, 2))))
    a, b = layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy()
    expected = weight.numpy().copy()
    expected[:4] += 1.5 * b[0] @ a[0]
    expected[8:] += 1.5 * b[1] @ a[1]
    np.testing.assert_allclose(layer(weight).detach().numpy(), expected, rtol=1e-12)


def test_the_saved_model_is_plain_and_has_the_outputs_of_the_trained_one(model: str, tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    images = torch.from_numpy(np.stack([Pictures(4).pixels[row] for row in range(4)]))
    update = Stepper.update

    def watched(self: Stepper, *args: Any) -> Any:
        done = update(self, *args)
        with torch.no_grad():
            found["features"] = self.model.image_features(images)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "update", watched)
        result = train(tmp_path / "run", model, lr=0.01, **LORA)
    state, before = weights(result.last), weights(tmp_path / "model")
    assert state.keys() == before.keys()
    saved: Any = load_encoder(f"local-dir:{result.last}", device="cpu")
    with torch.no_grad():
        features = saved.model.encode_image(saved.pixels(images))
    assert (features - found["features"]).abs().max() <= 1e-5
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == {
        f"visual.transformer.resblocks.{block}.{name}"
        for block in range(2)
        for name in ("attn.in_proj_weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    change = (state[IN_PROJ] - before[IN_PROJ]).chunk(3)
    assert torch.equal(change[1], torch.zeros(32, 32))  # the key is no target
    assert [int(torch.linalg.matrix_rank(part, rtol=1e-4)) for part in (change[0], change[2])] == [3, 3]
    assert saved.text_digest == load_encoder(model, device="cpu").text_digest
    merged = ft.wise(model, result.last, [0.5], tmp_path / "merged")[0]
    half = read_state(merged)[IN_PROJ]
    torch.testing.assert_close(half, 0.5 * (before[IN_PROJ] + state[IN_PROJ]))


def test_only_factors_and_what_train_names_are_trained(model: str) -> None:
    run = start(model, **LORA)
    names = set(run.stepper.parameters)
    assert {name for name in names if not name.startswith("head.")} == {
        name for name in dict(run.stepper.model.named_parameters()) if name.endswith(("lora_A", "lora_B"))
    }
    contrastive = start(model, objective="contrastive", lora_rank=2, lora_tower="text", train=("image", "text"))
    names = set(contrastive.stepper.parameters)
    assert "clip.visual.proj" in names  # the image tower is trained as a whole
    assert "clip.text_projection" not in names
    assert {name.rpartition(".")[2] for name in names if name.startswith("clip.transformer.")} == {"lora_A", "lora_B"}
    both = start(model, objective="contrastive", lora_rank=2)
    assert {name.rpartition(".")[2] for name in both.stepper.parameters} == {"lora_A", "lora_B", "logit_scale"}


def test_a_killed_run_resumes_bit_for_bit(model: str, tmp_path: Path) -> None:
    chosen = options(steps=4, save_every=2, average="ema", ema_decay=0.5, **LORA)
    whole = finetune(Pictures(), model, out=tmp_path / "whole", options=chosen, device="cpu")
    update, calls = Stepper.update, iter(range(3))

    def dies(self: Stepper, *args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            finetune(Pictures(), model, out=tmp_path / "killed", options=chosen, device="cpu")
    resumed = finetune(Pictures(), model, out=tmp_path / "killed", options=chosen, device="cpu")
    one, two = weights(whole.last), weights(resumed.last)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one[IN_PROJ], weights(tmp_path / "model")[IN_PROJ])


def test_matrices_under_the_names_of_other_libraries() -> None:
    shapes = {
        "visual.trunk.blocks.0.attn.qkv.weight": (12, 4),
        "visual.trunk.blocks.0.attn.proj.weight": (4, 4),
        "visual.trunk.blocks.0.mlp.fc1.weight": (8, 4),
        "visual.trunk.patch_embed.proj.weight": (4, 4),
        "text.encoder.layer.0.attention.self.query.weight": (4, 4),
        "text.encoder.layer.0.attention.output.dense.weight": (4, 4),
        "text.encoder.layer.0.intermediate.dense.weight": (8, 4),
        "text.encoder.layer.0.output.dense.weight": (4, 8),
        "text.token_embedding.weight": (9, 4),
    }
    whole = torch.nn.Module()
    for name, shape in shapes.items():
        module = whole
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))
    names = {id(parameter): name for name, parameter in whole.named_parameters()}

    def chosen(tower: str, *targets: str) -> dict[str, tuple[bool, ...]]:
        found = _matrices(whole, tower, targets)
        return {names[id(module.get_parameter(name))].split(".0.")[1]: blocks for module, name, blocks in found}

    assert chosen("image", "query", "key") == {"attn.qkv.weight": (True, True, False)}
    assert chosen("image", "out", "mlp") == {"attn.proj.weight": (True,), "mlp.fc1.weight": (True,)}
    assert chosen("text", "query", "value") == {"attention.self.query.weight": (True,)}
    assert set(chosen("text", "out", "mlp")) == {
        "attention.output.dense.weight",
        "intermediate.dense.weight",
        "output.dense.weight",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 2.0}, "give lora_rank too"),
        ({"lora_rank": 2, "lora_tower": "text"}, "the text tower is not trained"),
        ({"lora_rank": 2, "train": ("head",)}, "no tower is trained"),
        (
            {"lora_rank": 2, "lora_targets": ("q",)},
            r"lora_targets is \['q'\], expected a list of values, each of them 'query'",
        ),
        ({"lora_rank": 2, "regularizers": {"l2sp": 1.0}}, "l2sp penalises changes"),
        ({"lora_rank": -1}, "lora_rank is -1, expected a whole number from 0"),
    ],
)
def test_invalid_lora_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        FinetuneOptions(**changes)


def test_a_rank_beyond_the_width_is_refused(model: str) -> None:
    with pytest.raises(TrainingError, match="of the image tower has rank 32"):
        start(model, lora_rank=33)
