"""Export and import: every exported format is read back, common formats become stores that heads can be fitted on."""

import csv
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CLASSES, NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset, list_stores
from featcache.cli.main import main
from featcache.errors import DatasetError, FeatcacheError, FeatcacheWarning, LabelsChangedError, MismatchError
from featcache.store import ImageStore, find_store, verify
from featcache.store.places import local, targets
from featcache.transfer.export import FORMATS, export
from featcache.transfer.foreign import read_array, read_foreign
from featcache.transfer.formats import FOLDERS, Foreign
from featcache.transfer.import_features import Source, import_features

N, D = 30, 6
WITHOUT_IDS = ("fe", "clip-benchmark", "tip-adapter")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    options = EncodeOptions(chunk_rows=8, max_bad=1)
    return encode_dataset(NumpyDataset(broken=[3]), NumpyEncoder(), root=tmp_path / "cache", options=options).store


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32) * 7


LABELS = np.arange(N) % 3


def unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def test_features_before_normalisation_are_written_without_unreadable_rows_and_read_back(
    store: ImageStore, tmp_path: Path
) -> None:
    found = read_foreign(export(store, tmp_path / "fe.csv", "fe"))
    rows, labels = store.numpy(np.float64)
    np.testing.assert_allclose(found.features, rows * store.array("norm")[store.valid][:, None], atol=6e-5)
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("kind", [kind for kind in (*FORMATS, *FOLDERS) if kind not in WITHOUT_IDS])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_exports_are_read_back(store: ImageStore, tmp_path: Path, kind: str, dtype: str) -> None:
    if kind == "lance":
        pytest.importorskip("lance")
    target = export(store, tmp_path / f"out.{kind}", kind, dtype)
    found = read_foreign(target)
    rows, labels = store.numpy(np.dtype(dtype))
    np.testing.assert_array_equal(found.features.astype(dtype), rows)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.ids == [name for name in store.ids if name != "image-0003"]
    assert tuple(found.classnames or ()) == CLASSES
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["clip-benchmark", "tip-adapter"])
def test_folders_of_other_programs_keep_the_class_names(store: ImageStore, tmp_path: Path, kind: str) -> None:
    export(store, tmp_path / "out", kind, "float16")
    assert tuple(read_foreign(tmp_path / "out").classnames or ()) == CLASSES
    (tmp_path / "out" / "classes.txt").unlink()
    assert tuple(read_foreign(tmp_path / "out").classnames or ()) != CLASSES


def test_blocks_of_an_export_keep_their_ids(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.transfer.rows.BLOCK_ROWS", 7)
    with open(export(store, tmp_path / "rows.csv"), encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row in table:
        number = store.ids.index(row["id"])
        assert row["class"] == CLASSES[store.labels[number]]
        assert np.float32(row["f2"]) == np.float32(store.gather(np.array([number]))[0, 2])
    assert len(table) == 39


def test_csv_reads_back_the_stored_values_exactly(store: ImageStore, tmp_path: Path) -> None:
    found = read_foreign(export(store, tmp_path / "rows.csv", dtype=np.float16))
    np.testing.assert_array_equal(found.features, store.numpy(np.float32)[0])


def test_csv_warns_of_classes_without_rows(tmp_path: Path) -> None:
    """One in the middle, and one at the end; parquet and npz keep them."""
    rows = Foreign(features(), LABELS * 2, None, ["a", "b", "c", "d", "e", "f"])
    store = import_features(rows, Source("m"), name="x", root=tmp_path / "cache")
    with pytest.warns(FeatcacheWarning, match=r"3 of 6 classes have no rows.*\(b, d, f\); import it with --classes"):
        target = export(store, tmp_path / "x.csv")
    again = import_features(
        read_foreign(target), Source("m"), name="y", classnames=list("abcdef"), root=tmp_path / "cache"
    )
    assert again.classnames == store.classnames
    for kind in ("parquet", "npz", "safetensors", "npy", "clip-benchmark"):
        assert read_foreign(export(store, tmp_path / f"x.{kind}", kind), "train").classnames == list("abcdef")


@pytest.mark.parametrize("kind", ["npy", "tip-adapter", "clip-benchmark"])
def test_line_breaks_in_names_are_refused_by_formats_of_lines(tmp_path: Path, kind: str) -> None:
    """Never another id; other separators of lines stay as they are. Nothing is left of what failed."""
    names = ["a\u2028b", "c\x85", "d"]
    given = Foreign(features(), LABELS, [f"{row}\x0b{row}" for row in range(N)], names)
    store = import_features(given, Source("m"), name="x", root=tmp_path / "cache")
    found = read_foreign(export(store, tmp_path / "good", kind), "train")
    assert found.classnames == names
    assert found.ids == (given.ids if kind == "npy" else None)
    broken = Foreign(features(), LABELS, None, ["a", "b\nc", "d"])
    other = import_features(broken, Source("m"), name="y", root=tmp_path / "cache")
    (tmp_path / "kept").mkdir()
    for target in ("new/deep/er", "kept"):
        with pytest.raises(MismatchError, match=r"'b\\nc' contains a line break.*export to npz or parquet"):
            export(other, tmp_path / target, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "good", "kept"]


@pytest.mark.parametrize("kind", ["npy", "clip-benchmark", "clip-retrieval", "tip-adapter", "huggingface"])
def test_a_failed_export_to_a_folder_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The disk is full from each sync on in turn: files of two exports never lie side by side."""
    given = [Foreign(unit(features(seed)), LABELS, [f"{seed}-{row}" for row in range(N)], [*"abc"]) for seed in (0, 1)]
    old, new = (import_features(found, Source("m"), name="x", root=tmp_path / "cache") for found in given)
    (old_files, new_files) = (folder_files(export(store, tmp_path / store.dataset_key, kind)) for store in (old, new))
    export(old, tmp_path / "out", kind)
    real, left = os.fsync, [0]

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    for module in (local, targets):
        monkeypatch.setattr(module, "synced", True)
    monkeypatch.setattr(os, "fsync", full)
    for failing in range(1, 100):
        left[0] = failing
        try:
            export(new, tmp_path / "out", kind)
        except FeatcacheError as error:
            assert "nothing there was replaced" in str(error)  # noqa: PT017 - a later export succeeds
            assert folder_files(tmp_path / "out") == old_files
        else:
            break
    assert failing > 2
    assert folder_files(tmp_path / "out") == new_files


def folder_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_export_to_a_file_leaves_no_folder(store: ImageStore, tmp_path: Path) -> None:
    unknown = import_features(Foreign(unit(features()), LABELS), Source("m"), name="x", root=tmp_path / "cache")
    with pytest.raises(MismatchError, match="lengths before normalisation are unknown"):
        export(unknown, tmp_path / "a" / "b" / "x.txt", "fe")
    assert not (tmp_path / "a").exists()


def test_invalid_exports_are_refused(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(FeatcacheError, match=r"cannot export to 'xlsx'; expected one of safetensors, npz, parquet"):
        export(store, tmp_path / "out.xlsx")
    with pytest.raises(FeatcacheError, match=r"is a folder; name a file, or - for standard output \(csv\)"):
        export(store, tmp_path, "csv")


def write_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", image_features=features(), targets=LABELS)
    return folder / "a.npz"


def write_npy(folder: Path) -> Path:
    np.save(folder / "features.npy", features())
    np.save(folder / "labels.npy", LABELS)
    return folder / "features.npy"


def write_tensor_dict(folder: Path) -> Path:
    torch.save({"features": torch.from_numpy(features()), "labels": torch.from_numpy(LABELS)}, folder / "a.pt")
    return folder / "a.pt"


def write_wise_ft(folder: Path) -> Path:
    torch.save(features(), folder / "features.pt")
    torch.save(LABELS, folder / "labels.pt")
    return folder


def write_clip_benchmark(folder: Path) -> Path:
    torch.save(torch.from_numpy(features()), folder / "features_train.pt")
    torch.save(torch.from_numpy(LABELS), folder / "targets_train.pt")
    torch.save(torch.from_numpy(features(1)), folder / "features_val.pt")
    return folder


def write_transferlearning(folder: Path) -> Path:
    np.savetxt(folder / "fe_ViT-B_amazon.csv", np.column_stack([features(), LABELS]), fmt="%.4f")
    return folder / "fe_ViT-B_amazon.csv"


WRITERS = (write_npz, write_npy, write_tensor_dict, write_wise_ft, write_clip_benchmark, write_transferlearning)


@pytest.mark.parametrize("write", WRITERS)
def test_files_in_common_formats_become_stores(tmp_path: Path, write: Any) -> None:
    found = read_foreign(write(tmp_path), "train")
    store = import_features(found, Source("ViT-B", "v1"), name="office", classnames=CLASSES, root=tmp_path / "cache")
    rows, labels = store.numpy()
    assert np.abs(rows - unit(features())).max() <= 2.0**-11 + (1e-4 if write is write_transferlearning else 0)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_allclose(store.array("norm"), np.linalg.norm(features(), axis=1), rtol=1e-4)
    assert (store.name, store.encoder_name, store.classnames) == ("office", "ViT-B", CLASSES)
    assert verify(store.path, deep=True).ok


def test_other_features_are_another_store_of_the_same_encoder(tmp_path: Path) -> None:
    def bring(seed: int, digest: str, labels: np.ndarray = LABELS) -> ImageStore:
        return import_features(Foreign(features(seed), labels), Source("m", digest), name="x", root=tmp_path)

    one, two, three = bring(0, "a"), bring(1, "a"), bring(0, "b")
    assert one.encoder_key == two.encoder_key != three.encoder_key
    assert one.dataset_key == three.dataset_key != two.dataset_key
    before = {path: path.stat().st_mtime_ns for path in Path(one.path).rglob("*")}
    assert bring(0, "a").path == one.path
    assert {path: path.stat().st_mtime_ns for path in Path(one.path).rglob("*")} == before


def bring(root: Path, labels: np.ndarray = LABELS, name: str = "pets", split: str = "train", **more: Any) -> ImageStore:
    classnames = more.pop("classnames", CLASSES)
    source = Source("m", "a", more.pop("text_digest", None), more.pop("logit_scale", None))
    return import_features(
        Foreign(features(), labels), source, name=name, split=split, classnames=classnames, root=root, **more
    )


def test_the_same_features_under_another_name_or_split_are_another_store(tmp_path: Path) -> None:
    pets, shifted = bring(tmp_path), (LABELS + 1) % 3
    others = [bring(tmp_path, shifted, name="cb", split="test"), bring(tmp_path, shifted, split="test")]
    assert len({store.path for store in (pets, *others)}) == 3
    assert {store.encoder_key for store in others} == {pets.encoder_key}
    assert [entry.reference for entry in list_stores(tmp_path)] == ["cb/test@m", "pets/test@m", "pets/train@m"]
    assert find_store("pets/train", tmp_path).labels.tolist() == LABELS.tolist()
    assert all(store.labels.tolist() == shifted.tolist() for store in others)


def test_labels_may_be_class_names(tmp_path: Path) -> None:
    texts = np.array(["dog", "cat", "emu"])[LABELS]
    np.savez(tmp_path / "x.npz", features=features(), labels=texts)
    found = read_foreign(tmp_path / "x.npz")
    store = import_features(found, Source("m"), name="pets", root=tmp_path)
    assert store.classnames == ("cat", "dog", "emu")
    assert [store.classnames[label] for label in store.labels] == texts.tolist()
    given = bring(tmp_path, texts, classnames=["emu", "yak", "dog", "cat"], name="listed")
    assert given.labels.tolist() == [{"emu": 0, "dog": 2, "cat": 3}[text] for text in texts]
    with pytest.raises(DatasetError, match="labels 'cat' are not among the 2 class names"):
        bring(tmp_path, texts, classnames=["emu", "dog"])


def test_labels_that_are_names_of_several_classes_are_refused(tmp_path: Path) -> None:
    texts = np.array(["dog", "cat", "emu"])[LABELS]
    with pytest.raises(DatasetError, match="labels 'dog' are names of several classes each; use class indices"):
        bring(tmp_path, texts, classnames=["emu", "dog", "cat", "dog"])
    found = bring(tmp_path, texts, classnames=["emu", "dog", "cat", "yak", "yak"])
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_class_names_and_ids_may_be_byte_strings(tmp_path: Path) -> None:
    ids = np.array([f"bild-{row}-ä".encode() for row in range(len(LABELS))])
    np.savez(
        tmp_path / "x.npz", features=features(), labels=LABELS, classnames=np.array([b"cat", b"dog", b"emu"]), ids=ids
    )
    found = read_foreign(tmp_path / "x.npz")
    assert found.classnames == ["cat", "dog", "emu"]
    assert (found.ids or [])[0] == "bild-0-ä"


def test_rows_of_zeros_give_a_warning(tmp_path: Path) -> None:
    given = features()
    given[[1, 3]] = 0
    found = Foreign(given, LABELS, classnames=list(CLASSES))
    with pytest.warns(FeatcacheWarning, match="2 rows of zeros, first row 1, cannot be normalised and stay zero"):
        store = import_features(found, Source("m"), name="pets", root=tmp_path)
    assert np.linalg.norm(store.features[:4].astype(float), axis=1).round(2).tolist() == [1, 0, 1, 0]


def test_labels_that_start_at_one_give_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 4 classes have no image: class 0; they stay"):
        bring(tmp_path, LABELS + 1, classnames=None)


def test_changed_labels_are_replaced_only_on_request(tmp_path: Path) -> None:
    store, shifted = bring(tmp_path), (LABELS + 1) % 3
    before = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")}
    with pytest.raises(LabelsChangedError, match=r"train@m already holds .*30 of 30 labels differ.*--update-labels"):
        bring(tmp_path, shifted)
    with pytest.raises(LabelsChangedError, match=r"class names differ \('cat' there, 'cow' now\)"):
        bring(tmp_path, classnames=("ant", "bee", "cow"))
    with pytest.raises(LabelsChangedError, match=r"class names differ \(3 there, 4 now\)"):
        bring(tmp_path, classnames=(*CLASSES, "cow"))
    assert {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")} == before
    relabelled = bring(tmp_path, shifted, update_labels=True)
    assert (relabelled.path, relabelled.labels.tolist()) == (store.path, shifted.tolist())
    np.testing.assert_array_equal(relabelled.array("features"), store.array("features"))
    assert verify(relabelled.path, deep=True).ok


def test_stored_values_are_kept_unless_an_import_gives_them(tmp_path: Path) -> None:
    bring(tmp_path, text_digest="t", logit_scale=100.0)
    store = bring(tmp_path, (LABELS + 1) % 3, update_labels=True)
    assert (store.text_digest, store.logit_scale) == ("t", 100.0)
    with pytest.raises(LabelsChangedError, match=r"its logit_scale was 100.0, now 50.0"):
        bring(tmp_path, (LABELS + 1) % 3, logit_scale=50.0)


def test_an_import_with_other_labels_exits_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", features=features(), labels=LABELS)
    command = ["import", str(tmp_path / "a.npz"), "--encoder-name", "m", "--name", "x", "--root", str(tmp_path / "c")]
    assert main(command) == main(command) == 0
    np.savez(tmp_path / "a.npz", features=features(), labels=LABELS[::-1])
    assert main(command) == 5
    assert "LabelsChangedError: x/train@m already holds these features" in capsys.readouterr().err
    assert main([*command, "--update-labels"]) == 0
    assert find_store("x/train", tmp_path / "c").labels.tolist() == LABELS[::-1].tolist()


BAD = {
    "no labels found": Foreign(features()),
    "labels are int64": Foreign(features(), LABELS[:-1]),
    "30 integers": Foreign(features(), LABELS + 0.5),
    "expected \\(N, D\\)": Foreign(features()[0], LABELS),
    "first row 4": Foreign(np.where(np.arange(N)[:, None] == 4, np.nan, features()), LABELS),
    "out of range": Foreign(features(), LABELS - 1),
    "occur more than once": Foreign(features(), LABELS, ["same"] * N),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_features_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        import_features(BAD[message], Source("m"), name="x", root=tmp_path)
    assert list_stores(tmp_path) == []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_reading_a_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features": Evil()}, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    torch.save(np.array([Evil()], dtype=object), tmp_path / "b.pt")
    for name in ("a.pt", "a.npy", "b.pt"):
        with pytest.raises(DatasetError, match="cannot be read"):
            read_foreign(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_missing_and_invalid_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    np.savez(tmp_path / "b.npz", other=LABELS)
    cases = {"a.npz": "cannot be read", "b.npz": "holds 'other'; expected one of features", "c.npy": "no such file"}
    for name, message in (cases | {"d.xls": "unknown kind", "": "contains no features"}).items():
        with pytest.raises(DatasetError, match=message):
            read_foreign(tmp_path / name)
    with pytest.raises(DatasetError, match="expected labels in a"):
        read_array(tmp_path / "labels.xls")


def test_import_export_and_a_head_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    np.savez(tmp_path / "train.npz", features=features(), labels=LABELS)
    np.save(tmp_path / "val.npy", features(1))
    np.savetxt(tmp_path / "val.txt", LABELS, fmt="%d")
    said = [
        "--encoder-name",
        "their-vit",
        "--digest",
        "abc",
        "--name",
        "theirs",
        "--classes",
        str(tmp_path / "classes.txt"),
    ]
    assert main(["import", str(tmp_path / "train.npz"), *said]) == 0
    more = ["--split", "val", "--labels", str(tmp_path / "val.txt")]
    assert main(["import", str(tmp_path / "val.npy"), *said, *more]) == 0
    assert "theirs/val@their-vit: 30 x 6, imported from val.npy" in capsys.readouterr().out
    assert main(["export", "theirs/val", str(tmp_path / "out.parquet")]) == 0
    head = tmp_path / "ridge.safetensors"
    assert main(["fit", "ridge", "theirs/train", "-o", str(head)]) == 0
    assert main(["evaluate", str(head), "--on", "theirs/val"]) == 0


def test_an_imported_store_is_found_by_its_name(tmp_path: Path) -> None:
    store = import_features(Foreign(features(), LABELS), Source("m"), name="x", split="val", root=tmp_path)
    assert find_store("x/val@m", tmp_path).path == store.path
    assert store.provenance["imported"] is True


def test_integer_ids_become_texts_and_others_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"features": pa.array([[1.0, 2.0], [0.5, 1.0]]), "label": pa.array([0, 1])}
    parquet.write_table(pa.table(columns | {"id": pa.array([7, 3])}), tmp_path / "x.parquet")
    made = import_features(read_foreign(tmp_path / "x.parquet"), Source("m"), name="n", root=tmp_path / "cache")
    assert list(made.ids) == ["7", "3"]
    for odd in (pa.array([7, None]), pa.array([{"a": 1}, {"a": 2}]), pa.array([True, False])):
        parquet.write_table(pa.table(columns | {"id": odd}), tmp_path / "x.parquet")
        with pytest.raises(DatasetError, match=r"x.parquet: row [01]: id .*; expected text or an integer"):
            read_foreign(tmp_path / "x.parquet")


@pytest.mark.parametrize("names", [[1, "a"], [["a"], []], {"a": 1, "b": 2}, "ab"])
def test_class_names_must_be_texts(tmp_path: Path, names: Any) -> None:
    found = Foreign(np.eye(2), np.arange(2), classnames=names)
    with pytest.raises(DatasetError, match=r"class names are .*expected a list of texts"):
        import_features(found, Source("m"), name="n", root=tmp_path)
