"""Packed stores: reproducible bytes, written whole or not at all, and never unpacked outside the root."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, ImageStore, encode_dataset, list_stores, open_store
from featcache.cli.main import main
from featcache.errors import DatasetError, FeatcacheError, MismatchError, StoreCorruptError, StoreIncompleteError
from featcache.store import verify
from featcache.transfer.archive import pack, unpack


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    options = EncodeOptions(chunk_rows=16)
    return encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path / "cache", options=options).store


def entries(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        extract: Any = tar.extractfile
        return {entry.name: extract(entry).read() for entry in tar}


def written(file: Path, content: dict[str, bytes], odd: tarfile.TarInfo | None = None) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if odd is not None:
            tar.addfile(odd)
    return file


def test_a_packed_store_is_the_store(store: ImageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, place = str(tmp_path / "cache"), str(tmp_path / "other")
    assert main(["pack", store.reference, str(tmp_path / "a.tar"), "--root", root]) == 0
    pack(store.path, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert main(["unpack", str(tmp_path / "a.tar"), "--root", place]) == 0
    (found,) = list_stores(place)
    other = open_store(found.path)
    assert isinstance(other, ImageStore)
    assert verify(other.path, deep=True).ok
    np.testing.assert_array_equal(other.numpy(np.float16)[0], store.numpy(np.float16)[0])
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["images"]
    pack(other.path, tmp_path / "c.tar")
    assert (tmp_path / "c.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
    capsys.readouterr()
    assert main(["unpack", str(tmp_path / "a.tar"), "--root", place]) == 0
    assert "already exists" in capsys.readouterr().out


def test_damage_is_found_before_anything_is_written(store: ImageStore, tmp_path: Path) -> None:
    pack(store.path, tmp_path / "a.tar")
    content = entries(tmp_path / "a.tar")
    chunk = next(name for name in content if "/features/c/" in name)
    content[chunk] = bytes([content[chunk][0] ^ 1]) + content[chunk][1:]
    with pytest.raises(StoreCorruptError):
        unpack(written(tmp_path / "flipped.tar", content), tmp_path / "other")
    whole = (tmp_path / "a.tar").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(FeatcacheError):
            unpack(tmp_path / "cut.tar", tmp_path / "other")
    assert list_stores(tmp_path / "other") == []
    assert not list((tmp_path / "other").rglob("*"))


@pytest.mark.parametrize("name", ["../evil", "/evil", "images/../../evil", "images//a/b/c", "images/./a/b", "a\\b"])
def test_names_outside_the_store_are_refused(store: ImageStore, tmp_path: Path, name: str) -> None:
    pack(store.path, tmp_path / "a.tar")
    file = written(tmp_path / "evil.tar", {**entries(tmp_path / "a.tar"), name: b"x"})
    with pytest.raises(DatasetError):
        unpack(file, tmp_path / "deep" / "other")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_refused(store: ImageStore, tmp_path: Path, kind: bytes) -> None:
    pack(store.path, tmp_path / "a.tar")
    content = entries(tmp_path / "a.tar")
    odd = tarfile.TarInfo(f"{'/'.join(next(iter(content)).split('/')[:3])}/odd")
    odd.type, odd.linkname = kind, "/etc/passwd"
    with pytest.raises(DatasetError, match="not a plain file of a store"):
        unpack(written(tmp_path / "odd.tar", content, odd), tmp_path / "other")


def test_archives_of_no_store_or_of_several_are_refused(store: ImageStore, tmp_path: Path) -> None:
    pack(store.path, tmp_path / "a.tar")
    content = entries(tmp_path / "a.tar")
    kind, encoder, dataset, _ = next(iter(content)).split("/", 3)
    moved = [f"{kind}/{encoder}/{'0' * len(dataset)}", f"{kind}/{encoder}/notes", f"pictures/{encoder}/{dataset}"]
    several = {**content, f"{moved[0]}/manifest.json": b"{}"}
    others = [
        {name.replace(f"{kind}/{encoder}/{dataset}", place): x for name, x in content.items()} for place in moved[1:]
    ]
    for wrong in ({}, several, *others, {f"{kind}/{encoder}/{dataset}": b"x"}):
        with pytest.raises(DatasetError, match="no store, or several"):
            unpack(written(tmp_path / "wrong.tar", wrong), tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*"))


def test_errors_name_the_packed_file_not_the_temporary_folder(store: ImageStore, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    pack(store.path, packed)
    content = packed.read_bytes()
    with tarfile.open(packed) as tar:
        places = {entry.name.split("/", 3)[3]: entry.offset_data for entry in tar}
    for name in ("manifest.json", "features/c/0/0"):
        odd = bytearray(content)
        odd[places[name] + 5] ^= 1
        packed.write_bytes(odd)
        with pytest.raises(StoreCorruptError, match=f"packed.tar.*{name}.*; pack the store again") as error:
            unpack(packed, tmp_path / "root")
        assert ".partial" not in str(error.value)


def test_a_header_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        entry = tarfile.TarInfo("x")
        entry.type, entry.size = kind, 1 << 50
        (tmp_path / "packed.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(DatasetError, match="packed store"):
            unpack(tmp_path / "packed.tar", tmp_path / "root")


def test_a_store_that_changes_while_it_is_packed_is_not_packed(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, changed = tarfile.TarFile.addfile, NumpyDataset()
    changed.pixels[:] += 1
    changed.stamps[:] += 1

    def adding(self: tarfile.TarFile, entry: tarfile.TarInfo, content: Any = None) -> None:
        add(self, entry, content)
        if entry.name.endswith("features/c/0/0"):
            options = EncodeOptions(chunk_rows=16, refresh=True)
            encode_dataset(changed, NumpyEncoder(), root=tmp_path / "cache", options=options)

    monkeypatch.setattr(tarfile.TarFile, "addfile", adding)
    (tmp_path / "a.tar").write_bytes(b"an earlier one")
    with pytest.raises(StoreIncompleteError, match="while it was packed; pack the store again"):
        pack(store.path, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == b"an earlier one"
    pack(store.path, tmp_path / "a.tar")
    unpack(tmp_path / "a.tar", tmp_path / "other")


def test_another_store_with_the_same_key_is_never_overwritten(store: ImageStore, tmp_path: Path) -> None:
    pack(store.path, tmp_path / "a.tar")
    assert main(["rename", store.reference, "mine/train", "--root", str(tmp_path / "cache")]) == 0
    with pytest.raises(MismatchError, match="nothing was written"):
        unpack(tmp_path / "a.tar", tmp_path / "cache")
    (entry,) = list_stores(tmp_path / "cache")
    assert entry.name == "mine"
