"""Ways to search for neighbours: faiss's indexes, its GPUs, how far it looks, and DINO's vote by default."""

from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import HeadError
from heads import KNN
from heads.search import INDEXES, PROBED, ExactIndex, FaissIndex


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def recall(found: Any, wanted: Any) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


class Copy:
    """What faiss gives of an index on GPUs; it counts what it is asked."""

    def __init__(self, index: Any) -> None:
        self.index, self.searches = index, 0

    def search(self, X: Any, k: int) -> Any:
        self.searches += 1
        return self.index.search(X, k)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Copy]:
    """faiss with two GPUs, and the indexes that are brought there."""
    faiss = pytest.importorskip("faiss")
    made: list[Copy] = []

    def copied(index: Any) -> Copy:
        made.append(Copy(index))
        return made[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copied)
    return made


def test_the_defaults_are_those_of_dino(draw: Any) -> None:
    """Neighbours by cosine vote for their class with exp(cosine / 0.07), for k = 10, 20, 100 and 200."""
    assert KNN().get_params() == {
        "n_neighbors": (10, 20, 100, 200), "temperature": 0.07, "index": "exact", "probes": None, "calibrate": True,
        "metric": "nll",
    }  # fmt: skip
    X, y = draw(400, 16, 5)
    X, test = X[:320].astype(np.float64), X[320:].astype(np.float64)
    y = y[:320]
    head = KNN(calibrate=False, metric="top1").fit(X, y)  # the votes as they are
    assert list(head.accuracies_) == [member.n_neighbors for member in head.path_heads()] == [10, 20, 100, 200]
    cosines = unit(test) @ unit(X).T
    for member in head.path_heads():
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : member.n_neighbors]
        votes = np.zeros((len(test), 5))
        for row, columns in enumerate(nearest):
            for column in columns:
                votes[row, y[column]] += np.exp(cosines[row, column] / 0.07)
        np.testing.assert_allclose(member.predict_proba(test), votes / votes.sum(axis=1, keepdims=True), atol=1e-5)
        np.testing.assert_array_equal(member.predict(test), votes.argmax(axis=1))


@pytest.mark.parametrize("index", PROBED)
def test_more_probes_find_more(draw: Any, index: str) -> None:
    pytest.importorskip("faiss")
    X, _ = draw(2000, 24, 5)
    wanted = ExactIndex(X, cosine=True).search(X[:200], 5)
    found = [INDEXES[index](X, cosine=True, probes=probes).search(X[:200], 5) for probes in (1, 400)]
    assert recall(found[0][1], wanted[1]) < recall(found[1][1], wanted[1])
    assert recall(found[1][1], wanted[1]) > 0.98
    np.testing.assert_allclose(found[1][0][:, 0], wanted[0][:, 0], atol=1e-3)
    assert (np.diff(found[1][0], axis=1) <= 0).all()


def test_probes_reach_the_index_and_its_file(draw: Any, tmp_path: Any) -> None:
    pytest.importorskip("faiss")
    X, y = draw(600, 24, 5)
    head = KNN([5, 20], index="faiss-ivf", probes=24).fit(X, y)
    assert head.head_.bank._search._index.nprobe == 24
    assert head.provenance_["params"]["probes"] == 24
    loaded: Any = heads.load(head.save(tmp_path / "knn.safetensors"))
    assert loaded.bank._search._index.nprobe == 24
    np.testing.assert_array_equal(loaded.logits(X[:50]), head.frozen().logits(X[:50]))
    assert KNN(5, index="faiss-ivf").fit(X, y).head_.bank._search._index.nprobe == 16
    graph = KNN([5, 20], index="faiss-hnsw", probes=80).fit(X, y)
    assert graph.head_.bank._search._index.hnsw.efSearch == 80
    assert graph.score(X, y) == pytest.approx(KNN([5, 20]).fit(X, y).score(X, y), abs=0.02)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"probes": 4}, "faiss-ivf or faiss-hnsw"),
        ({"index": "faiss-flat", "probes": 4}, "faiss-ivf or faiss-hnsw"),
        ({"index": "faiss-hnsw", "probes": 0}, "probes is 0, expected a whole number from 1"),
    ],
)
def test_probes_of_an_index_that_looks_at_some_rows_only(images: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        KNN(**params).fit(images())


@pytest.mark.parametrize(("index", "there"), [("faiss-flat", 1), ("faiss-ivf", 1), ("faiss-hnsw", 0)])
def test_faiss_searches_on_the_gpus_that_it_has(draw: Any, copies: list[Copy], index: str, there: int) -> None:
    X, y = draw(600, 24, 5)
    head = KNN([5, 20], index=index).fit(X, y)
    assert len(copies) == there
    assert head.provenance_["searched_on"] == ("2 GPUs" if there else "cpu")
    before = sum(copy.searches for copy in copies)
    found = head.predict_proba(X)
    assert sum(copy.searches for copy in copies) == before + there
    assert (found.argmax(axis=1) == KNN([5, 20]).fit(X, y).predict(X)).mean() > 0.97


def test_searches_too_deep_for_a_gpu_run_on_the_cpu(
    draw: Any, copies: list[Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heads.search.faiss_index._GPU_DEPTH", 10)
    X, _ = draw(300, 24, 5)
    index = FaissIndex.flat(X, cosine=True)
    wanted = ExactIndex(X, cosine=True).search(X, 11)
    np.testing.assert_allclose(index.search(X, 11)[0], wanted[0], atol=1e-5)
    assert (index.device, copies[0].searches) == ("2 GPUs", 0)
    index.search(X, 10)
    assert copies[0].searches == 1
    assert FaissIndex.ivf(X, probes=11).device == "cpu"
    assert len(copies) == 1


def test_faiss_without_gpus_stays_on_the_cpu(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    X, y = draw(100, 8, 3)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert KNN(3, index="faiss-flat").fit(X, y).provenance_["searched_on"] == "cpu"
    monkeypatch.delattr(faiss, "get_num_gpus")  # builds for the CPU may lack it
    assert FaissIndex.ivf(X).device == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_search_runs_on_the_device_of_the_rows(draw: Any, dtype: torch.dtype) -> None:
    X, _ = draw(300, 24, 5)
    rows = torch.from_numpy(X).to(dtype)
    index = ExactIndex(rows, cosine=True)
    assert index.device == "cpu"
    assert index._rows.data_ptr() == rows.data_ptr()
    wide = rows.to(torch.float64).numpy()
    wanted = ExactIndex(wide, cosine=True).search(wide[:20], 7)
    for queries in (rows[:20], wide[:20]):
        similarities, _ = index.search(queries, 7)
        np.testing.assert_allclose(similarities, wanted[0], atol=1e-5)
        assert similarities.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    for bad in (rows[0], rows.to(torch.int64), rows[:0]):
        with pytest.raises(HeadError, match=r"expected floating \(N, D\)"):
            ExactIndex(bad)
    with pytest.raises(HeadError, match=r"expected \(n, 24\)"):
        index.search(rows[:, :3], 2)
