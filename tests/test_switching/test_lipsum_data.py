"""Lipsum-FT's data: arrays ``{Name}_x224/test_{images,labels}.npy`` that lie cropped, numbered labels, one shape."""

import json
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import pytest
import torch
from foreign_checkpoints import write_ckpt
from safetensors.numpy import load_file

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.prompts import load_subset
from featcache.store import open_image_store

SIDE = 32
"""What `tiny` takes; with it, arrays of 224 x 224 are to ViT-B/16 as these are to `tiny`."""
DOMAINS = ("DomainNetReal", "DomainNetPainting", "DomainNetClipart", "DomainNetInfograph", "DomainNetSketch")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no image")


def x224(base: Path, name: str, seed: int, classes: int, *, split: str = "test", n: int = 12) -> np.ndarray:
    """A folder in Lipsum-FT's layout; returns its images."""
    folder = base / f"{name}_x224"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    colours = np.random.default_rng(0).uniform(40, 215, (classes, 1, 1, 3))
    images = np.clip(colours[labels] + rng.normal(0, 30, (n, SIDE, SIDE, 3)), 0, 255).astype(np.float32)
    np.save(folder / f"{split}_images.npy", images)
    np.save(folder / f"{split}_labels.npy", labels)
    return images


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    return found if isinstance(found, list) else [found]


def judged(model: str, images: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and NLL in float64, straight from the model: no store, no crop, no resizing."""
    network = load_encoder(model).model
    pixels = (torch.from_numpy(images) / 255 - 0.5) / 0.5  # as the configuration of `tiny` has it
    with torch.inference_mode():
        features = network.encode_image(pixels.permute(0, 3, 1, 2)).double().numpy()
    logits = features / np.linalg.norm(features, axis=1, keepdims=True) @ weights.astype(np.float64).T
    shifted = logits - logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return float((logits.argmax(axis=1) == labels).mean()), float(nll.mean())


def test_after_the_recipe_each_x224_set_is_judged_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "lipsum_data"
    x224(data, "train", 100, 345, split="train", n=16)
    x224(data, "train", 101, 345, split="val", n=8)
    images = {name: x224(data, name, seed, 345) for seed, name in enumerate(DOMAINS)}
    lies = "prepared=central-crop,classes=domainnet"
    short = ("--steps", 2, "--eval-every", 1, "--batch-size", 8, "--templates", "simple", "--quiet")
    train, val = f"arrays:{data}/train_x224,classes=domainnet", f"arrays:{data}/train_x224,{lies}:val"
    run(capsys, "finetune", train, "--val", val, "--recipe", "lipsum_domainnet", "-o", "RUN", *short)
    model = f"local-dir:{tmp_path}/RUN/best"
    sets = [f"arrays:{data}/{name}_x224,{lies}" for name in DOMAINS]
    stores = run(capsys, "encode", *sets, "--split", "test", "--model", model)
    assert [store["hit"] for store in stores] == [False] * 5
    assert len({store["store"] for store in stores}) == 5
    (row,) = run(capsys, "evaluate", "RUN/best_head.safetensors", "--on", *(store["store"] for store in stores))
    head = load_file("RUN/best_head.safetensors")
    for name in DOMAINS:
        labels = np.load(data / f"{name}_x224" / "test_labels.npy")
        accuracy, nll = judged(model, images[name], head["weights"], labels)
        assert row[f"{name}_x224:top1"] == pytest.approx(accuracy, abs=1e-9)
        assert row[f"{name}_x224:nll"] == pytest.approx(nll, rel=2e-3)


def test_arrays_not_marked_as_cropped_are_cropped_and_stored_separately(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x224(tmp_path, "ImageNet", 1, 10)
    spec = f"arrays:{tmp_path}/ImageNet_x224"
    (lies,) = run(capsys, "encode", f"{spec},prepared=central-crop", "--split", "test", "--quiet")
    (cropped,) = run(capsys, "encode", spec, "--split", "test", "--preprocess", "central-crop", "--quiet")
    assert (lies["store"] != cropped["store"], cropped["hit"], cropped["copied_rows"]) == (True, False, 0)
    one, two = open_image_store(lies["store"]), open_image_store(cropped["store"])
    assert one.encoder_key == two.encoder_key
    assert np.abs(one.numpy()[0] - two.numpy()[0]).max() > 0.01


def test_a_best_acc_file_is_judged_on_the_x224_arrays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """convert best_acc.ckpt, encode, evaluate: the head belongs to the crop that Lipsum-FT evaluates on."""
    monkeypatch.chdir(tmp_path)
    model = clip_models.make_model(3)
    clip_models.write_folder(tmp_path / "base", model)
    cls = write_ckpt(tmp_path / "best_acc.ckpt", model.state_dict())
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne")
    images = x224(tmp_path, "DomainNetReal", 3, 5)
    run(capsys, "convert", "best_acc.ckpt", "out", "--base", "base", "--classes", "classes.txt")
    spec = "arrays:DomainNetReal_x224,prepared=central-crop,classes=classes.txt"
    (store,) = run(capsys, "encode", spec, "--split", "test", "--model", "out")
    (row,) = run(capsys, "evaluate", "out_head.safetensors", "--on", store["store"])
    mean, std = (np.array(clip_models.PREPROCESS[key]) for key in ("mean", "std"))
    pixels = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
    with torch.inference_mode():
        features = model.double().eval().encode_image(pixels).numpy()
        logits = (
            model.logit_scale.exp().item() * features / np.linalg.norm(features, axis=1, keepdims=True) @ cls.numpy()
        )
    y = np.load("DomainNetReal_x224/test_labels.npy")
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    assert row["DomainNetReal_x224:top1"] == pytest.approx((logits.argmax(axis=1) == y).mean())
    assert row["DomainNetReal_x224:nll"] == pytest.approx(nll.mean(), rel=2e-3)
    short = ("--steps", 2, "--batch-size", 4, "--quiet", "--split", "test", "--recipe", "lipsum_domainnet", "-o", "RUN")
    run(capsys, "finetune", spec, "--model", "out", "--head", "out_head.safetensors", *short)


def test_prepared_and_unprepared_sets_are_not_mixed_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"arrays:{tmp_path}/{name}_x224" for name in ("ImageNet", "ImageNetV2")]
    for seed, name in enumerate(("ImageNet", "ImageNetV2")):
        x224(tmp_path, name, seed, 10)
    assert main(["encode", f"{sets[0]},prepared=central-crop", sets[1], "--split", "test", "--quiet"]) == 2
    assert "prepared in different ways (central-crop, none)" in capsys.readouterr().err
    assert main(["encode", *sets, "--split", "test", "--name", "one", "--quiet"]) == 2
    assert "one name for 2 data sets" in capsys.readouterr().err


def test_zero_shot_on_imagenet_r_by_its_200_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = x224(tmp_path, "ImageNetR", 5, 200)
    spec = f"arrays:{tmp_path}/ImageNetR_x224,prepared=central-crop,classes=imagenet-r"
    (store,) = run(capsys, "encode", spec, "--split", "test", "--quiet")
    (texts,) = run(capsys, "text", "imagenet", "--quiet")
    head = tmp_path / "zs.safetensors"
    run(capsys, "fit", "zero_shot", texts["store"], "-o", head)
    subset = "ImageNetR_x224=imagenet-r"
    results = ("--results", tmp_path / "results.jsonl")
    (row,) = run(capsys, "evaluate", head, "--on", store["store"], "--class-subset", subset, *results)
    weights = load_file(head)["weights"][list(load_subset("imagenet-r"))]
    accuracy, nll = judged("tiny", images, weights, np.load(tmp_path / "ImageNetR_x224" / "test_labels.npy"))
    assert row["ImageNetR_x224:top1"] == pytest.approx(accuracy, abs=1e-9)
    assert row["ImageNetR_x224:nll"] == pytest.approx(nll, rel=2e-3)
