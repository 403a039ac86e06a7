"""FMoW and iWildCam in WILDS' layout, against a second implementation of its split rules."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.datasets import open_dataset
from featcache.errors import DatasetError
from featcache.prompts import load_class_list

COUNTRIES = {"FRA": "Europe", "KEN": "Africa", "ATA": ""}
SPLITS = ("train", "id_val", "id_test", "val", "test")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no image")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def table(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fmow(root: Path, n: int = 60) -> list[dict[str, object]]:
    folder, rng = root / "fmow_v1.1", np.random.default_rng(0)
    categories = load_class_list("fmow").names
    rows: list[dict[str, object]] = [
        {
            "split": str(rng.choice(["train", "val", "test", "seq"])),
            "img_filename": f"airport_{row}_rgb.jpg",
            "category": categories[int(rng.integers(62))],
            "timestamp": f"{rng.integers(2002, 2018)}-07-0{rng.integers(1, 9)}T10:30:00Z",
            "country_code": str(rng.choice([*COUNTRIES, "ZZZ"])),
        }
        for row in range(n)
    ]
    table(folder / "rgb_metadata.csv", rows)
    table(
        folder / "country_code_mapping.csv",
        [{"name": code, "alpha-3": code, "region": region} for code, region in COUNTRIES.items()],
    )
    (folder / "images").mkdir()
    for row in range(n):
        (folder / "images" / f"rgb_img_{row}.png").write_bytes(png(row))
    return rows


@pytest.mark.parametrize("split", SPLITS)
def test_fmow_splits_follow_wilds(tmp_path: Path, split: str) -> None:
    rows = fmow(tmp_path)
    data = open_dataset(f"wilds:fmow:{tmp_path}", split)
    year = np.array([int(str(row["timestamp"])[:4]) for row in rows])
    own = np.array([row["split"] for row in rows])
    test_ood, val_ood = year >= 2016, (year >= 2013) & (year < 2016)
    wanted = {
        "train": (own == "train") & ~test_ood & ~val_ood,
        "id_val": (own == "val") & ~test_ood & ~val_ood,
        "id_test": (own == "test") & ~test_ood & ~val_ood,
        "val": (own == "val") & val_ood,
        "test": (own == "test") & test_ood,
    }[split]
    places = np.flatnonzero(wanted)
    assert len(places)
    assert data.index.ids == [f"images/rgb_img_{place}.png" for place in places]
    names = load_class_list("fmow").names
    assert [names[label] for label in data.index.labels] == [rows[place]["category"] for place in places]
    assert data.index.metadata["region"].tolist() == [
        COUNTRIES.get(str(rows[place]["country_code"]), "") for place in places
    ]
    assert data.index.metadata["year"].tolist() == year[places].tolist()
    assert data.name == {"id_test": "FMOWID", "test": "FMOWOOD"}.get(split, "fmow")
    assert data.read(0) == png(int(places[0]))


def iwildcam(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {
            "": row,
            "split": SPLITS[row % 5],
            "location_remapped": row % 3,
            "sequence_remapped": row // 2,
            "filename": f"{row:04d}.jpg",
            "y": (7 * row) % 182,
        }
        for row in range(20)
    ]
    table(folder / "metadata.csv", rows)
    (folder / "train").mkdir()
    for row in range(20):
        (folder / "train" / f"{row:04d}.jpg").write_bytes(png(row))
    return rows


@pytest.mark.parametrize("inner", ["", "iwildcam_v2.0"])
def test_iwildcam_splits_follow_wilds(tmp_path: Path, inner: str) -> None:
    rows = iwildcam(tmp_path / inner)
    data = open_dataset(f"wilds:iwildcam:{tmp_path}", "test")
    kept = [row for row in rows if row["split"] == "test"]
    assert data.index.ids == [f"train/{row['filename']}" for row in kept]
    assert data.index.labels.tolist() == [row["y"] for row in kept]
    assert data.index.metadata["location"].tolist() == [row["location_remapped"] for row in kept]
    assert (data.name, data.index.classnames) == ("IWildCamOOD", load_class_list("iwildcam").names)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no metadata\.csv in it, nor in iwildcam_v\*"):
        open_dataset(f"wilds:iwildcam:{tmp_path}", "test")
    rows = iwildcam(tmp_path)
    with pytest.raises(DatasetError, match="no split 'dev'; expected one of train, id_val"):
        open_dataset(f"wilds:iwildcam:{tmp_path}", "dev")
    with pytest.raises(DatasetError, match="one of the names fmow, iwildcam"):
        open_dataset(f"wilds:camelyon17:{tmp_path}", "test")
    table(tmp_path / "metadata.csv", [{**row, "y": "lion"} for row in rows])
    with pytest.raises(DatasetError, match="row 1 holds 'lion'; expected a whole number"):
        open_dataset(f"wilds:iwildcam:{tmp_path}", "train")
    table(tmp_path / "metadata.csv", [{"split": "train", "filename": "a"}])
    with pytest.raises(DatasetError, match="no column location_remapped, sequence_remapped, y"):
        open_dataset(f"wilds:iwildcam:{tmp_path}", "train")
