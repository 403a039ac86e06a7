"""Evaluation gives the same results for every place, reader and number of processes, in the memory of one block."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, ImageStore, encode_dataset
from featcache.cli.main import main
from featcache.processes import sum_over_ranks
from featcache.store import open_image_store
from heads import KNN, LinearHead, Ridge, evaluate, interpolate, judge, save
from heads.evaluation.passes import StorePass, jobs_for, rows_of_rank


def encoded(root: Any, n: int = 150, broken: tuple[int, ...] = ()) -> ImageStore:
    options = EncodeOptions(chunk_rows=16, batch_size=16, max_bad=len(broken))
    return encode_dataset(NumpyDataset(n, broken=broken), NumpyEncoder(), root=root, options=options).store


def heads_on(store: Any) -> list[Any]:
    """Three that share nothing, and a path; fitted on arrays, so that any store of this shape is theirs."""
    X, y = store.numpy()
    names = store.classnames
    rng = np.random.default_rng(0)
    random = LinearHead(5 * rng.normal(size=(3, store.dim)), rng.normal(size=3), names, name="random")
    ridge = Ridge().fit(X, y, classnames=names)
    return [ridge, KNN(n_neighbors=5).fit(X[:60], y[:60], classnames=names), *interpolate(random, ridge, [0.3, 1.2])]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("obstore")
    boto3 = pytest.importorskip("boto3")
    for key, value in (("ENDPOINT_URL", endpoint), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{key}", value)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="judged")
    return "s3://judged/cache"


def test_a_store_in_s3_is_evaluated_as_one_on_a_disk(bucket: str, tmp_path: Path, capsys: Any) -> None:
    local, remote = encoded(tmp_path / "cache", broken=(7,)), encoded(bucket, broken=(7,))
    heads = heads_on(local)
    here, there = (judge(heads, [store], per_sample=True, groups=["label"]) for store in (local, remote))
    assert there.rows == here.rows
    np.testing.assert_array_equal(there.samples["fake"].nll, here.samples["fake"].nll)
    save(Ridge().fit(local), tmp_path / "ridge.safetensors")
    results = ("--results", str(tmp_path / "results.jsonl"))
    assert (
        main(["evaluate", str(tmp_path / "ridge.safetensors"), "--on", "fake/train", "--root", bucket, *results]) == 0
    )
    assert "fake" in capsys.readouterr().out


@pytest.mark.parametrize("reader", ["mapped", "zarr"])
def test_every_reader_gives_the_same(tmp_path: Path, reader: str) -> None:
    store = encoded(tmp_path / "cache", broken=(0, 149))
    again = open_image_store(store.path, reader=reader)
    assert evaluate(heads_on(store), [again]) == evaluate(heads_on(store), [store])


@pytest.mark.parametrize("size", [2, 3, 200])
def test_processes_share_the_valid_rows_without_overlap(tmp_path: Path, size: int) -> None:
    store = encoded(tmp_path / "cache", broken=(0, 40, 41, 149))
    heads = heads_on(store)
    jobs = jobs_for([head.frozen() if hasattr(head, "frozen") else head for head in heads], store, None)
    shared = StorePass(jobs, store, None, per_sample=True, confusion=False)
    whole, seen = judge(heads, [store], per_sample=True), []
    for rank in range(size):
        _, places = rows_of_rank(store, rank, size)
        seen += np.flatnonzero(store.valid)[places].tolist()
        shared.run(rank, size)
    assert seen == np.flatnonzero(store.valid).tolist()
    assert shared.samples is not None
    np.testing.assert_array_equal(shared.samples.rank, whole.samples["fake"].rank)
    for found, wanted in zip(shared.results(), whole.rows, strict=True):
        assert found["top1"] == wanted["fake:top1"]
        assert found["nll"] == pytest.approx(wanted["fake:nll"], rel=1e-6)


def test_a_single_process_sums_nothing() -> None:
    sums = [np.arange(4), np.ones((2, 2))]
    sum_over_ranks(sums)
    assert sums[0].tolist() == [0, 1, 2, 3]


def test_logits_of_all_rows_are_never_in_memory_at_once(images: Any) -> None:
    """8,000 rows x 40 heads x 300 classes would be 384 MB; numpy's and the tallies' memory stays far below."""
    rng = np.random.default_rng(0)
    names = tuple(map(str, range(300)))
    store = images(n=8000)
    store.classnames, store.y = names, rng.integers(0, 300, 8000)
    ends = [LinearHead(rng.normal(size=(300, 12)), np.zeros(300), names) for _ in range(2)]
    path = interpolate(*ends, np.linspace(0, 1, 40))  # type: ignore[call-arg]
    store.block_rows = 8000
    evaluate(path[:2], [store])  # what is compiled or loaded once does not count
    tracemalloc.start()
    evaluate(path, [store])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48e6
