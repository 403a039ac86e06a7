"""Class vectors computed by another program, as text stores."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CLASSES

from featcache import find_store
from featcache.cli.main import main
from featcache.errors import DatasetError
from featcache.transfer.foreign import read_texts
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features
from featcache.transfer.import_texts import import_texts
from heads import load

N, DIM = len(CLASSES), 6
VECTORS = np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
LABELS = np.arange(30) % N
PICTURES = np.random.default_rng(1).standard_normal((30, DIM)).astype(np.float32)
THEIRS = Source("their-vit", "abc", logit_scale=50.0)


def imported(root: Path, vectors: np.ndarray, source: Source = THEIRS, names: object = CLASSES):
    return import_texts(Foreign(vectors), source, name="t", classnames=names, root=root)


@pytest.mark.parametrize("lie", [UNIT, UNIT.T, 7 * VECTORS, UNIT[:, None]], ids=["CxD", "DxC", "not unit", "CxTxD"])
def test_class_vectors_become_unit_vectors_in_every_layout(tmp_path: Path, lie: np.ndarray) -> None:
    store = imported(tmp_path, lie)
    np.testing.assert_allclose(store.cls, UNIT, atol=1e-6)
    assert (store.classnames, store.logit_scale, store.raw.shape) == (tuple(CLASSES), 50.0, (N, 1, DIM))


def test_prompts_are_averaged_as_encoded_ones_are(tmp_path: Path) -> None:
    raw = np.random.default_rng(2).standard_normal((N, 4, DIM))
    raw[1, 2:] = np.nan  # a class of two prompts
    store = imported(tmp_path, raw)
    unit = raw / np.linalg.norm(raw, axis=2, keepdims=True)
    mean = np.nanmean(unit, axis=1)
    np.testing.assert_allclose(store.cls, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert store.counts.tolist() == [4, 2] + [4] * (N - 2)


def test_the_layout_of_a_square_matrix_follows_from_vector_lengths(tmp_path: Path) -> None:
    square = np.random.default_rng(3).standard_normal((N, N))
    square /= np.linalg.norm(square, axis=1, keepdims=True)
    for lie in (square, square.T):
        np.testing.assert_allclose(imported(tmp_path, lie).cls, square, atol=1e-6)
    with pytest.raises(DatasetError, match="rows and columns match the class names"):
        imported(tmp_path, np.linalg.qr(square)[0])


def test_the_logit_scale_is_the_common_length_of_the_vectors_unless_given(tmp_path: Path) -> None:
    assert imported(tmp_path, np.float16(100) * UNIT.astype(np.float16), Source("m")).logit_scale == pytest.approx(
        100, rel=1e-3
    )
    for vectors, message in ((UNIT, "of length 1"), (VECTORS, "of different lengths")):
        with pytest.raises(DatasetError, match=f"{message}.*--logit-scale"):
            imported(tmp_path, vectors, Source("m"))


@pytest.mark.parametrize(
    ("vectors", "names", "message"),
    [
        (UNIT, None, "without class names.*--classes"),
        (UNIT, [*CLASSES, "one more"], "have shape"),
        (UNIT.astype(str), CLASSES, "expected real numbers"),
        (np.where(np.arange(DIM) == 2, np.nan, UNIT), CLASSES, "NaN or infinite"),
        (UNIT * (np.arange(N) != 1)[:, None], CLASSES, "length 0"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, vectors, names, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        imported(tmp_path, vectors, names=names)
    assert not any(tmp_path.rglob("zarr.json"))


def test_texts_and_features_of_one_model_belong_together_and_others_do_not(tmp_path: Path) -> None:
    train = import_features(Foreign(PICTURES, LABELS), Source("their-vit", "abc"), name="x", root=tmp_path)
    assert imported(tmp_path, UNIT).text_digest in train.text_digests
    assert imported(tmp_path, UNIT, Source("their-vit", "abd", logit_scale=50.0)).text_digest not in train.text_digests


def test_old_imports_without_a_text_tower_are_found_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, job = {"name": "x", "root": tmp_path}, import_module("featcache.transfer.import_features")._ImportJob
    as_now = job.__init__

    def as_before(self: Any, *args: Any) -> None:
        as_now(self, *args)
        self.info["text_digests"] = []

    with monkeypatch.context() as then:
        then.setattr(job, "__init__", as_before)
        import_features(Foreign(PICTURES, LABELS), THEIRS, **made)
    assert import_features(Foreign(PICTURES, LABELS), THEIRS, **made).text_digests == ()


def test_imported_texts_serve_as_zero_shot_weights_and_as_prior(tmp_path: Path, capsys) -> None:
    for split, seed in (("train", 1), ("val", 2)):
        pictures = np.random.default_rng(seed).standard_normal((30, DIM))
        np.savez(tmp_path / f"{split}.npz", features=pictures, labels=LABELS, classnames=CLASSES)
    torch.save(torch.from_numpy(100 * UNIT.T), tmp_path / "text_weights.pt")  # as Tip-Adapter's forks save it
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    said = ["--encoder-name", "their-vit", "--name", "pets"]
    for split in ("train", "val"):
        assert main(["import", str(tmp_path / f"{split}.npz"), *said, "--split", split]) == 0
    assert main(["import", str(tmp_path / "text_weights.pt"), "--texts", *said]) == 0
    assert f"texts/pets@their-vit: {N} classes x 1 prompt x {DIM}, logit scale 100" in capsys.readouterr().out
    assert main(["fit", "zero_shot", "texts/pets", "-o", "zs.safetensors"]) == 0
    assert main(["fit", "ridge", "pets/train", "--prior", "texts/pets", "-o", "ridge.safetensors"]) == 0
    assert main(["evaluate", "zs.safetensors", "ridge.safetensors", "--on", "pets/val"]) == 0
    pictures = np.random.default_rng(2).standard_normal((5, DIM))
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    np.testing.assert_allclose(load("zs.safetensors").logits(pictures), 100 * pictures @ UNIT.T, atol=1e-3)


def test_a_store_names_the_text_tower_of_an_import(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", features=PICTURES, labels=LABELS, classnames=CLASSES)
    np.savez(tmp_path / "texts.npz", text_features=UNIT, classnames=CLASSES)
    of = ["--text-digest", "feedface", "--logit-scale", "20"]
    assert main(["import", str(tmp_path / "train.npz"), "--encoder-name", "vit", "--name", "x", *of]) == 0
    texts = ["import", str(tmp_path / "texts.npz"), "--texts", "--encoder-name", "other name", "--name", "x"]
    assert main([*texts, "--text-digest", "x/train"]) == 0
    store = find_store("texts/x")
    assert (store.text_digest, store.logit_scale) == ("feedface", 20.0)


def test_class_vectors_without_labels_are_told_how_to_become_texts(tmp_path: Path, capsys) -> None:
    torch.save({"weight": torch.from_numpy(UNIT)}, tmp_path / "head.pt")
    np.testing.assert_array_equal(read_texts(tmp_path / "head.pt").features, UNIT)
    np.save(tmp_path / "text.npy", UNIT)
    assert main(["import", str(tmp_path / "text.npy"), "--encoder-name", "m", "--name", "x"]) == 2
    assert "with --texts" in capsys.readouterr().err
