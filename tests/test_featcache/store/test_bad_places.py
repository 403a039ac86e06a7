"""Full and read-only disks, damaged records: clear errors, and nothing is lost."""

import contextlib
import ctypes
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder, projected
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import EncodeOptions, encode_dataset, list_stores, open_store
from featcache.cli.main import main
from featcache.errors import FeatcacheError, StoreWriteError
from featcache.store import ImageStore, Manifest, places, verify
from featcache.store.key import canonical_json, checksum
from featcache.store.layout import ArraySpec
from featcache.store.manifest import Marker, begun_chunk_rows, parse_manifest, read_header
from featcache.store.places import local as atomic

NAMES = {"features", "norm", "valid", "content"}


def encode(root: Path, n: int = 40, encoder: NumpyEncoder | None = None) -> ImageStore:
    options = EncodeOptions(chunk_rows=8, batch_size=3, workers=1)
    return encode_dataset(NumpyDataset(n), encoder or NumpyEncoder(), root=root, options=options).store


def whole(store: ImageStore, n: int = 40) -> bool:
    expected = projected(NumpyDataset(n), NumpyEncoder())
    return bool(np.abs(store.numpy()[0] - expected).max() <= 2.0**-11) and verify(store.path, deep=True).ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB in memory, if this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs; the same is tested by an injected ENOSPC")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_finished_chunks_are_kept(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(150_000))
    encoder = NumpyEncoder()
    with pytest.raises(StoreWriteError, match=r"cannot write .*No space left on device; nothing that was finished is"):
        encode(small_disk, encoder=encoder)
    done = len(list(small_disk.glob("images/*/*/done/*.json")))
    assert not list(small_disk.rglob("*.partial"))
    filler.unlink()
    before = encoder.images
    assert whole(encode(small_disk, encoder=encoder))
    assert encoder.images - before == 40 - 8 * done


@pytest.mark.parametrize("at", range(0, 45, 7))
def test_no_space_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    writes = []
    real = atomic._write

    def full(path: Path, content: Any, update: Any) -> None:
        writes.append(path)
        if len(writes) > at:
            path.write_bytes(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content, update)

    monkeypatch.setattr(atomic, "_write", full)
    with pytest.raises(StoreWriteError, match="No space left on device"):
        encode(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(atomic, "_write", real)
    encoder = NumpyEncoder()
    done = len(list(tmp_path.glob("images/*/*/done/*.json")))
    assert whole(encode(tmp_path, encoder=encoder))
    assert encoder.images == 40 - 8 * done


def test_a_read_only_disk_serves_hits_and_refuses_the_rest(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(small_disk, 8)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    encoder = NumpyEncoder()
    touched = NumpyDataset(8)
    touched.stamps[:] = 9  # looks changed: is read and hashed again, and the new times cannot be written down
    store = encode_dataset(touched, encoder, root=small_disk).store
    assert encoder.images == 0
    assert whole(store, 8)
    with pytest.raises(
        StoreWriteError, match=r"cannot write .*Read-only file system.*use another folder \(--root or --out\)"
    ):
        encode(small_disk, 9)
    monkeypatch.setattr("featcache.cli.arguments.load_encoder", lambda *_, **__: encoder)
    assert main(["encode", "digits", "--split", "val", "--quiet", "--root", str(small_disk)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("featcache: StoreWriteError: cannot write")
    assert "Traceback" not in said


def test_a_read_only_place_refuses_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store = encode(tmp_path)
    monkeypatch.setattr(atomic, "_put", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert encode(tmp_path).path == store.path
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        encode(tmp_path, 41)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def changed(record: Any, path: list[Any], value: Any) -> Any:
    """A copy of a JSON value with one value in it replaced."""
    if not path or not isinstance(record, dict | list):
        return value
    key = path[0]
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[key] = changed(record[key], path[1:], value)
    return copy


def places_of(record: Any) -> list[list[Any]]:
    """The path of every value in a JSON value."""
    keys = record.keys() if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else ()
    return [[], *([key, *rest] for key in keys for rest in places_of(record[key]))]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = Path(encode(tmp_path_factory.mktemp("whole"), 11).path)
    return path, json.loads((path / "manifest.json").read_bytes())


def parsed_or_refused(content: bytes, store: Path) -> Manifest | None:
    try:
        return parse_manifest(content, store)
    except FeatcacheError:
        return None


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_parsers_refuse_any_bytes(content: bytes) -> None:
    assert parsed_or_refused(content, Path("store")) is None
    assert Marker.from_bytes(content, 0, NAMES, range(8)) is None


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    assert parsed_or_refused(deep, tmp_path) is None
    assert Marker.from_bytes(deep, 0, NAMES, range(8)) is None
    (tmp_path / "zarr.json").write_bytes(deep)
    assert read_header(tmp_path) is None
    with pytest.raises(FeatcacheError, match="holds no featcache store"):
        open_store(tmp_path)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), value=JSON)
def test_a_manifest_changed_anywhere_is_refused_or_describes_an_array(
    manifest: tuple[Path, dict[str, Any]], data: st.DataObject, value: Any
) -> None:
    """Even with a matching digest: an accepted manifest has whole arrays, enough checksums, and rows in range."""
    path, record = manifest
    rest = {name: part for name, part in record.items() if name != "digest"}
    edited = changed(rest, data.draw(st.sampled_from(places_of(rest))), value)
    try:
        digest = checksum(canonical_json(edited))
    except (ValueError, UnicodeEncodeError):
        digest = ""
    content = json.dumps(edited | {"digest": digest} if isinstance(edited, dict) else edited).encode()
    found = parsed_or_refused(content, path)
    if found is None:
        return
    for name, spec in found.all_arrays.items():
        assert spec.chunk_nbytes > 0
        assert len(found.checksums[name]) == spec.n_chunks
    assert all(0 <= row < 11 for row, _, _ in found.info["bad"])
    try:
        ImageStore(path, found).numpy()
    except FeatcacheError:
        return  # sizes no longer fit the files


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=JSON)
def test_a_changed_marker_is_refused_or_still_of_its_chunk(data: st.DataObject, value: Any) -> None:
    marker = Marker(1, 3, dict.fromkeys(NAMES, "0" * 32), ())
    record = json.loads(marker.to_bytes()) | {"bad": [[9, "a", "truncated"]]}
    edited = changed(record, data.draw(st.sampled_from(places_of(record))), value)
    found = Marker.from_bytes(json.dumps(edited).encode(), 1, NAMES, range(8, 11))
    if found is not None:
        assert (found.chunk, found.rows, set(found.checksums)) == (1, 3, NAMES)
        assert all(type(bad.row) is int and 8 <= bad.row < 11 for bad in found.bad)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=JSON)
def test_a_header_changed_anywhere_is_refused_or_listed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    path = tmp_path_factory.mktemp("root") / "images" / "a" / "b"
    path.mkdir(parents=True)
    header = {"schema": 1, "kind": "images", "key": "a/b", "identity": {}, "rows": 9, "chunk_rows": 4, "verb": "encode"}
    record = {"attributes": {"featcache": header}, "zarr_format": 3}
    edited = changed(record, data.draw(st.sampled_from(places_of(record))), value)
    (path / "zarr.json").write_text(json.dumps(edited))
    assert len(list_stores(path.parents[2])) <= 1
    with contextlib.suppress(FeatcacheError):
        assert begun_chunk_rows(path, 7) > 0
    with pytest.raises(FeatcacheError):
        open_store(path)


@settings(max_examples=200, deadline=None)
@given(spec=st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "chunk_rows": JSON, "fill": JSON}))
def test_array_specs_are_valid_or_refused(spec: dict[str, Any]) -> None:
    try:
        found = ArraySpec.from_json("features", spec)
    except (ValueError, TypeError):
        return
    assert found.n_chunks >= 1
    assert np.dtype(found.dtype).itemsize


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another number of rows": lambda record: record["arrays"]["features"].update(shape=[12, 16]),
    "a checksum too few": lambda record: record["checksums"]["norm"].pop(),
    "an array without checksums": lambda record: record["checksums"].pop("valid"),
    "a name that climbs": lambda record: record["arrays"].update({"../../x": record["arrays"]["norm"]}),
    "a sidecar that climbs": lambda record: record["files"].update({"../../x": "0"}),
    "a bad row too far": lambda record: record["info"].update(bad=[[11, "a", "b"]]),
    "no class names": lambda record: record["info"].pop("classnames"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_inconsistent_manifests_are_refused(manifest: tuple[Path, dict[str, Any]], edit: str) -> None:
    path, record = manifest
    copy = json.loads(json.dumps({name: part for name, part in record.items() if name != "digest"}))
    EDITS[edit](copy)
    copy["digest"] = checksum(canonical_json(copy))
    with pytest.raises(FeatcacheError, match=r"manifest\.json: cannot be parsed .* run the same encode command again"):
        parse_manifest(json.dumps(copy).encode(), path)


def test_s3_asks_the_metadata_service_only_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.store.places.s3 import CREDENTIALS, check_credentials

    for name in (*CREDENTIALS, "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for value in ("", "true"):
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", value)
        with pytest.raises(FeatcacheError, match="s3://features: no credentials; set AWS_ACCESS_KEY_ID"):
            check_credentials("s3://features")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    check_credentials("s3://features")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    check_credentials("s3://features")


@pytest.mark.parametrize(("number", "written"), [(errno.ENOSPC, False), (errno.EOPNOTSUPP, True)])
def test_space_for_a_large_file_is_reserved_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, written: bool
) -> None:
    def refuses(*_: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(atomic, "_of_libc", lambda name: refuses)
    content = bytes(atomic.LARGE)
    if written:  # a file system that reserves nothing
        places.put(tmp_path / "large", content)
        assert (tmp_path / "large").read_bytes() == content
    else:
        with pytest.raises(StoreWriteError, match=r"cannot write .*large: No space left on device"):
            places.put(tmp_path / "large", content)
        assert list(tmp_path.iterdir()) == []
    places.put(tmp_path / "small", b"small")
    assert (tmp_path / "small").read_bytes() == b"small"
