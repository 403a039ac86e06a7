"""Every reader checks a chunk before it returns rows from it, and only once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import TAP, NumpyDataset, NumpyEncoder, TappedEncoder

from featcache import EncodeOptions, encode_dataset, open_store
from featcache.cli.main import main
from featcache.encoding.texts import embed_prompts
from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store import ImageStore
from featcache.store.reading import checks
from featcache.store.reading.readers import MappedReader


def encoded(root: Path, *taps: str) -> Path:
    options = EncodeOptions(chunk_rows=8, batch_size=3, taps=taps)
    return Path(str(encode_dataset(NumpyDataset(), TappedEncoder(), root=root, options=options).store.path))


def images(path: Path, **how: str) -> ImageStore:
    store = open_store(path, **how)
    assert isinstance(store, ImageStore)
    return store


def flip(file: Path, place: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


READS: dict[str, tuple[str, Callable[[ImageStore], object]]] = {
    "numpy": ("features/c/2/0", lambda store: store.numpy()),
    "blocks": ("features/c/2/0", lambda store: list(store.blocks(5))),
    "gather": ("features/c/2/0", lambda store: store.gather(np.array([16]))),
    "labels": ("labels/c/0", lambda store: store.labels),
    "valid": ("valid/c/4", lambda store: store.valid),
    "norm": ("norm/c/1", lambda store: store.array("norm")),
    "ids": ("samples.parquet", lambda store: store.ids),
    "tap": (f"tap-{TAP}/features/c/3/0", lambda store: store.tap(TAP).numpy()),
}


@pytest.mark.parametrize("reader", ["mapped", "zarr"])
@pytest.mark.parametrize("door", READS)
def test_every_reader_finds_a_flipped_bit(tmp_path: Path, door: str, reader: str) -> None:
    path = encoded(tmp_path, TAP)
    name, read = READS[door]
    read(images(path, reader=reader))
    flip(path / name)
    with pytest.raises(StoreCorruptError, match=rf"{name}: .*verify {path}.* --deep --repair"):
        read(images(path, reader=reader))


def test_rows_of_other_chunks_are_read_and_never_trusts_the_disk(tmp_path: Path) -> None:
    path = encoded(tmp_path)
    before = images(path).gather(np.arange(40))
    flip(path / "features/c/2/0")
    sound = np.r_[0:16, 24:40]
    np.testing.assert_array_equal(images(path).gather(sound), before[sound])
    trusted = images(path, verify="never").gather(np.arange(40))
    assert not np.array_equal(trusted, before)
    np.testing.assert_array_equal(trusted[sound], before[sound])
    with pytest.raises(FeatcacheError, match="verify='sometimes': expected one of 'read', 'never'"):
        open_store(path, verify="sometimes")


def test_a_chunk_is_hashed_once_in_a_process_unless_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = encoded(tmp_path), checks.checksum
    hashed: list[int] = []

    def checksum(content: bytes) -> str:
        hashed.append(len(content))
        return real(content)

    monkeypatch.setattr(checks, "checksum", checksum)
    images(path).gather(np.array([0, 1, 17]))
    assert len(hashed) == 2  # chunks 0 and 2
    images(path).gather(np.array([2, 18]))
    images(path).reader("features").read(0, 8)
    assert len(hashed) == 2
    images(path).gather(np.arange(40))
    assert len(hashed) == 5
    content = (path / "features/c/2/0").read_bytes()
    (path / "features/c/2/0").write_bytes(content)  # the same bytes, another time
    images(path).gather(np.arange(40))
    assert len(hashed) == 6


def test_maps_of_single_files_are_checked_like_one_whole_map(tmp_path: Path) -> None:
    path = encoded(tmp_path)
    manifest = images(path).manifest
    flip(path / "features/c/4/0")
    reader = MappedReader(path, manifest.arrays["features"], manifest.checksums["features"])
    reader.read(0, 32)
    with pytest.raises(StoreCorruptError, match="features/c/4/0"):
        reader.read(30, 33)


def test_a_changed_zarr_json_is_not_accepted_as_an_array(tmp_path: Path) -> None:
    path = encoded(tmp_path)
    metadata = path / "labels" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("40", "32", 1))
    with pytest.raises(StoreCorruptError, match=r"labels/zarr\.json: does not describe the array of the manifest"):
        _ = images(path, reader="zarr").labels
    assert len(images(path).labels) == 40  # read without it


def test_text_stores_are_checked(tmp_path: Path) -> None:
    store = embed_prompts(["ant", "bee"], ["a {}", "the {}"], NumpyEncoder(), root=tmp_path).store
    path = Path(str(store.path))
    for name in ("raw/c/0/0/0", "cls/c/0/0", "counts/c/0", "ctx/c/0/0"):
        flip(path / name)
        with pytest.raises(StoreCorruptError, match=name):
            _ = getattr(open_store(path), name.partition("/")[0])
        flip(path / name)
        _ = getattr(open_store(path), name.partition("/")[0])


def test_info_refuses_damaged_ids_which_evaluation_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`info` speaks for the whole store; a reader answers for what it hands out."""
    path = encoded(tmp_path)
    rows = images(path).numpy()[0]
    assert main(["info", str(path)]) == 0
    (path / "samples.parquet").write_bytes((path / "samples.parquet").read_bytes()[:100])
    assert main(["info", str(path)]) == main(["export", str(path), str(tmp_path / "rows.csv")]) == 4
    assert capsys.readouterr().err.count("samples.parquet: differs from its checksum; run `featcache verify") == 2
    np.testing.assert_array_equal(images(path).numpy()[0], rows)
