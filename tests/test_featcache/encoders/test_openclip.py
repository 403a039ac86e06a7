"""open_clip models in every form, against open_clip's own pipeline."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_models import CONFIG, PREPROCESS, RESNET, make_model, write_folder
from PIL import Image

from featcache import encode, load_encoder
from featcache.datasets import open_dataset
from featcache.encoders import openclip
from featcache.encoders.checkpoints import is_openai_file, tower_digest
from featcache.encoders.openclip.loading import register_architecture
from featcache.errors import ActivationMismatchError, EncoderError, PromptError
from featcache.prompts import imagenet
from featcache.store import content_key


@pytest.fixture
def pictures() -> list[Image.Image]:
    chance = np.random.default_rng(0)
    return [
        Image.fromarray(chance.integers(0, 256, size, dtype=np.uint8))
        for size in ((40, 60, 3), (32, 32, 3), (90, 20, 3))
    ]


@pytest.mark.parametrize("changes", [{}, {"vision_cfg": RESNET}], ids=["ViT", "ResNet, patch_size null"])
def test_a_model_folder_gives_open_clips_own_features(
    changes: dict[str, Any], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    name = write_folder(tmp_path / "model", make_model(**changes), **changes)
    encoder = load_encoder(name)
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(["a cat", "two dogs"])
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([transform(picture) for picture in pictures])).numpy()
        texts = model.encode_text(tokens).numpy()
    np.testing.assert_array_equal(encoder.encode_images([encoder.prepare(picture) for picture in pictures]), images)
    np.testing.assert_allclose(encoder.encode_texts(["a cat", "two dogs"]), texts, atol=2e-6 * np.abs(texts).max())
    assert encoder.image_identity["preprocess"]["mean"] == PREPROCESS["mean"]
    assert encoder.image_identity["preprocess"]["resize_mode"] == "squash"
    assert encoder.dim == 24


def test_a_model_folder_may_be_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_folder(tmp_path / "model", make_model())
    monkeypatch.chdir(tmp_path)
    bare, full = load_encoder("model"), load_encoder(name)
    assert bare.source == full.source
    assert (bare.name, bare.image_identity, bare.text_digest) == (full.name, full.image_identity, full.text_digest)


def test_the_logit_scale_is_exponentiated(tmp_path: Path) -> None:
    encoder = load_encoder(write_folder(tmp_path / "model", make_model()))
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)
    assert encoder.logit_bias is None
    biased = load_encoder(write_folder(tmp_path / "siglip", make_model(init_logit_bias=-10.0), init_logit_bias=-10.0))
    assert biased.logit_bias == -10.0


def test_each_tower_has_its_own_identity(tmp_path: Path) -> None:
    model: Any = make_model()
    base = load_encoder(write_folder(tmp_path / "base", model))
    with torch.no_grad():
        model.visual.proj += 1e-3
    image = load_encoder(write_folder(tmp_path / "image", model))
    with torch.no_grad():
        model.logit_scale += 0.1
    scale = load_encoder(write_folder(tmp_path / "scale", model))
    assert content_key(base.image_identity) != content_key(image.image_identity)
    assert base.text_identity == image.text_identity
    assert base.text_digest == image.text_digest
    assert image.image_identity == scale.image_identity
    assert image.text_digest != scale.text_digest


def test_activation_and_precision_are_part_of_the_key(tmp_path: Path) -> None:
    gelu = load_encoder(write_folder(tmp_path / "gelu", make_model()))
    quick = load_encoder(write_folder(tmp_path / "quick", make_model(quick_gelu=True), quick_gelu=True))
    half = load_encoder(f"local-dir:{tmp_path / 'gelu'}", precision="bf16")
    keys = {content_key(encoder.image_identity) for encoder in (gelu, quick, half)}
    assert len(keys) == 3


def test_bf16_stays_close_and_returns_float32(tmp_path: Path, pictures: list[Image.Image]) -> None:
    name = write_folder(tmp_path / "model", make_model())
    full, half = load_encoder(name), load_encoder(name, precision="bf16")
    images = [full.prepare(picture) for picture in pictures]
    expected, found = full.encode_images(images), half.encode_images(images)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_bf16_computes_with_bfloat16_weights_and_keeps_those_of_the_model(
    tmp_path: Path, pictures: list[Image.Image]
) -> None:
    """Fine-tuning updates the float32 model; after `rehash` the encoder uses the new weights."""
    encoder: Any = load_encoder(write_folder(tmp_path / "model", make_model()), precision="bf16")
    images = [encoder.prepare(picture) for picture in pictures]
    narrow = copy.deepcopy(encoder.model).to(torch.bfloat16)
    with torch.inference_mode():
        pixels = encoder.pixels(torch.from_numpy(np.stack(images))).bfloat16()
        expected = narrow.encode_image(pixels).float().numpy()
    np.testing.assert_array_equal(encoder.encode_images(images), expected)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    with torch.no_grad():
        encoder.model.visual.proj.mul_(2.0)
    encoder.rehash()
    np.testing.assert_array_equal(encoder.encode_images(images), 2.0 * expected)


def test_bfloat16_weights_are_part_of_the_key(tmp_path: Path) -> None:
    """Stores made with autocast have ``bf16`` there; their features differ in the last digits."""
    encoder = load_encoder(write_folder(tmp_path / "model", make_model()), precision="bf16")
    assert encoder.text_identity is not None
    assert encoder.image_identity["precision"] == encoder.text_identity["precision"] == "bf16 weights"


def test_every_open_clip_architecture_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: {})  # none is added
    for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        assert register_architecture(file)[1] == file.stem


def test_a_checkpoint_file_is_loaded_into_its_architecture(tmp_path: Path) -> None:
    model = open_clip.create_model("RN50", pretrained=None)
    file = tmp_path / "mine.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, file)
    encoder = load_encoder("RN50", str(file))
    assert encoder.name == "RN50/mine"
    assert encoder.text_digest == tower_digest(model, image=False)


def test_random_weights_are_the_same_every_time() -> None:
    state = torch.random.get_rng_state()
    one, two = (load_encoder("RN50", "random") for _ in range(2))
    assert one.image_identity == two.image_identity
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("model", "tag", "remedy"),
    [("ViT-B-16", "openai", "ViT-B-16-quickgelu"), ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32")],
)
def test_a_tag_of_the_other_activation_is_an_error_that_names_the_model(model: str, tag: str, remedy: str) -> None:
    if tag not in open_clip.pretrained.list_pretrained_tags_by_model(model):
        with pytest.raises(EncoderError):
            load_encoder(model, tag)
        return
    with pytest.raises(ActivationMismatchError, match=rf"use --model {remedy}$"):
        load_encoder(model, tag)


def openai_archive(folder: Path) -> Path:
    """A TorchScript archive with the three extra entries of OpenAI's files."""
    model = make_model()
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(32))
    file = folder / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 32, 32)}), str(file))
    return file


def test_an_archive_in_openais_layout_needs_quickgelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = openai_archive(tmp_path)
    assert is_openai_file(file, set())
    for name, quick in (("small", False), ("small-quickgelu", True)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, CONFIG | {"quick_gelu": quick})
    with pytest.raises(ActivationMismatchError, match=r"trained with QuickGELU.*use --model small-quickgelu"):
        load_encoder("small", str(file))
    encoder = load_encoder("small-quickgelu", str(file))
    assert encoder.image_identity["activation"] == "quick_gelu"
    assert encoder.text_digest == tower_digest(make_model(), image=False)


def test_openais_files_are_recognised_by_digest() -> None:
    digests = openclip.openai_file_digests()
    assert len(digests) == 9
    assert all(len(digest) == 64 for digest in digests)
    known = digests["5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"]
    assert known.removesuffix("-quickgelu") == "ViT-B-16"


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", "open_clip has no such architecture; did you mean ViT-B-32"),
        ("ViT-B-32", None, "needs weights; give a checkpoint file, `random`, or one of the tags"),
        ("ViT-B-32", "opemai", "needs weights; give a checkpoint file, `random`, or one of the tags"),
        ("local-dir:/nowhere", None, "no readable open_clip_config.json"),
        ("tiny", "openai", "has its own weights"),
    ],
)
def test_models_that_cannot_be_loaded_are_refused(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(model, pretrained)


def test_float_pixels_are_never_rounded(tmp_path: Path) -> None:
    encoder = load_encoder(write_folder(tmp_path / "model", make_model()))
    pixels = np.full((8, 8, 3), 100.4, dtype=np.float32)
    prepared = encoder.prepare(pixels)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, 100.4, rtol=1e-6)
    assert prepared.shape == (32, 32, 3)


def test_float_and_uint8_pixels_agree_but_for_rounding(tmp_path: Path) -> None:
    encoder = load_encoder(write_folder(tmp_path / "model", make_model()))
    pixels = np.random.default_rng(0).integers(60, 200, (40, 50, 3), dtype=np.uint8)
    rounded, exact = encoder.prepare(pixels), encoder.prepare(pixels.astype(np.float32))
    assert rounded.dtype == np.uint8
    assert np.abs(rounded.astype(np.float32) - exact).max() <= 1.0


def test_a_text_beyond_the_context_is_refused(tmp_path: Path) -> None:
    encoder = load_encoder(write_folder(tmp_path / "model", make_model()))
    encoder.encode_texts(["word " * 14])
    with pytest.raises(PromptError, match=r"text of 17 tokens, .* takes at most 16"):
        encoder.encode_texts(["fine", "word " * 15])


def test_imagenet_names_and_templates() -> None:
    assert len(imagenet.imagenet_names()) == 1000
    templates = imagenet.openai_imagenet_templates()
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {}."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_features_from_cuda_stay_close_to_the_cpus(tmp_path: Path, precision: str) -> None:
    data = open_dataset("digits", "val")
    cpu = encode(data, model=load_encoder("tiny", device="cpu"), root=tmp_path / "cpu").numpy()[0]
    cuda = encode(data, model=load_encoder("tiny", device="cuda", precision=precision), root=tmp_path / "cuda").numpy()[
        0
    ]
    assert np.einsum("nd,nd->n", cpu, cuda).min() > (0.9999 if precision == "fp32" else 0.99)


def test_your_own_architecture(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """As in open_clip's model_configs, or with preprocessing, as in its model folders."""
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(CONFIG))  # a name that open_clip has for another architecture
    (tmp_path / "mine.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}))
    plain, mine = (
        load_encoder(str(tmp_path / name), str(tmp_path / "weights.pt"), device="cpu")
        for name in ("ViT-B-32.json", "mine.json")
    )
    folder = load_encoder(write_folder(tmp_path / "folder", model), device="cpu")
    images = [mine.prepare(picture) for picture in pictures]
    assert np.array_equal(mine.encode_images(images), folder.encode_images(images))
    assert mine.image_identity == folder.image_identity
    assert (plain.name, mine.name) == ("ViT-B-32/weights", "mine/weights")
    assert plain.image_identity != mine.image_identity  # another mean
    assert load_encoder("ViT-B-32", "random", device="cpu").dim == 512  # open_clip's own is what it was
    assert mine.source is not None
    assert mine.source["model"] == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "cannot be read as JSON"), ("[1]", "no embed_dim, vision_cfg, text_cfg"),
     ('{"embed_dim": 8, "vision_cfg": {"width": "x"}, "text_cfg": {}}', "width")],
)  # fmt: skip
def test_a_file_without_an_architecture(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(EncoderError, match=said):
        load_encoder(str(tmp_path / "mine.json"), "random")
