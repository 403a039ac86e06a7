"""Multi-label targets beside the features: written, checked, exported, read back, relabelled, refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache import encode
from featcache.datasets import labels_digest, open_dataset
from featcache.errors import DatasetError, LabelsChangedError, StoreCorruptError
from featcache.store import open_image_store
from featcache.store.upkeep.edits import relabel
from featcache.transfer.export import export
from featcache.transfer.foreign import read_foreign
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features

NAMES = ("ant", "bee", "cow")
TARGETS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, -1, 1]], np.int8)


def made(root: Path, targets: Any = TARGETS, **options: Any) -> Any:
    X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    found = Foreign(X, targets, None, list(NAMES))
    return import_features(found, Source("model"), name="tags", root=root, **options)


def test_targets_are_stored_with_a_digest_of_their_own(tmp_path: Path) -> None:
    store = made(tmp_path, TARGETS.astype(float) + np.where(TARGETS < 0, np.nan, 0))  # NaN is unknown, too
    assert store.multilabel
    np.testing.assert_array_equal(store.targets, TARGETS)
    assert (store.labels == -1).all()
    assert store.labels_digest == labels_digest(TARGETS, NAMES) != labels_digest(TARGETS, NAMES[::-1])
    assert store.labels_digest != labels_digest(np.zeros(4, np.int64), NAMES)
    for (features, targets), (X, Y) in zip(store.blocks(2), (store[:2], store[2:]), strict=True):
        np.testing.assert_array_equal(features, X)
        np.testing.assert_array_equal(targets, Y)
    assert store[3][1].tolist() == [0, -1, 1]


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.parquet", "out.csv"])
def test_exported_targets_come_back(tmp_path: Path, name: str) -> None:
    store = made(tmp_path / "a")
    found = read_foreign(export(store, tmp_path / name))
    np.testing.assert_array_equal(found.labels, TARGETS)
    assert tuple(found.classnames or ()) == NAMES
    again = import_features(found, Source("model"), name="tags", root=tmp_path / "b")
    assert again.labels_digest == store.labels_digest


def test_damage_is_noticed_and_other_targets_are_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(LabelsChangedError, match="1 of 4 labels differ"):
        made(tmp_path, np.where(np.arange(4)[:, None] == 2, 1, TARGETS))
    with pytest.raises(LabelsChangedError, match="any number of labels per row, these have one label per row"):
        made(tmp_path, np.array([0, 1, 2, 0]))
    changed = made(tmp_path, 1 - np.abs(TARGETS), update_labels=True)
    np.testing.assert_array_equal(changed.targets, 1 - np.abs(TARGETS))
    assert relabel(store.path, {"ant": "wasp"}) == [("ant", "wasp")]
    renamed = open_image_store(store.path)
    assert renamed.labels_digest == labels_digest(renamed.targets, ("wasp", "bee", "cow"))
    chunk = store.path / "targets" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="targets"):
        _ = open_image_store(store.path).targets


@pytest.mark.parametrize(
    ("header", "rows", "options"),
    [
        ("path,tags", ["a.png,ant", "b.png,ant|bee", "c.png,", "d.png,cow"], "labels=tags"),
        ("path,tags,maybe", ["a.png,ant,", "b.png,ant;bee,", "c.png,,", "d.png,cow,bee"],
         "labels=tags,unknown=maybe,separator=;"),
        ("path,ant,bee,cow", ["a.png,1,0,0", "b.png,1,1,0", "c.png,0,0,0", "d.png,0,,1"], "labels=ant+bee+cow"),
    ],
)  # fmt: skip
def test_a_table_names_the_classes_of_each_sample(tmp_path: Path, header: str, rows: list[str], options: str) -> None:
    for number, name in enumerate("abcd"):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "data.csv").write_text("\n".join([header, *rows]) + "\n")
    index = open_dataset(f"table:{tmp_path}/data.csv,{options}", "train").index
    wanted = TARGETS.copy()
    wanted[3, 1] = -1 if ("unknown" in options or "+" in options) else 0
    assert index.classnames == NAMES
    np.testing.assert_array_equal(index.targets, wanted)
    assert not index.metadata
    store = encode(f"table:{tmp_path}/data.csv,{options}", "train", root=tmp_path / "root")
    np.testing.assert_array_equal(store.targets, wanted)


def test_pictures_in_memory_take_lists_of_names_or_a_table(tmp_path: Path) -> None:
    pictures = [np.full((8, 8, 3), 50 * number, np.uint8) for number in range(4)]
    names = [["ant"], ["ant", "bee"], [], ["cow"]]
    by_name = encode(pictures, "train", labels=names, root=tmp_path)
    np.testing.assert_array_equal(by_name.targets, np.maximum(TARGETS, 0))
    table = encode(pictures, "train", labels=np.maximum(TARGETS, 0), classnames=NAMES, root=tmp_path)
    assert table.path == by_name.path


def test_other_numbers_and_repeated_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"target of row 0 for 'ant' is 2.0; expected 1"):
        made(tmp_path, TARGETS * 2.0)
    with pytest.raises(DatasetError, match="two classes of multi-label data are named 'ant'"):
        made(tmp_path, classnames=("ant", "ant", "cow"))
