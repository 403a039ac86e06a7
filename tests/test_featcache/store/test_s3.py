"""Stores in an object store: protocol, readers and maintenance as on a disk, tested with a local S3 server."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import TAP, NumpyDataset, NumpyEncoder, TappedEncoder, projected

from featcache import EncodeOptions, encode_dataset, find_store, list_stores, open_store
from featcache.cli.main import main
from featcache.encoding.texts import embed_prompts
from featcache.errors import (
    FeatcacheError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreWriteError,
)
from featcache.store import ImageStore, TextStore, repair, resolve_root, verify
from featcache.store.places import create, files, put, read_or_none, remove, stat
from featcache.store.places.s3 import ObjectPath

obstore = pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def root(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ObjectPath:
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for key in KEYS:
        monkeypatch.setenv(key, "test")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="features")
    found = resolve_root(f"s3://features/{request.node.name[:40]}")
    assert isinstance(found, ObjectPath)
    return found


class Shared(NumpyDataset):
    """Names its decoding, so that rows may be copied."""

    decoding = "4x4"


def encode(root: object, dataset: NumpyDataset, encoder: NumpyEncoder | None = None, **options: object) -> ImageStore:
    chosen = {"chunk_rows": 8, "batch_size": 3} | options
    return encode_dataset(dataset, encoder or NumpyEncoder(), root=root, options=EncodeOptions(**chosen)).store


def test_objects_are_written_read_and_removed(root: ObjectPath) -> None:
    path = root / "a" / "b.json"
    assert (read_or_none(path), stat(path)) == (None, None)
    assert create(path, b"one")
    assert not create(path, b"two")
    assert path.read_bytes() == b"one"
    put(path, b"three")
    file = stat(path)
    assert file is not None
    assert (path.read_bytes(), file.nbytes) == (b"three", 5)
    put(root / "a" / "c" / "d", b"")
    assert {name: file.nbytes for name, file in files(root / "a").items()} == {"b.json": 5, "c/d": 0}
    remove(path)
    remove(path)
    with pytest.raises(FileNotFoundError, match=r"s3://features/.*b\.json"):
        path.read_bytes()


def test_a_prefix_does_not_list_its_neighbours(root: ObjectPath) -> None:
    put(root / "ab" / "x", b"1")
    put(root / "abc" / "y", b"1")
    assert list(files(root / "ab")) == ["x"]


def test_only_one_of_many_writers_creates_a_file(root: ObjectPath) -> None:
    wins: list[bool] = []
    threads = [threading.Thread(target=lambda: wins.append(create(root / "claim", b"mine"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]


def test_a_store_on_s3_equals_a_local_one(root: ObjectPath, tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[3]), NumpyEncoder()
    there, here = (encode(place, dataset, encoder, max_bad=1) for place in (root, tmp_path))
    assert str(there.path) == f"{root}/images/{here.manifest.key}"
    names = {name for name in files(here.path) if name != "provenance.json"}
    assert names == set(files(there.path)) - {"provenance.json"}
    assert all((there.path / name).read_bytes() == (here.path / name).read_bytes() for name in names)
    assert there.ids == here.ids


@pytest.mark.parametrize("reader", ["mapped", "zarr"])
def test_rows_are_read_by_range_and_through_zarr(root: ObjectPath, reader: str) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    encode(root, dataset, encoder)
    store = find_store("fake/train", root)
    store = open_store(str(store.path), reader=reader)
    assert isinstance(store, ImageStore)
    features, labels = store.numpy()
    assert np.abs(features - projected(dataset, encoder)).max() <= 2.0**-11
    assert labels.tolist() == dataset.labels.tolist()
    rows = np.array([39, 0, 8, 7, 39, 9, 10])
    np.testing.assert_array_equal(store.gather(rows), features[rows].astype(np.float16))
    assert store.gather(rows[:0]).shape == (0, 16)
    np.testing.assert_array_equal(np.concatenate([x.copy() for x, _ in store.blocks(7)]), features)


def test_a_second_run_is_a_hit_and_an_interrupted_one_resumes(root: ObjectPath) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(root, dataset, encoder)
    before = {name: (store.path / name).read_bytes() for name in files(store.path)}
    assert encode_dataset(dataset, encoder, root=root).hit
    for name in ("manifest.json", "done/000002.json"):
        remove(store.path / name)
    with pytest.raises(StoreIncompleteError, match="32 of 40 rows"):
        open_store(store.path)
    encode(root, dataset, encoder)
    assert encoder.images == 48
    after = {name: (store.path / name).read_bytes() for name in files(store.path)}
    assert {name for name in before if before[name] != after.get(name)} <= {"provenance.json"}


def test_damage_is_found_and_repaired(root: ObjectPath) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(root, dataset, encoder)
    chunk = store.path / "features/c/1/0"
    put(chunk, bytes(len(chunk.read_bytes())))
    assert verify(store.path).ok
    report = verify(store.path, deep=True)
    assert [problem.split(": ")[1] for problem in report.problems] == ["checksum differs"]
    repair(report)
    assert verify(encode(root, dataset, encoder).path, deep=True).ok
    remove(chunk)
    with pytest.raises(StoreCorruptError, match="chunk file is missing"):
        store.gather(np.array([9]))
    with pytest.raises(StoreCorruptError, match="chunk file is missing"):
        open_store(store.path)


def test_a_store_on_s3_is_found_under_every_name_of_its_encoder(root: ObjectPath) -> None:
    store, again = encode(root, NumpyDataset(), NumpyEncoder()), NumpyEncoder()
    again.name = "alpha=1.000/é"
    encode(root, NumpyDataset(), again)
    assert again.images == 0
    assert find_store("fake/train@alpha=1.000/é", root).path == store.path
    assert [entry.other_models for entry in list_stores(root)] == [("alpha=1.000/é",)]


def test_texts_listing_info_and_collection_of_garbage(root: ObjectPath, capsys: pytest.CaptureFixture[str]) -> None:
    encode(root, NumpyDataset())
    embed_prompts(["ant", "bee"], ["a {}"], NumpyEncoder(), name="animals", root=root)
    assert isinstance(find_store("texts/animals", root), TextStore)
    assert [entry.reference for entry in list_stores(root)] == ["fake/train@numpy", "texts/animals@numpy"]
    assert main(["info", "fake/train", "--root", str(root)]) == 0
    assert str(root) in capsys.readouterr().out
    assert main(["verify", "fake/train", "--deep", "--root", str(root)]) == 0
    put(root / "images" / ("0" * 24) / ("1" * 24) / "features/c/0/0", b"orphan")
    assert main(["gc", "--older-than", "0s", "--delete", "--root", str(root)]) == 0
    assert {entry.reference for entry in list_stores(root)} == {"fake/train@numpy", "texts/animals@numpy"}
    assert not files(root / "images" / ("0" * 24))


def test_missing_stores_and_buckets_are_reported(root: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreNotFoundError, match=r"s3://features/.*: no store there"):
        open_store(root / "nothing")
    with pytest.raises(FeatcacheError, match="expected s3://BUCKET"):
        resolve_root("s3://")
    with pytest.raises(StoreWriteError, match=r"cannot write s3://no-such-bucket/a/.*AWS_ENDPOINT_URL"):
        encode("s3://no-such-bucket/a", NumpyDataset())
    assert os.environ["AWS_ENDPOINT_URL"]


def test_a_tap_is_added_and_copied_on_s3(root: ObjectPath) -> None:
    encoder = TappedEncoder()
    store = encode(root, Shared(20), encoder)
    again = encode(root, Shared(20), encoder, taps=[TAP])
    assert encoder.images == 40  # one pass more, for the tap
    assert again.tap(TAP).numpy()[0].shape == (20, 24)
    assert again.array("features").tobytes() == store.array("features").tobytes()
    assert verify(store.path, deep=True).ok
    grown = encode(root, Shared(22), encoder, taps=[TAP])
    assert encoder.images == 42
    assert grown.tap(TAP).gather(np.arange(20)).tobytes() == again.tap(TAP).array("features").tobytes()
    found = find_store(f"{grown.path}#{TAP}", root)
    assert found.dim == 24
