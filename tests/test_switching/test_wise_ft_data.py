"""WiSE-FT's other data sets: names, templates and metrics of its results, against independent computations."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.prompts import fill, load_class_list, load_templates
from featcache.prompts.imagenet import imagenet_wnids

pytestmark = pytest.mark.filterwarnings("ignore:.*have no image")


def of_file(name: str) -> Any:
    """A test file of another room, whose makers of small data are used here."""
    path = Path(__file__).parents[1] / "test_featcache" / "datasets" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"made_by_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    return found if isinstance(found, list) else [found]


def zero_shot(prompts: list[list[str]]) -> np.ndarray[Any, Any]:
    """Normalised means of normalised prompts (C, D), in float64."""
    encoder = load_encoder("tiny")
    features = encoder.encode_texts([text for texts in prompts for text in texts]).astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    means = features.reshape(len(prompts), -1, features.shape[1]).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def predictions(folder: Path, ids: list[str], weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    encoder = load_encoder("tiny")
    pictures = [Image.open(folder / name).convert("RGB") for name in ids]
    features = encoder.encode_images([encoder.prepare(picture) for picture in pictures]).astype(np.float64)
    return (features @ weights.T).argmax(axis=1)


def judged(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: str, templates: str, *flags: str) -> Any:
    """The row of the zero-shot head on a test split, and the ids of its samples."""
    (store,) = run(capsys, "encode", spec, "--split", "test", "--quiet")
    (texts,) = run(capsys, "text", spec, "--split", "test", "--templates", templates, "--quiet")
    head = tmp_path / "zs.safetensors"
    run(capsys, "fit", "zero_shot", texts["store"], "-o", head)
    (row,) = run(capsys, "evaluate", head, "--on", store["store"], "--results", tmp_path / "r.jsonl", *flags)
    return row


def test_iwildcam_with_its_templates_and_macro_f1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = of_file("test_wilds")
    rows = [row for row in made.iwildcam(tmp_path / "iwildcam_v2.0") if row["split"] == "test"]
    row = judged(capsys, tmp_path, f"wilds:iwildcam:{tmp_path}", "iwildcam", "--macro-f1")
    names = load_class_list("iwildcam").names
    weights = zero_shot([[f"a photo of {name}.", f"{name} in the wild."] for name in names])
    truth = np.array([r["y"] for r in rows])
    found = predictions(tmp_path / "iwildcam_v2.0", [f"train/{r['filename']}" for r in rows], weights)
    assert row["IWildCamOOD:top1"] == pytest.approx(accuracy_score(truth, found))
    expected = f1_score(truth, found, labels=np.unique(truth), average="macro", zero_division=0)
    assert row["IWildCamOOD:macro_f1"] == pytest.approx(expected)


def test_fmow_with_its_templates_and_worst_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = of_file("test_wilds")
    rows = made.fmow(tmp_path)
    row = judged(capsys, tmp_path, f"wilds:fmow:{tmp_path}", "fmow", "--group", "region")
    kept = [n for n, r in enumerate(rows) if r["split"] == "test" and int(str(r["timestamp"])[:4]) >= 2016]
    names = list(load_class_list("fmow").names)
    weights = zero_shot(fill(load_templates("fmow"), names))
    found = predictions(tmp_path / "fmow_v1.1", [f"images/rgb_img_{n}.png" for n in kept], weights)
    right = np.array([names[p] for p in found]) == np.array([rows[n]["category"] for n in kept])
    region = np.array([made.COUNTRIES.get(str(rows[n]["country_code"]), "") for n in kept])
    assert row["FMOWOOD:top1"] == pytest.approx(right.mean())
    worst = min(right[region == name].mean() for name in set(region) - {""})
    assert row["FMOWOOD:worst_group_top1"] == pytest.approx(worst)


def test_fmow_templates_say_a_and_an() -> None:
    texts = fill(load_templates("fmow"), ["airport_hangar", "zoo"])
    assert [len(prompts) for prompts in texts] == [16, 16]
    assert texts[0][0] == "satellite photo of a airport_hangar."
    assert texts[0][3] == "aerial photo of an airport hangar."
    assert texts[1][2] == "satellite photo of a zoo."
    assert texts[1][12:] == [
        "satellite photo of a zoo in oceania.",
        "aerial photo of a zoo in oceania.",
        "a photo of a zoo.",
        "zoo.",
    ]


def test_macro_f1_counts_false_positives() -> None:
    from heads.evaluation.metrics import macro_f1

    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 5, 200), rng.integers(0, 7, 200)
    counts = np.zeros((7, 7), np.int64)
    np.add.at(counts, (truth, found), 1)
    expected = f1_score(truth, found, labels=np.unique(truth), average="macro", zero_division=0)
    assert macro_f1(counts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "place", "name"),
    [
        ("", "val/n01440764", "ImageNet"),
        ("v2:", "0", "ImageNetV2"),
        ("r:", "n01443537", "ImageNetR"),
        ("a:", "n01498041", "ImageNetA"),
        ("sketch:", "n01440764", "ImageNetSketch"),
        ("objectnet:", "images/alarm_clock", "ObjectNet"),
    ],
)
def test_result_names_are_those_of_wise_ft(
    tmp_path: Path, kind: str, place: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, split = tmp_path / "data", "test" if kind else "val"
    (data / place).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / place / "1.png")
    (store,) = run(capsys, "encode", f"imagenet:{kind}{data},names=wise-ft", "--split", split, "--quiet")
    assert store["name"] == name
    (again,) = run(capsys, "encode", f"imagenet:{kind}{data}", "--split", split, "--quiet")
    assert again["hit"]


def test_visda_with_its_validation_domain_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vehicles = ("aeroplane", "bicycle", "bus", "car", "motorcycle", "skateboard", "train", "truck")
    for name in (*vehicles, "horse", "knife", "person", "plant"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / "validation" / name / f"{name}.png")
    found = run(capsys, "encode", f"collection:visda:{tmp_path}", "--split", "all", "--quiet")
    assert [(store["name"], store["rows"]) for store in found] == [("visda-validation", 12)]


def test_vid_robust_has_pm0_and_pm10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three classes of ImageNet's in small: the sets of two anchors, one frame with two labels."""
    wnids, base = imagenet_wnids(), tmp_path / "imagenet_vid_ytbb_robust" / "imagenet-vid-robust"
    rng = np.random.default_rng(3)
    classes = {"bear": [294, 295, 296], "fox": [277, 278], "zebra": [340]}
    sets, known = {}, {}  # type: dict[str, list[str]], dict[str, list[int]]
    for video in range(12):
        (base / "val" / f"v{video}").mkdir(parents=True)
        for frame in range(3):
            key = f"val/v{video}/{frame}.jpg"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(base / key)
            known[key] = [video % 3, (video + 1) % 3] if frame else [video % 3]
        sets[f"val/v{video}/0.jpg"] = [f"val/v{video}/{frame}.jpg" for frame in (1, 2)]
    files = {
        "metadata/pmsets.json": sets,
        "metadata/labels.json": known,
        "misc/imagenet_vid_class_index.json": {str(n): [f"own{n}", name] for n, name in enumerate(classes)},
        "misc/rev_wnid_map.json": {f"own{n}": [wnids[i] for i in found] for n, found in enumerate(classes.values())},
    }
    for name, content in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(json.dumps(content))
    (store,) = run(capsys, "encode", f"vid-robust:{tmp_path}", "--split", "test", "--quiet")
    (texts,) = run(capsys, "text", "imagenet", "--quiet")
    head = tmp_path / "zs.safetensors"
    run(capsys, "fit", "zero_shot", texts["store"], "-o", head)
    (row,) = run(
        *(capsys, "evaluate", head, "--on", store["store"], "--results", tmp_path / "r.jsonl"),
        *("--projection", f"ImageNetVidRobust=vid-robust:{tmp_path}"),
    )
    weights = zero_shot([[f"a photo of a {name}."] for name in load_class_list("imagenet").names])
    encoder, keys = load_encoder("tiny"), sorted(known)
    pictures = [encoder.prepare(Image.open(base / key).convert("RGB")) for key in keys]
    logits = encoder.encode_images(pictures).astype(np.float64) @ weights.T
    merged = np.stack([logits[:, found].max(axis=1) for found in classes.values()], axis=1).argmax(axis=1)
    right = {key: merged[n] in known[key] for n, key in enumerate(keys)}
    pm0 = np.mean([right[anchor] for anchor in sets])
    pm10 = np.mean([right[anchor] and all(right[frame] for frame in frames) for anchor, frames in sets.items()])
    assert (row["ImageNetVidRobust:pm0"], row["ImageNetVidRobust:pm10"]) == pytest.approx((pm0, pm10))
    assert 0 < pm10 < pm0 < 1
    assert row["ImageNetVidRobust:top1"] == pytest.approx(
        np.mean([merged[n] == known[k][0] for n, k in enumerate(keys)])
    )


def ytbb_tree(base: Path, notes: Path) -> tuple[dict[str, list[str]], dict[str, set[int]], dict[int, list[int]]]:
    """Frames and label files in small: frames of each set, class indices of each anchor, ImageNet's of each class."""
    made = of_file("test_ytbb_robust")
    rng = np.random.default_rng(5)
    groups = {0: [981, 982, 983], 5: [294, 295, 296, 297], 10: [339], 17: [340], 22: [407, 436, 468]}  # 22: car
    sets: dict[str, list[str]] = {}
    known: dict[str, set[int]] = {}
    pairs, anchors, rows = {}, {}, []
    for video in range(24):
        number, own = [0, 5, 6, 10, 17, 22][video % 6], f"v-{video}_{video * 100}"
        rows.append((f"v-{video}", video * 100, number))
        frames = [f"{own}/frame-{n}.jpg" for n in range(8, 13)]
        sets[frames[2]], known[frames[2]] = frames, {number}
        anchors[("/home/me/frames/" if video % 2 else "") + frames[2]] = ["good"]
        if video % 4 == 0:
            anchors[frames[2]].append("zebra")
            known[frames[2]].add(17)
        pairs.update({f"{frames[2]},{frame}": ["similar"] for frame in frames if frame != frames[2]})
        (base / own).mkdir(parents=True)
        scene = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
        for frame in frames:
            Image.fromarray(scene + rng.integers(0, 55, (32, 32, 3), dtype=np.uint8)).save(base / frame)
    made.write_labels(notes, anchors, pairs, rows, {**{n: g for n, g in groups.items() if n != 22}, 23: groups[22]})
    return sets, known, groups


def test_ytbb_robust_has_pm0_and_pm10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six of the 23 classes, of which a head over ImageNet never predicts cow; a frame has the labels of its anchor."""
    videos, notes = tmp_path / "imagenet_vid_ytbb_robust/ytbb-robust/ytbb_videos", tmp_path / "ytbb-robust_metadata"
    sets, known, groups = ytbb_tree(videos, notes)
    source = f"ytbb-robust:{tmp_path},labels={notes}"
    (store,) = run(capsys, "encode", source, "--split", "test", "--quiet")
    (texts,) = run(capsys, "text", "imagenet", "--quiet")
    head = tmp_path / "zs.safetensors"
    run(capsys, "fit", "zero_shot", texts["store"], "-o", head)
    evaluate = (capsys, "evaluate", head, "--on", store["store"], "--results", tmp_path / "r.jsonl")
    (row,) = run(*evaluate, "--projection", f"YTBBRobust={source}")
    (same,) = run(*evaluate, "--projection", source)  # its equals sign separates no data set
    weights = zero_shot([[f"a photo of a {name}."] for name in load_class_list("imagenet").names])
    encoder, keys = load_encoder("tiny"), sorted(frame for frames in sets.values() for frame in frames)
    pictures = [encoder.prepare(Image.open(videos / key).convert("RGB")) for key in keys]
    logits = encoder.encode_images(pictures).astype(np.float64) @ weights.T
    merged = np.full((len(keys), 23), -np.inf)
    for number, members in groups.items():
        merged[:, number] = logits[:, members].max(axis=1)
    found = dict(zip(keys, merged.argmax(axis=1).tolist(), strict=True))
    pm0 = np.mean([found[anchor] in labels for anchor, labels in known.items()])
    pm10 = np.mean([all(found[frame] in known[anchor] for frame in frames) for anchor, frames in sets.items()])
    assert (row["YTBBRobust:pm0"], row["YTBBRobust:pm10"]) == pytest.approx((pm0, pm10))
    assert 0 < pm10 < pm0 < 1
    assert np.isfinite(row["YTBBRobust:nll"])
    assert same["YTBBRobust:pm10"] == row["YTBBRobust:pm10"]
