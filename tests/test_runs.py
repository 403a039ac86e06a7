"""``runs/imagenet.sh`` on 1,000 drawn JPEGs laid out as ImageNet and its shifts, with the embedded model."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import warm_featcache

from featcache.prompts.imagenet import imagenet_wnids, subset_wnids

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "runs" / "imagenet.sh"


def draw(folder: Path, count: int, rng: np.random.Generator, hue: np.ndarray) -> None:
    """Small JPEGs of one colour with noise; an uncompressed side of 40 pixels is enough for a model of 32."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.clip(hue + rng.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=80)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty classes, ten each of ImageNet-R and ImageNet-A among them: 600 + 100 + 100 + 60 + 60 + 80 pictures."""
    base, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    wnids = list(imagenet_wnids())
    shared = [w for w in subset_wnids("imagenet-r") if w in set(subset_wnids("imagenet-a"))]
    classes = shared[:10] + [w for w in wnids if w not in shared][:10]
    hues = {wnid: rng.uniform(30, 220, 3) for wnid in classes}
    for wnid, hue in hues.items():
        draw(base / "imagenet" / "train" / wnid, 30, rng, hue)
        draw(base / "imagenet" / "val" / wnid, 5, rng, hue)
        draw(base / "imagenetv2" / str(wnids.index(wnid)), 5, rng, hue)
        draw(base / "sketch" / wnid, 4, rng, hue.mean() + np.zeros(3))
    for wnid in classes[:10]:
        draw(base / "imagenet-r" / wnid, 6, rng, hues[wnid])
        draw(base / "imagenet-a" / wnid, 6, rng, hues[wnid])
    assert len(list(base.rglob("*.jpg"))) == 1000
    return base / "imagenet"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"MODEL": "tiny", "PRETRAINED": "", "TEMPLATES": "bare", **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=os.environ | settings, capture_output=True, text=True)


def test_from_folders_to_the_report(imagenet: Path, tmp_path: Path) -> None:
    with warm_featcache(tmp_path) as command:
        ran = run(str(imagenet), str(tmp_path), FEATCACHE=str(command))
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["head"] for row in rows] == ["zero_shot", "ridge:ridge", "ridge:ridge_to_zero_shot", "logistic", "knn"]
    names = ("imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch")
    assert all(0 <= row[f"{name}:top1"] <= 1 for row in rows for name in names)
    assert min(row["imagenet:top1"] for row in rows[1:4]) > 0.6  # colours tell the classes apart; chance is 0.05
    assert rows[1]["imagenet-r:top1"] > 0.6  # among the 200 classes of ImageNet-R
    assert "<html" in (tmp_path / "report.html").read_text()
    times = [line.split("\t") for line in (tmp_path / "times.tsv").read_text().splitlines()]
    assert [name for name, _ in times][:2] == ["encode train", "encode val"]
    assert times[-1][0] == "evaluate"
    assert all(float(seconds) > 0 for _, seconds in times)


@pytest.mark.nightly
def test_missing_shifts_are_left_out_and_reported(imagenet: Path, tmp_path: Path) -> None:
    away = {name: str(tmp_path / "none") for name in ("V2", "R", "A", "SKETCH")}
    with warm_featcache(tmp_path) as command:
        ran = run(str(imagenet), str(tmp_path / "out"), HEADS="ridge", FEATCACHE=str(command), **away)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("left out: imagenet-") == 4


def test_without_a_folder_it_prints_its_usage() -> None:
    ran = run()
    assert ran.returncode == 2
    assert "bash runs/imagenet.sh IMAGENET [OUT]" in ran.stderr
