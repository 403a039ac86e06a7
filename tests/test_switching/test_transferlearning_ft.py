"""transferlearning/clip ``--mode ft`` on its folders, from the command line, against a plain loop in torch."""

import json
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from featcache.cli.main import main
from ft.checkpoints.folder import read_state

MEAN, STD = (np.array(clip_models.PREPROCESS[key], np.float64) for key in ("mean", "std"))
CLASSES = ("Alarm_Clock", "Bike")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """dataset/OfficeHome/{Art,Clipart}: no split, folders are the classes."""
    draws = np.random.default_rng(0)
    for domain in ("Art", "Clipart"):
        for shade, name in enumerate(CLASSES):
            folder = tmp_path / "dataset" / "OfficeHome" / domain / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = draws.integers(0, 120, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * shade)
                Image.fromarray(pixels).save(folder / f"{number:05d}.png")
    (tmp_path / "dataset" / "OfficeHome" / "classes.txt").write_text("\n".join(CLASSES))  # a part of its 65
    clip_models.write_folder(tmp_path / "model", clip_models.make_model(2))
    return tmp_path


def pixels_of(folder: Path) -> tuple[torch.Tensor, list[int]]:
    files = [(file, label) for label, name in enumerate(CLASSES) for file in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file, _ in files]) / 255
    pixels = (pixels - MEAN) / STD
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float(), [label for _, label in files]


def prompts() -> torch.Tensor:
    tokens: torch.Tensor = open_clip.SimpleTokenizer(context_length=16)([f"a picture of a {name}" for name in CLASSES])
    return tokens


def test_two_epochs_equal_a_plain_loop(root: Path) -> None:
    """One batch holds the whole domain, so that its order is of no effect: equal captions are negatives."""
    source, out = f"collection:officehome:{root / 'dataset' / 'OfficeHome'}", root / "run"
    command = ["finetune", f"{source},domain=Art", "--split", "all", "--model", str(root / "model"), "--out", str(out)]
    command += ["--recipe", "transferlearning", "--batch-size", "8", "--epochs", "2", "--workers", "1", "--quiet"]
    assert main([*command, "--log-every", "1"]) == 0
    images, labels = pixels_of(root / "dataset" / "OfficeHome" / "Art")
    model: Any = clip_models.make_model(2).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    losses = []
    for _ in range(2):
        v = torch.nn.functional.normalize(model.encode_image(images))
        t = torch.nn.functional.normalize(model.encode_text(prompts()[labels]))
        logits, targets = model.logit_scale.exp() * v @ t.T, torch.arange(8)
        loss = (torch.nn.functional.cross_entropy(logits, targets) / 2) + (
            torch.nn.functional.cross_entropy(logits.T, targets) / 2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["lr"] for record in records] == [5e-5, 5e-5]
    found, start = read_state(out / "last"), clip_models.make_model(2).state_dict()
    for name, value in model.state_dict().items():
        moved, error = (value - start[name]).abs().max(), (found[name] - value).abs()
        if name.endswith("in_proj_bias"):  # a key's bias has no effect: Adam magnifies the rounding of its gradient
            error = torch.cat(error.chunk(3)[::2])
        assert error.max() <= 0.02 * moved + 1e-8, name


def test_the_best_epoch_is_that_of_the_validation_domain(root: Path) -> None:
    source, out = f"collection:officehome:{root / 'dataset' / 'OfficeHome'}", root / "run"
    command = ["finetune", f"{source},domain=Art", "--split", "all", "--model", str(root / "model"), "--out", str(out)]
    command += ["--recipe", "transferlearning", "--batch-size", "4", "--epochs", "3", "--lr", "1e-3", "--workers", "1"]
    assert main([*command, "--quiet", "--val", f"{source},domain=Clipart:all"]) == 0
    judged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    judged = [record | record["val"] for record in judged if "val" in record]
    best = min(judged, key=lambda row: (-row["accuracy"], row["nll"], row["step"]))
    model: Any = clip_models.make_model(0).eval()
    model.load_state_dict(read_state(out / "best"))
    images, labels = pixels_of(root / "dataset" / "OfficeHome" / "Clipart")
    with torch.no_grad():
        v, t = (torch.nn.functional.normalize(x) for x in (model.encode_image(images), model.encode_text(prompts())))
        logits = model.logit_scale.exp() * v @ t.T
    assert (logits.argmax(dim=1) == torch.tensor(labels)).float().mean().item() == pytest.approx(best["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item() == pytest.approx(
        best["nll"], rel=1e-4
    )
