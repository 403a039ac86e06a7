"""Taps with tokens equal the outputs collected by forward hooks, bit for bit, from one pass."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_models import CONFIG, write_folder

from featcache.encoders import load_encoder
from featcache.encoders.callables import CallableEncoder
from featcache.encoders.taps import encode_outputs, find_tap
from featcache.errors import EncoderError, FeatcacheError


def images_for(encoder: Any, size: int, n: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def by_hand(module: torch.nn.Module, run: Callable[[], object]) -> np.ndarray:
    """The output of a module in a pass of its model."""
    caught: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _m, _i, output: caught.append(output.detach().clone()))
    with torch.inference_mode():
        run()
    hook.remove()
    return caught[0].numpy()


def check(encoder: Any, images: Sequence[np.ndarray], expected: dict[str, np.ndarray]) -> None:
    found = encode_outputs(encoder, images, list(expected))
    np.testing.assert_array_equal(found["projected"], encoder.encode_images(images))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        tap = find_tap(encoder, name)
        assert values.shape[1:] == ((tap.dim,) if tap.tokens is None else (tap.tokens, tap.dim))


def random_vit(tmp_path: Path) -> Any:
    torch.manual_seed(3)
    return load_encoder(write_folder(tmp_path / "vit", open_clip.CLIP(**CONFIG)))


@pytest.mark.parametrize("make", [lambda _: load_encoder("tiny"), random_vit], ids=["tiny", "random ViT"])
def test_open_clips_layers_equal_hooked_outputs(make: Callable[[Path], Any], tmp_path: Path) -> None:
    encoder = make(tmp_path)
    images = images_for(encoder, encoder.image_size[0])
    pixels = encoder.pixels(torch.from_numpy(np.stack(images)))
    visual = encoder.model.visual
    run = lambda: encoder.model.encode_image(pixels)  # noqa: E731
    blocks = [by_hand(block, run) for block in visual.transformer.resblocks]
    last = by_hand(visual.ln_post, run)
    assert last.ndim == 3  # the norm of all tokens
    check(
        encoder,
        images,
        {
            "patch": last[:, 1:],
            "tokens": last,
            "layer:0": blocks[0][:, 1:],
            "layer:-1:tokens": blocks[-1],
            "layer:-2:patch": blocks[-2][:, 1:],
            "layer:-2:cls": blocks[-2][:, 0],
            "layer:-2:max": blocks[-2][:, 1:].max(axis=1),
            "layer:-2:mean": blocks[-2][:, 1:].mean(axis=1, dtype=np.float32),
        },
    )


def test_the_patch_tokens_are_open_clips_own_output_tokens(tmp_path: Path) -> None:
    encoder = random_vit(tmp_path)
    images = images_for(encoder, encoder.image_size[0])
    visual = encoder.model.visual
    found = encode_outputs(encoder, images, ["patch"])["patch"]
    visual.output_tokens = True
    with torch.inference_mode():
        _, tokens = visual(encoder.pixels(torch.from_numpy(np.stack(images))))
    np.testing.assert_array_equal(found, tokens.numpy())


def test_timms_layers_equal_hooked_outputs() -> None:
    encoder: Any = load_encoder("timm:test_vit", "random", device="cpu")
    images = images_for(encoder, 160)
    pixels = encoder._scaling(torch.from_numpy(np.stack(images)))
    blocks = [by_hand(block, lambda: encoder.model(pixels)) for block in encoder.model.blocks]
    last, prefix = by_hand(encoder.model.norm, lambda: encoder.model(pixels)), encoder.model.num_prefix_tokens
    check(encoder, images, {"patch": last[:, prefix:], "layer:0": blocks[0][:, prefix:], "layer:-1:tokens": blocks[-1]})


def test_positions_of_a_map_are_tokens() -> None:
    encoder: Any = load_encoder("timm:test_resnet", "random", device="cpu")
    images = images_for(encoder, 160)
    pixels = encoder._scaling(torch.from_numpy(np.stack(images)))
    with torch.inference_mode():
        last = encoder.model.forward_features(pixels).numpy()
    n, channels, height, width = last.shape
    expected = last.transpose(0, 2, 3, 1).reshape(n, height * width, channels)
    middle = by_hand(encoder.model.layer3, lambda: encoder.model(pixels))
    middle = middle.reshape(*middle.shape[:2], -1).swapaxes(1, 2)
    check(encoder, images, {"patch": expected, "layer:-2": middle})
    with pytest.raises(FeatcacheError, match="do not include a class token"):
        find_tap(encoder, "patch:cls")


@pytest.mark.parametrize("as_map", [False, True])
def test_a_function_may_return_tokens_or_a_map(as_map: bool) -> None:
    def tiles(images: np.ndarray) -> np.ndarray:
        found = images.astype(np.float32).reshape(-1, 2, 2, 2, 2, 3).mean(axis=(2, 4))
        return found.transpose(0, 3, 1, 2) if as_map else found.reshape(-1, 4, 3)

    encoder = CallableEncoder(tiles, (4, 3), digest="mean colours of tiles")
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = encode_outputs(encoder, [image], ["patch", "patch:max"])
    expected = np.stack([image[r : r + 2, c : c + 2].mean(axis=(0, 1)) for r in (0, 2) for c in (0, 2)])
    np.testing.assert_allclose(found["patch"][0], expected)
    np.testing.assert_allclose(found["projected"][0], expected.mean(axis=0))
    np.testing.assert_allclose(found["patch:max"][0], expected.max(axis=0))
    assert encoder.dim == 3
    with pytest.raises(EncoderError, match=r"features \(1, 4, 3\); expected \(1, 5, 3\)"):
        CallableEncoder(lambda images: np.zeros((1, 4, 3)), (5, 3), digest="x").encode_images([image])


def test_an_unknown_tap_is_refused_with_the_known_ones() -> None:
    encoder = load_encoder("tiny")
    known = r"pre_projection, patch, tokens, layer:0 to layer:3 \(from the end, layer:-1\); pooled, such as patch:mean"
    for name in ("layer:4", "layer:-5:cls", "patches", "layer:0:median"):
        with pytest.raises(EncoderError, match=known):
            find_tap(encoder, name)
