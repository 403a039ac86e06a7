"""timm's image models: timm's own features, keys by weights, and probes without a text side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.encoding.texts import embed_prompts
from featcache.errors import EncoderError
from featcache.store import content_key

SMALL = "timm:test_vit"


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    shapes = [(200, 170), (160, 160), (90, 300)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_features_are_timms_own(name: str, pictures: list[Image.Image]) -> None:
    encoder: Any = load_encoder(f"timm:{name}", "random", device="cpu")
    config = timm.data.resolve_model_data_config(encoder.model)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        reference = encoder.model(torch.stack([transform(picture) for picture in pictures])).numpy()
    found = encoder.encode_images([encoder.prepare(picture) for picture in pictures])
    assert found.dtype == np.float32
    assert found.shape == reference.shape == (3, encoder.dim)
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)


def test_the_published_preprocessing_of_dinov2_is_taken() -> None:
    """518 x 518 by its published configuration, bicubic, ImageNet's mean."""
    cfg = timm.get_pretrained_cfg("vit_small_patch14_dinov2.lvd142m")
    assert cfg is not None
    encoder = load_encoder(SMALL, "random", device="cpu")
    spec = encoder.image_identity["preprocess"]
    assert set(spec) >= {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
    assert (cfg.input_size[1], cfg.interpolation, cfg.crop_pct) == (518, "bicubic", 1.0)
    json.dumps(encoder.image_identity)


def test_float_pictures_are_never_rounded(pictures: list[Image.Image]) -> None:
    encoder = load_encoder(SMALL, "random", device="cpu")
    exact = encoder.prepare(np.asarray(pictures[0], np.float32) + np.float32(0.25))
    rounded = encoder.prepare(pictures[0])
    assert exact.dtype == np.float32
    assert exact.shape == rounded.shape == (160, 160, 3)
    assert np.abs(exact - 0.25 - rounded).mean() < 1


def test_local_weights_change_the_key(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "mine.pt")
    random = load_encoder(SMALL, "random", device="cpu")
    loaded = [
        load_encoder(f"{SMALL},{tmp_path}/mine.safetensors", device="cpu"),
        load_encoder(SMALL, str(tmp_path / "mine.pt"), device="cpu"),
    ]
    assert [encoder.name for encoder in loaded] == ["test_vit/mine", "test_vit/mine"]
    assert loaded[0].image_identity == loaded[1].image_identity
    assert content_key(loaded[0].image_identity) != content_key(random.image_identity)
    image = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    model.reset_classifier(0)
    with torch.inference_mode():
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        reference = model.eval()(((torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std)[None])
    np.testing.assert_allclose(loaded[0].encode_images([image]), reference, rtol=1e-4, atol=1e-5)


def test_a_partial_checkpoint_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    del state["norm.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(EncoderError, match=r"lacks 1 tensors \(norm\.weight\)"):
        load_encoder(f"{SMALL},{tmp_path}/cut.safetensors")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(EncoderError, match="expected a checkpoint of test_vit"):
        load_encoder(f"{SMALL},{tmp_path}/other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(EncoderError, match="timm cannot load it"):
        load_encoder(f"{SMALL},{tmp_path}/bad.safetensors")


def test_unknown_models_checkpoints_and_precisions_are_refused() -> None:
    with pytest.raises(EncoderError, match="timm has no model 'no_such_model'"):
        load_encoder("timm:no_such_model")
    with pytest.raises(EncoderError, match=r"no checkpoint file gone\.pt"):
        load_encoder(SMALL, "gone.pt")
    with pytest.raises(EncoderError, match="precision 'fp8': expected one of fp32, bf16, fp16"):
        load_encoder(SMALL, "random", precision="fp8")
    encoder = load_encoder(SMALL, "random", device="cpu")
    with pytest.raises(EncoderError, match="no text side"):
        encoder.encode_texts(["a"])
    with pytest.raises(EncoderError, match="no text side"):
        embed_prompts(["cat"], ["a {}."], encoder)


def test_a_probe_without_text_from_images_to_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """encode -> ridge -> evaluate on the command line, and the store has no text side."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-30, 31, (40, 40, 3)) + np.array(colour)
                Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    spec, model = f"imagefolder:{tmp_path}/colours", ["--model", SMALL, "--pretrained", "random", "--device", "cpu"]
    assert main(["encode", spec, "--split", "train", "test", *model, "--quiet", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(record["rows"], record["dim"]) for record in records] == [(36, 64), (18, 64)]
    store = encode(spec, "test", SMALL, "random", device="cpu")
    assert (store.text_digest, store.text_digests, store.logit_scale, store.logit_bias) == (None, (), None, None)
    head = str(tmp_path / "head.safetensors")
    assert main(["fit", "ridge", records[0]["store"], "--output", head]) == 0
    capsys.readouterr()
    results = ["--results", f"{head}.jsonl"]
    assert main(["evaluate", head, "--on", records[1]["store"], "--json", *results]) == 0
    text = capsys.readouterr().out
    assert '"colours:top1": 1.0' in text, text
