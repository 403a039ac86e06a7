"""WiSE-FT's evaluation on its own folders, from the command line, against plain numpy: every alpha on every shift."""

import json
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import write_pictures

from featcache.cli.main import main
from featcache.prompts import load_subset
from featcache.prompts.imagenet import imagenet_names, imagenet_wnids
from featcache.store import find_store
from heads import LinearHead, load, save
from heads.fitted.linear import as_linear

pytestmark = pytest.mark.filterwarnings("ignore:.*classes have no image")

ALPHAS = [0.0, 0.3, 1.0]
NAMES = ["ImageNet", "ImageNetV2", "ImageNetR", "ImageNetA", "ImageNetSketch", "ObjectNet"]
MEAN, STD = (np.array(clip_models.PREPROCESS[key], np.float64) for key in ("mean", "std"))
OBJECTS = {"Box": [3, 1], "Can": [30]}  # ObjectNet's label -> ImageNet classes


class Folders:
    """ImageNet and its shifts as WiSE-FT keeps them, and the pixels and class indices of each."""

    def __init__(self, base: Path) -> None:
        self.base, self._draws = base, np.random.default_rng(0)
        self.sets: dict[str, Any] = {}
        wnids, r, a = imagenet_wnids(), load_subset("imagenet-r"), load_subset("imagenet-a")
        self.add("ImageNet", "imagenet/val_in_folder", {wnids[c]: c for c in (0, 1, 30, 999)})
        self.add("ImageNetV2", "imagenetv2", {str(c): c for c in (0, 2, 10)})
        self.add("ImageNetR", "imagenet-r", {wnids[r[k]]: k for k in (0, 7, 199)})
        self.add("ImageNetA", "imagenet-a", {wnids[a[k]]: k for k in (0, 3, 150)})
        self.add("ImageNetSketch", "sketch", {wnids[c]: c for c in (5, 700)})
        self.add("ObjectNet", "objectnet-1.0/images", {"box": 0, "can": 1})
        self.write_mappings(base / "objectnet-1.0" / "mappings")

    def add(self, name: str, place: str, classes: dict[str, int]) -> None:
        pixels, labels = [], []
        for folder, label in sorted(classes.items()):
            (self.base / place / folder).mkdir(parents=True)
            for number in range(3):
                pixels.append(self._draws.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                labels.append(label)
                Image.fromarray(pixels[-1]).save(self.base / place / folder / f"{number}.png")
        self.sets[name] = np.stack(pixels), np.array(labels)

    def write_mappings(self, folder: Path) -> None:
        folder.mkdir()
        lines = [f"line {number}" for number in range(40)]
        counterparts = {label: "; ".join(lines[c] for c in classes) for label, classes in OBJECTS.items()}
        contents = {
            "folder_to_objectnet_label.json": json.dumps({"box": "Box", "can": "Can"}),
            "objectnet_to_imagenet_1k.json": json.dumps(counterparts),
            "imagenet_to_label_2012_v2": "\n".join(lines),
            "pytorch_to_imagenet_2012_id.json": json.dumps({str(c): c for c in range(40)}),
        }
        for file, content in contents.items():
            (folder / file).write_text(content)


def two_models(folder: Path) -> list[torch.nn.Module]:
    """A model, and one with another image tower; both as model folders."""
    models = [clip_models.make_model(0), clip_models.make_model(0)]
    models[1].visual.load_state_dict(clip_models.make_model(7).visual.state_dict())
    for name, model in zip(("zeroshot", "finetuned"), models, strict=True):
        clip_models.write_folder(folder / name, model)
    return models


def expected(models: list[torch.nn.Module], heads: list[LinearHead], data: Folders, name: str, alpha: float) -> Any:
    """Accuracy and NLL of the interpolated model and head, in float64."""
    merged = clip_models.make_model(3)
    first, second = (model.state_dict() for model in models)
    merged.load_state_dict({key: (1 - alpha) * first[key] + alpha * second[key] for key in first})
    pixels, labels = data.sets[name]
    inputs = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2))
    with torch.no_grad():
        features = merged.double().eval().encode_image(inputs).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    weights, bias = ((1 - alpha) * a + alpha * b for a, b in zip(*((h.weights, h.bias) for h in heads), strict=True))
    logits = features @ weights.astype(np.float64).T + bias
    if name in ("ImageNetR", "ImageNetA"):
        logits = logits[:, list(load_subset({"ImageNetR": "imagenet-r", "ImageNetA": "imagenet-a"}[name]))]
    if name == "ObjectNet":
        logits = np.stack([logits[:, classes].max(axis=1) for classes in OBJECTS.values()], axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return (logits.argmax(axis=1) == labels).mean(), nll.mean()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Folders, list[torch.nn.Module], list[LinearHead]]:
    folder = tmp_path_factory.mktemp("wise-ft")
    draws, names = np.random.default_rng(1), imagenet_names()
    heads = []
    for number in range(2):
        head = LinearHead(
            8 * draws.normal(size=(1000, 24)).astype(np.float32), draws.normal(size=1000).astype(np.float32), names
        )
        heads.append(head)
        save(head, folder / f"head{number}.safetensors")
    return folder, Folders(folder / "data"), two_models(folder), heads


def test_the_readmes_sweep_has_their_keys_and_numpys_numbers(world: Any, tmp_path: Path) -> None:
    """src/wise_ft.py --eval-datasets=ImageNet,ImageNetV2,ImageNetR,ImageNetA,ImageNetSketch,ObjectNet --alpha ..."""
    folder, data, models, heads = world
    places = ["imagenet", "v2:imagenetv2", "r:imagenet-r", "a:imagenet-a", "sketch:sketch", "objectnet:objectnet-1.0"]
    sources = []
    for place, split in zip(places, ["val", *["test"] * 5], strict=True):
        kind, _, place = place.rpartition(":")
        sources.append(f"imagenet:{kind}{':' if kind else ''}{data.base / place}:{split}")
    out, results = tmp_path / "merged", tmp_path / "results.jsonl"
    command = ["wise", str(folder / "zeroshot"), str(folder / "finetuned"), "--alphas", *map(str, ALPHAS)]
    command += ["--out", str(out), "--heads", *(str(folder / f"head{k}.safetensors") for k in range(2))]
    command += ["--on", *sources, "--results", str(results), "--report", str(tmp_path / "report")]
    command += ["--class-subset", "ImageNetR=imagenet-r", "ImageNetA=imagenet-a"]
    command += ["--projection", f"ObjectNet=objectnet:{data.base / 'objectnet-1.0'}"]
    assert main(command) == 0
    rows = read(results)
    assert [row["alpha"] for row in rows] == ALPHAS
    for row in rows:
        for name in NAMES:
            top1, nll = expected(models, heads, data, name, row["alpha"])
            assert row[f"{name}:top1"] == pytest.approx(top1), name
            assert row[f"{name}:nll"] == pytest.approx(nll, rel=2e-3), name
    assert (tmp_path / "report" / "report.md").exists()
    assert len(list((tmp_path / "report").glob("accuracy-*.png"))) == len(NAMES) - 1
    assert "wise α=0.3" in (tmp_path / "report" / "report.html").read_text()
    assert not (out / "best").exists()  # nothing was chosen on a split that is reported


def test_the_head_of_a_middle_alpha_is_saved_beside_its_model(world: Any, tmp_path: Path) -> None:
    folder, data, models, heads = world
    out, results = tmp_path / "merged", tmp_path / "results.jsonl"
    command = ["wise", str(folder / "zeroshot"), str(folder / "finetuned"), "--alphas", "0", "0.3", "--out", str(out)]
    command += ["--heads", *(str(folder / f"head{k}.safetensors") for k in range(2))]
    assert main(command) == 0  # no data at all: models and heads are merged
    assert sorted(path.name for path in out.glob("*_head.safetensors")) == [
        "alpha=0.000_head.safetensors",
        "alpha=0.300_head.safetensors",
    ]
    source = f"imagenet:r:{data.base / 'imagenet-r'}"
    model = f"local-dir:{out / 'alpha=0.300'}"
    assert main(["encode", source, "--split", "test", "--model", model, "--quiet", "--root", str(tmp_path / "c")]) == 0
    command = ["evaluate", str(out / "alpha=0.300_head.safetensors"), "--on", "imagenet-r/test@alpha=0.300"]
    command += ["--name", "ImageNetR", "--class-subset", "ImageNetR=imagenet-r", "--root", str(tmp_path / "c")]
    assert main([*command, "--results", str(results)]) == 0
    (row,) = read(results)
    top1, nll = expected(models, heads, data, "ImageNetR", 0.3)
    assert row["ImageNetR:top1"] == pytest.approx(top1)
    assert row["ImageNetR:nll"] == pytest.approx(nll, rel=2e-3)


def test_selection_and_reported_splits_stay_apart(world: Any, tmp_path: Path, capsys: Any) -> None:
    folder, data, _, _ = world
    val = f"imagenet:v2:{data.base / 'imagenetv2'}:test"
    on = f"imagenet:r:{data.base / 'imagenet-r'}:test"
    command = ["wise", str(folder / "zeroshot"), str(folder / "finetuned"), "--alphas", "0", "0.3", "1"]
    command += ["--heads", *(str(folder / f"head{k}.safetensors") for k in range(2)), "--best-only", "--select", val]
    command += ["--on", on, "--name", "ImageNetR", "--class-subset", "ImageNetR=imagenet-r"]
    assert main([*command, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results.jsonl")]) == 0
    *rows, best = read(tmp_path / "results.jsonl")
    split = next(key for key in best if key.endswith("/test:top1")).removesuffix(":top1")
    assert best["alpha"] == max(rows, key=lambda row: (row[f"{split}:top1"], -row[f"{split}:nll"]))["alpha"]
    assert "ImageNetR:top1" in best
    assert not any("ImageNetR:top1" in row for row in rows)
    assert "best on" in capsys.readouterr().out


def test_names_must_fit_the_splits(world: Any, tmp_path: Path, capsys: Any) -> None:
    folder, data, _, _ = world
    on = f"imagenet:r:{data.base / 'imagenet-r'}:test"
    command = ["wise", str(folder / "zeroshot"), str(folder / "finetuned"), "--out", str(tmp_path / "out")]
    assert main([*command, "--on", on, "--name", "A", "B"]) == 2
    assert "names A, B: expected 1 different" in capsys.readouterr().err
    assert main([*command, "--on", on, "--name", "A", "--class-subset", "ImageNetR=imagenet-r"]) == 2
    assert "no data set 'ImageNetR' among A" in capsys.readouterr().err
    assert main([*command, "--name", "A"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_frozen_encoder_is_probed_on_stored_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """src/wise_ft.py --freeze-encoder --lr 0.01 --epochs 3 --batch-size 8 --wd 0.1 --warmup_length 2"""
    monkeypatch.chdir(tmp_path)
    data = write_pictures(tmp_path / "pictures")
    clip_models.write_folder(tmp_path / "model", clip_models.make_model(0))
    assert main(["encode", data, "--split", "all", "--name", "pets", "--model", "model", "--quiet"]) == 0
    assert main(["text", data, "--split", "all", "--name", "pets", "--model", "model", "--quiet"]) == 0
    assert main(["fit", "zero_shot", "texts/pets", "-o", "zero_shot.safetensors"]) == 0
    command = ["fit", "adamw", "pets/all", "--prior", "texts/pets", "-o", "probe.safetensors"]
    settings = {"lr": 0.01, "epochs": 3, "batch_size": 8, "weight_decay": 0.1, "warmup": 2}
    assert main([*command, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]) == 0
    zero_shot, probe = as_linear(load("zero_shot.safetensors")), as_linear(load("probe.safetensors"))
    X, y = find_store("pets/all", tmp_path / "cache").numpy()
    weights, bias = (torch.tensor(value, requires_grad=True) for value in (zero_shot.weights, zero_shot.bias))
    optimizer, step = torch.optim.AdamW([weights, bias], lr=0.01, weight_decay=0.1), 0
    for epoch in range(3):
        order = np.random.default_rng([0, epoch]).permutation(len(y))
        for rows in np.split(order, range(8, len(y), 8)):
            logits = torch.from_numpy(X[rows]) @ weights.T + bias
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[rows])).backward()
            torch.nn.utils.clip_grad_norm_([weights, bias], 1.0)
            rate = 0.01 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / (9 - 2))))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            step += 1
    np.testing.assert_allclose(probe.weights, weights.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.bias, bias.detach().numpy(), rtol=1e-4, atol=1e-5)
    command = [
        "evaluate",
        "zero_shot.safetensors",
        "probe.safetensors",
        "--on",
        "pets/all",
        "--alphas",
        "0",
        "0.5",
        "1",
    ]
    assert main([*command, "--results", "results.jsonl"]) == 0
    assert [row["alpha"] for row in read(Path("results.jsonl")) if "alpha" in row] == [0.0, 0.5, 1.0]
