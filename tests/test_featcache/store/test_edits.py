"""Renaming stores and their classes, and deleting stores by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TAP, NumpyDataset, NumpyEncoder, TappedEncoder

from featcache import EncodeOptions, encode_dataset, find_store, list_stores
from featcache.cli.main import main
from featcache.datasets import labels_digest
from featcache.datasets.base import SampleIndex
from featcache.encoding.texts import embed_prompts
from featcache.errors import DatasetError, LabelsChangedError, MismatchError, StoreNotFoundError
from featcache.store import verify
from featcache.store.upkeep.edits import relabel, rename
from heads import Ridge, evaluate, store_moments


@pytest.fixture
def root(tmp_path: Path) -> Path:
    encode_dataset(NumpyDataset(), TappedEncoder(), root=tmp_path, options=EncodeOptions(taps=[TAP]))
    embed_prompts(["ant", "bee"], ["a {}"], NumpyEncoder(), name="animals", root=tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    code = main([*words, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def test_a_renamed_store_is_the_same_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = find_store("fake/train", root)
    head = Ridge().fit(before)
    assert run(capsys, "rename", "fake/train", "pets/all", "--root", str(root))[1] == {
        "old": "fake/train",
        "new": "pets/all",
    }
    after: Any = find_store("pets/all", root)
    assert (after.path, after.name, after.split) == (before.path, "pets", "all")
    assert find_store(f"pets/all#{TAP}", root).name == "pets"
    assert verify(after.path, deep=True).ok
    np.testing.assert_array_equal(after.numpy()[0], before.numpy()[0])
    with pytest.raises(StoreNotFoundError):
        find_store("fake/train", root)
    assert head.frozen().provenance.was_fitted_on(after)  # so that no head is chosen on its training rows
    assert encode_dataset(NumpyDataset(), TappedEncoder(), root=root).hit
    assert rename(after.path, "dogs", root) == ("pets/all", "dogs/all")
    texts = find_store("texts/animals", root)
    assert rename(texts.path, "insects", root) == ("texts/animals", "texts/insects")
    assert find_store("texts/insects", root).path == texts.path


def test_names_that_would_not_be_found_are_refused(root: Path) -> None:
    path = find_store("fake/train", root).path
    for name in ("", "/train", "a/b/c", "a@b", "a#b", "a b", "a/"):
        with pytest.raises(DatasetError, match="choose a name of letters"):
            rename(path, name, root)
    with pytest.raises(DatasetError, match="has no split"):
        rename(find_store("texts/animals", root).path, "a/b", root)
    encode_dataset(NumpyDataset(50), TappedEncoder(), root=root)
    other = next(entry for entry in list_stores(root) if entry.rows == 50)
    rename(other.path, "fake/more", root)
    with pytest.raises(MismatchError, match="already has this name"):
        rename(other.path, "fake/train", root)


def test_classes_of_images_are_renamed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store: Any = find_store("fake/train", root)
    old, labels = store.classnames, store.labels
    code, said, error = run(capsys, "relabel", "fake/train", f"{old[0]}=golden retriever", "--root", str(root))
    assert code == 0, error
    assert said["changed"] == [[old[0], "golden retriever"]]
    after: Any = find_store("fake/train", root)
    assert after.classnames == ("golden retriever", *old[1:])
    assert after.labels_digest == labels_digest(labels, after.classnames) != store.labels_digest
    assert find_store(f"fake/train#{TAP}", root).classnames == after.classnames
    assert verify(after.path, deep=True).ok
    with pytest.raises(MismatchError, match="golden retriever"):
        evaluate([Ridge().fit(store)], [after])
    with pytest.raises(LabelsChangedError, match="the class names differ"):
        encode_dataset(NumpyDataset(), TappedEncoder(), root=root)
    (tmp_path / "classes.txt").write_text("\n".join(old))
    assert run(capsys, "relabel", "fake/train", "--classes", str(tmp_path / "classes.txt"), "--root", str(root))[0] == 0
    assert find_store("fake/train", root).labels_digest == store.labels_digest
    assert encode_dataset(NumpyDataset(), TappedEncoder(), root=root).hit


def test_classes_of_texts_are_renamed(root: Path) -> None:
    store = find_store("texts/animals", root)
    assert relabel(store.path, {"bee": "honey bee"}) == [("bee", "honey bee")]
    assert find_store("texts/animals", root).classnames == ("ant", "honey bee")
    assert verify(store.path, deep=True).ok
    with pytest.raises(LabelsChangedError, match="renamed after these texts were embedded"):
        embed_prompts(["ant", "bee"], ["a {}"], NumpyEncoder(), root=root)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"bea": "wasp"}, "'bea': no class has that name; did you mean 'bee'"),
        ({"bee": "ant"}, "two classes would have this name"),
        (["ant"], "1 class names for 2 classes"),
    ],
)
def test_a_renaming_that_does_not_fit_changes_nothing(root: Path, names: Any, message: str) -> None:
    path = find_store("texts/animals", root).path
    before = (path / "manifest.json").read_bytes()
    with pytest.raises((DatasetError, MismatchError), match=message):
        relabel(path, names)
    assert (path / "manifest.json").read_bytes() == before


def test_a_store_is_deleted_by_name_with_what_was_kept_for_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = find_store("fake/train", root)
    store_moments(store)
    code, said, _ = run(capsys, "rm", "fake/train", "--root", str(root))
    assert (code, said["deleted"], len(said["stores"])) == (0, False, 2)
    assert Path(store.path).exists()
    code, said, _ = run(capsys, "rm", "fake/train", "texts/animals", "--yes", "--root", str(root))
    assert (code, said["deleted"]) == (0, True)
    assert list_stores(root) == []
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_name_of_several_stores_deletes_none(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_dataset(NumpyDataset(50), TappedEncoder(), root=root)
    code, _, error = run(capsys, "rm", "fake/train", "--yes", "--root", str(root))
    assert code == 3
    assert "2 stores match; write one of: fake/train@numpy#" in error
    assert len(list_stores(root)) == 3


def test_a_relabelled_store_with_unreadable_rows_is_found_by_its_new_names(tmp_path: Path) -> None:
    class Renamed(NumpyDataset):
        @property
        def index(self) -> SampleIndex:
            return replace(super().index, classnames=("ant", "wasp", "cat"))

    options = EncodeOptions(max_bad=1)
    store = encode_dataset(NumpyDataset(broken=[5]), NumpyEncoder(), root=tmp_path, options=options).store
    assert relabel(store.path, {"bee": "wasp"}) == [("bee", "wasp")]
    assert encode_dataset(Renamed(broken=[5]), NumpyEncoder(), root=tmp_path, options=options).hit
    with pytest.raises(LabelsChangedError, match="the class names differ"):
        encode_dataset(NumpyDataset(broken=[5]), NumpyEncoder(), root=tmp_path, options=options)
    others = Renamed(broken=[5], labels=(np.arange(40) + 1) % 3)
    with pytest.raises(LabelsChangedError, match="39 of 40 labels differ"):
        encode_dataset(others, NumpyEncoder(), root=tmp_path, options=options)
