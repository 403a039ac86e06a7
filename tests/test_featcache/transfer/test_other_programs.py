"""Features to and from other programs, tested with the program itself if it is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CLASSES, NumpyDataset, NumpyEncoder

from featcache import encode_dataset, load_encoder
from featcache.cli.main import main
from featcache.errors import FeatcacheError
from featcache.store import ImageStore
from featcache.transfer.clip_benchmark import load_clip_benchmark
from featcache.transfer.export import export
from featcache.transfer.foreign import read_foreign
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path / "cache").store


def test_clip_benchmarks_own_data_set_reads_the_folder(store: ImageStore, tmp_path: Path) -> None:
    module = pytest.importorskip("clip_benchmark.metrics.linear_probe")
    export(store, tmp_path / "features", "clip-benchmark")
    held = [torch.load(tmp_path / "features" / f"{what}_train.pt") for what in ("features", "targets")]
    data = module.FeatureDataset(*held)
    rows, labels = store.numpy(np.float32)
    assert len(data) == len(rows)
    np.testing.assert_array_equal(torch.stack([data[i][0] for i in range(len(data))]), rows)
    np.testing.assert_array_equal([int(data[i][1]) for i in range(len(data))], labels)
    found = read_foreign(tmp_path / "features", "train")
    np.testing.assert_array_equal(found.features, rows)


def test_clip_benchmarks_zero_shot_metric_runs_on_an_encoder_of_featcache() -> None:
    models = pytest.importorskip("clip_benchmark.models")
    metric = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    models.TYPE2FUNC["featcache"] = load_clip_benchmark
    model, transform, tokenizer = models.TYPE2FUNC["featcache"](
        model_name="tiny", pretrained="", cache_dir="", device="cpu"
    )
    from featcache.datasets import open_dataset

    data = open_dataset("digits", "test")
    pictures = [data.decode(data.read(row), row) for row in range(40)]
    batches = [(torch.stack([transform(one) for one in pictures]), torch.from_numpy(data.index.labels[:40]))]
    names, template = list(data.index.classnames), ["a photo of the number {c}."]
    weights = metric.zero_shot_classifier(model, tokenizer, names, template, "cpu", amp=False)
    logits, targets = metric.run_classification(model, weights, batches, "cpu", amp=False)
    encoder = load_encoder("tiny", device="cpu")
    images = encoder.encode_images([encoder.prepare(one) for one in pictures]).astype(np.float64)
    texts = encoder.encode_texts([template[0].format(c=name) for name in names]).astype(np.float64)
    cosines = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    np.testing.assert_allclose(logits.numpy() / 100, cosines, atol=1e-5)
    assert targets.tolist() == data.index.labels[:40].tolist()


def test_clip_retrievals_partitions_are_read_in_order(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for folder in ("img_emb", "metadata"):
        (tmp_path / folder).mkdir()
    values = np.random.default_rng(0).standard_normal((12 * 3, 4)).astype(np.float16)
    for part in range(12):  # 10 comes after 2
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", values[3 * part : 3 * part + 3])
        names = [f"pictures/{part}-{row}.jpg" for row in range(3)]
        parquet.write_table(pa.table({"image_path": names}), tmp_path / "metadata" / f"metadata_{part}.parquet")
    np.save(tmp_path / "labels.npy", np.arange(36) % 2)
    found = read_foreign(tmp_path)
    np.testing.assert_array_equal(found.features, values)
    assert found.ids is not None
    assert found.ids[30] == "pictures/10-0.jpg"
    words = ["--encoder-name", "ViT", "--name", "crawl", "--labels", str(tmp_path / "labels.npy")]
    assert main(["import", str(tmp_path), *words, "--root", str(tmp_path / "cache")]) == 0


def test_clip_retrievals_reader_finds_the_rows(store: ImageStore, tmp_path: Path) -> None:
    pytest.importorskip("embedding_reader")
    from embedding_reader import EmbeddingReader

    folder = export(store, tmp_path / "out", "clip-retrieval", "float16")
    reader = EmbeddingReader(
        str(folder / "img_emb"),
        file_format="parquet_npy",
        metadata_folder=str(folder / "metadata"),
        meta_columns=["image_path", "label"],
    )
    ((rows, facts),) = list(reader(batch_size=1000))
    np.testing.assert_array_equal(rows, store.numpy(np.float16)[0])
    assert facts["image_path"].tolist() == list(store.ids)


def test_a_folder_with_another_export_is_refused(store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "img_emb").mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_1.npy", np.zeros((2, 3)))
    with pytest.raises(FeatcacheError, match=r"contains img_emb_1\.npy of another export.*name a new folder"):
        export(store, folder, "clip-retrieval")
    assert [file.name for file in folder.rglob("*.npy")] == ["img_emb_1.npy"]


@pytest.mark.parametrize("kind", ["clip-retrieval", "huggingface"])
def test_multilabel_targets_are_read_back(kind: str, tmp_path: Path) -> None:
    if kind == "huggingface":
        pytest.importorskip("datasets")
    X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    targets = np.array([[1, 0, -1], [0, 1, 1]] * 3, np.int8)
    store = import_features(Foreign(X, targets, None, ["cat", "dog", "emu"]), Source("e"), name="m", root=tmp_path)
    found = read_foreign(export(store, tmp_path / "out", kind))
    np.testing.assert_array_equal(found.labels, targets)
    assert list(found.classnames or ()) == ["cat", "dog", "emu"]


def test_hugging_face_labels_are_numbers_if_class_names_repeat(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    names = ["missile", "b", "missile"]
    store = import_features(Foreign(X, np.arange(6) % 3, None, names), Source("e"), name="m", root=tmp_path)
    found = read_foreign(export(store, tmp_path / "out", "huggingface"))
    np.testing.assert_array_equal(found.labels, np.arange(6) % 3)
    assert list(found.classnames or ()) == names


def test_the_npz_has_the_keys_of_open_clips_linear_probe(store: ImageStore, tmp_path: Path) -> None:
    with np.load(export(store, tmp_path / "train.npz")) as found:
        assert found["features"].dtype == np.float32
        assert found["targets"].dtype.kind == "i"
        assert found["classnames"].tolist() == list(CLASSES)
        assert len(set(found["image_ids"].tolist())) == len(store)
        for key in ("image_ids", "group_ids", "patient_ids"):
            assert found[key].dtype.kind == "U"
            assert found[key].shape == (len(store),)


def test_lance_searches_the_vectors(store: ImageStore, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    folder = export(store, tmp_path / "out.lance")
    rows = store.numpy(np.float32)[0]
    query = {"column": "features", "q": rows[7], "k": 1}
    (nearest,) = lance.dataset(str(folder)).to_table(nearest=query).to_pylist()
    assert nearest["id"] == store.ids[7]


def test_a_hugging_face_data_set_has_class_labels(store: ImageStore, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_from_disk(str(export(store, tmp_path / "out", "huggingface")))
    assert found.features["label"].names == list(CLASSES)
    np.testing.assert_array_equal(found.with_format("numpy")[:]["features"], store.numpy(np.float32)[0])
    datasets.DatasetDict({"val": found}).save_to_disk(str(tmp_path / "splits"))
    assert read_foreign(tmp_path / "splits", "val").classnames == list(CLASSES)
    with pytest.raises(ValueError, match="no split 'test'; expected one of val"):
        read_foreign(tmp_path / "splits", "test")


def test_mteb_takes_embeddings_from_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    from featcache.transfer.mteb import FeatureCache

    cache = FeatureCache(tmp_path / "one")
    items = [{"text": text} for text in ("a", "bb", "ccc")]
    cache.add(items, np.eye(3, dtype=np.float32))
    cache.save()
    cache.add([{"text": "dddd"}], np.ones((1, 3), np.float32))
    cache.save()
    again = FeatureCache(tmp_path / "one")
    again.load()
    np.testing.assert_array_equal(again.get_vector(items[1]), [0, 1, 0])
    np.testing.assert_array_equal(again.get_vector({"text": "dddd"}), np.ones(3))
    assert again.get_vector({"text": "e"}) is None
    file = min((tmp_path / "one").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        FeatureCache(tmp_path / "one").load()


def test_mteb_encodes_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    from types import SimpleNamespace

    from datasets import Dataset
    from mteb.models.cache_wrappers import CachedEmbeddingWrapper
    from torch.utils.data import DataLoader

    from featcache.transfer.mteb import FeatureCache

    class Model:
        mteb_model_meta = None
        asked = 0

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            self.asked += len(inputs.dataset)
            return np.array([[len(one["text"]), 0.1] for one in inputs.dataset], np.float32)

    model, found = Model(), []
    inputs = DataLoader(Dataset.from_dict({"text": ["a", "bb", "ccc"]}))
    task: Any = SimpleNamespace(name="Task", modalities=["text"], get_modalities=lambda _: ["text"], category="t2t")
    for _ in range(2):
        wrapped: Any = CachedEmbeddingWrapper(model, tmp_path, cache_backend=FeatureCache)
        found.append(wrapped.encode(inputs, task_metadata=task, hf_split="test", hf_subset="default"))
        wrapped.close()
    assert model.asked == 3
    np.testing.assert_array_equal(found[0], [[1, np.float32(0.1)], [2, np.float32(0.1)], [3, np.float32(0.1)]])
    np.testing.assert_array_equal(found[1], found[0])


def test_tip_adapters_cache_is_written_and_read_back(store: ImageStore, tmp_path: Path) -> None:
    export(store, tmp_path / "caches", "tip-adapter", "float16")
    rows, labels = store.numpy(np.float16)
    shots = int(np.bincount(labels).max())
    keys, values = (torch.load(tmp_path / "caches" / f"{what}_{shots}shots.pt") for what in ("keys", "values"))
    assert (keys.shape, values.shape) == (rows.T.shape, (len(rows), len(CLASSES)))
    np.testing.assert_array_equal(keys.T, rows)
    found = read_foreign(tmp_path / "caches", "train")
    np.testing.assert_array_equal(found.features, rows)
    np.testing.assert_array_equal(found.labels, labels)


def test_tip_adapters_own_cache_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, labels, test = rng.normal(size=(6, 8)), np.array([0, 0, 1, 1, 2, 2]), rng.normal(size=(5, 8))
    for name, values in (
        *(("keys_2shots.pt", rows.T), ("values_2shots.pt", np.eye(3)[labels]), ("test_f.pt", test)),
        ("test_l.pt", np.arange(5) % 3),
    ):
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        torch.save(tensor.half() if tensor.is_floating_point() else tensor, tmp_path / name)
    found = read_foreign(tmp_path, "train")
    np.testing.assert_array_equal(found.features, rows.astype(np.float16))
    np.testing.assert_array_equal(found.labels, labels)
    assert found.classnames == ["class 0", "class 1", "class 2"]
    found = read_foreign(tmp_path, "test")
    np.testing.assert_array_equal(found.features, test.astype(np.float16))
    np.testing.assert_array_equal(found.labels, np.arange(5) % 3)
    torch.save(torch.zeros(6, 3), tmp_path / "values_2shots.pt")
    with pytest.raises(FeatcacheError, match="its values are not one-hot"):
        read_foreign(tmp_path, "train")
    (tmp_path / "keys_4shots.pt").touch()
    with pytest.raises(FeatcacheError, match="keys of 2shots, 4shots; choose one with --split"):
        read_foreign(tmp_path, "train")
