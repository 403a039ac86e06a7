"""Layers of parameters, from their names in towers of open_clip, timm and transformers."""

from typing import Any

import pytest
from clip_models import make_model, write_folder
from finetuning import start

from ft.training.layers import depths, lr_factors
from ft.training.setup import Run

TOWERS: dict[str, dict[str, int]] = {
    "open_clip ViT": {
        "class_embedding": 0,
        "conv1.weight": 0,
        "ln_pre.weight": 0,
        "transformer.resblocks.0.mlp.c_proj.weight": 1,
        "transformer.resblocks.10.attn.out_proj.weight": 11,
        "transformer.resblocks.11.ln_1.weight": 12,
        "ln_post.weight": 13,
        "proj": 13,
    },
    "open_clip ResNet": {
        "conv1.weight": 0,
        "bn3.bias": 0,
        "layer1.0.conv1.weight": 1,
        "layer1.2.bn3.weight": 1,
        "layer2.0.downsample.0.weight": 2,
        "layer3.5.conv2.weight": 3,
        "layer4.2.bn1.bias": 4,
        "attnpool.positional_embedding": 5,
        "attnpool.q_proj.weight": 5,
    },
    "timm ViT": {
        "trunk.pos_embed": 0,
        "trunk.patch_embed.proj.weight": 0,
        "trunk.patch_embed.norm.bias": 0,
        "trunk.norm_pre.weight": 0,
        "trunk.blocks.0.norm1.weight": 1,
        "trunk.blocks.1.attn.proj.bias": 2,
        "trunk.norm.weight": 3,
        "trunk.attn_pool.proj.weight": 3,
        "trunk.fc_norm.weight": 3,
        "head.proj.weight": 3,
    },
    "timm Swin": {
        "trunk.patch_embed.proj.weight": 0,
        "trunk.patch_embed.norm.weight": 0,
        "trunk.layers.0.blocks.1.attn.proj.weight": 1,
        "trunk.layers.1.downsample.norm.weight": 2,
        "trunk.norm.weight": 3,
        "head.proj.weight": 3,
    },
    "timm ConvNeXt": {
        "trunk.stem.0.weight": 0,
        "trunk.stem.1.weight": 0,
        "trunk.stages.0.blocks.2.norm.weight": 1,
        "trunk.stages.1.downsample.0.weight": 2,
        "trunk.head.norm.weight": 3,
        "head.mlp.fc1.weight": 3,
    },
    "timm ResNet": {
        "trunk.conv1.0.weight": 0,
        "trunk.bn1.weight": 0,
        "trunk.layer1.0.conv1.weight": 1,
        "trunk.layer2.3.downsample.1.weight": 2,
        "head.pool.proj.weight": 3,
    },
    "timm FastViT": {
        "trunk.stem.0.conv_kxk.0.conv.weight": 0,
        "trunk.stages.0.blocks.0.token_mixer.norm.bias": 1,
        "trunk.stages.1.downsample.proj.0.large_conv.conv.weight": 2,
        "trunk.final_conv.conv_kxk.0.conv.weight": 3,
        "trunk.head.fc.weight": 3,
    },
    "timm ViTamin": {
        "trunk.patch_embed.backbone.stem.conv1.weight": 0,
        "trunk.patch_embed.backbone.stages.1.blocks.3.norm.weight": 0,
        "trunk.patch_embed.proj.weight": 0,
        "trunk.blocks.0.attn.proj.weight": 1,
        "trunk.fc_norm.weight": 2,
    },
    "transformers RoBERTa": {
        "transformer.embeddings.LayerNorm.weight": 0,
        "transformer.encoder.layer.0.attention.output.dense.weight": 1,
        "transformer.encoder.layer.1.output.LayerNorm.weight": 2,
        "proj.0.weight": 3,
        "logit_scale": 3,
    },
    "transformers T5": {
        "transformer.shared.weight": 0,
        "transformer.encoder.block.0.layer.1.DenseReluDense.wo.weight": 1,
        "transformer.encoder.block.1.layer.0.layer_norm.weight": 2,
        "transformer.encoder.final_layer_norm.weight": 3,
        "proj.weight": 3,
    },
}

# timm's own smallest networks: 3 to 6 blocks, 64 wide
SMALL: dict[str, dict[str, Any]] = {
    "open_clip": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "vit": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "resnet": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160},
}
EMBEDDING = {
    "open_clip": ("conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3."),
    "vit": ("trunk.patch_embed.", "trunk.pos_embed", "trunk.cls_token", "trunk.reg_token", "trunk.norm_pre."),
    "convnext": ("trunk.stem.",),
    "resnet": ("trunk.conv1.", "trunk.bn1."),
}
FIRST = {"open_clip": "layer1.", "vit": "trunk.blocks.0.", "convnext": "trunk.stages.0.", "resnet": "trunk.layer1."}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("prefix", ["", "clip.visual."])
def test_layers_by_name(tower: str, prefix: str) -> None:
    expected = {prefix + name: depth for name, depth in TOWERS[tower].items()}
    assert depths(expected) == expected


@pytest.fixture(scope="module", params=SMALL)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name and model folder of a small network with that image tower."""
    changes = {"vision_cfg": SMALL[request.param]}
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_folder(folder, make_model(**changes), **changes)


def rates(run: Run) -> dict[str, float]:
    """The optimiser's learning-rate factor of each trained parameter of the image tower."""
    names = {id(parameter): name for name, parameter in run.stepper.parameters.items()}
    groups = run.stepper.optimizer.param_groups
    found = {names[id(parameter)]: group["factor"] for group in groups for parameter in group["params"]}
    return {name.removeprefix("clip.visual."): factor for name, factor in found.items() if "visual" in name}


def test_freezing_begins_with_the_embedding(tower: tuple[str, str]) -> None:
    name, folder = tower
    everything, left = set(rates(start(folder))), set(rates(start(folder, freeze_layers=1)))
    embedding = {parameter for parameter in everything if parameter.startswith(EMBEDDING[name])}
    assert embedding
    assert everything - left == embedding | {part for part in everything if part.startswith(FIRST[name])}


def test_layer_decay_is_strongest_at_the_pixels(tower: tuple[str, str]) -> None:
    name, folder = tower
    run = start(folder, layer_decay=0.5)
    found = rates(run)
    lowest = 0.5 ** max(run.stepper.model.layers("image").values())
    assert lowest <= 0.125
    assert {part for part, factor in found.items() if factor == lowest} == {
        part for part in found if part.startswith(EMBEDDING[name])
    }
    assert {factor for part, factor in found.items() if part.startswith(FIRST[name])} == {2 * lowest}
    assert found["attnpool.c_proj.weight" if name == "open_clip" else "head.proj.weight"] == 1.0


def test_factors_follow_the_layers() -> None:
    names = TOWERS["timm Swin"]
    factors = lr_factors(names, 0.1)
    assert {name: factors[name] for name in names} == pytest.approx({n: 0.1 ** (3 - d) for n, d in names.items()})
