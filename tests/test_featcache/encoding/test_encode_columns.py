"""Metadata columns in stores; collections and shards with the encode command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset, list_stores
from featcache.cli.main import main
from featcache.datasets import SampleIndex
from featcache.datasets.base import whole_dataset
from featcache.errors import LabelsChangedError
from featcache.store import ImageStore, open_image_store, verify
from featcache.store.places import stat


class WithColumns(NumpyDataset):
    """A data set with a string and an integer column."""

    def __init__(self, n: int = 40, name: str = "fake", **columns: list[object]) -> None:
        super().__init__(n, broken=[3])
        self.name, self.columns = name, columns

    @property
    def index(self) -> SampleIndex:
        return replace(super().index, metadata=self.columns)


REGIONS = ["Asia", "", "São Paulo", "Asia"] * 10
YEARS = list(range(2000, 2040))


def encode(root: Path, dataset: NumpyDataset, encoder: NumpyEncoder | None = None, **options: object) -> ImageStore:
    chosen = {"chunk_rows": 8, "max_bad": 1} | options
    return encode_dataset(dataset, encoder or NumpyEncoder(), root=root, options=EncodeOptions(**chosen)).store


def test_columns_come_back_with_every_row(tmp_path: Path) -> None:
    store = encode(tmp_path, WithColumns(region=REGIONS, year=YEARS))
    assert store.metadata["region"].tolist() == REGIONS
    assert store.metadata["year"].tolist() == YEARS
    assert store.metadata["year"].dtype == np.int64
    assert len(store.metadata["year"][store.valid]) == len(store.numpy()[0]) == 39
    assert verify(store.path, deep=True).ok
    assert encode(tmp_path / "other", NumpyDataset()).metadata == {}


def test_changed_columns_are_noticed_and_updated_without_encoding(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    encode(tmp_path, WithColumns(region=REGIONS), encoder)
    with pytest.raises(LabelsChangedError, match=r"metadata columns differ .*'region'.*--update-labels"):
        encode(tmp_path, WithColumns(region=REGIONS[::-1]), encoder)
    with pytest.raises(
        LabelsChangedError,
        match=r"fake/train@numpy holds .*--update-labels to replace its labels, class names and columns region, year "
        r"by those of fake/train .*or encode them under another --name to keep both",
    ):
        encode(tmp_path, WithColumns(region=REGIONS[::-1], year=YEARS), encoder)
    images = encoder.images
    store = encode(tmp_path, WithColumns(region=REGIONS[::-1], year=YEARS), encoder, update_labels=True)
    assert encoder.images == images
    assert sorted(store.metadata) == ["region", "year"]
    assert store.metadata["region"].tolist() == REGIONS[::-1]
    assert verify(store.path, deep=True).ok
    plain = encode(tmp_path, WithColumns(), encoder, update_labels=True)
    assert (plain.path, plain.metadata) == (store.path, {})
    assert stat(plain.path / "metadata.parquet") is None
    assert verify(plain.path, deep=True).ok


def test_other_columns_under_another_name_have_their_own_store(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    first = encode(tmp_path, WithColumns(region=REGIONS), encoder)
    second = encode(tmp_path, WithColumns(name="wild", year=YEARS), encoder)
    assert (second.path == first.path, sorted(second.metadata)) == (False, ["year"])
    assert open_image_store(first.path).metadata["region"].tolist() == REGIONS
    assert encode(tmp_path, WithColumns(name="wild", year=YEARS), encoder).path == second.path
    first = encode(tmp_path, WithColumns(name="other", year=YEARS), encoder, update_labels=True)
    assert sorted(first.metadata) == ["year"]


def test_a_damaged_column_file_is_found(tmp_path: Path) -> None:
    store = encode(tmp_path, WithColumns(region=REGIONS))
    file = Path(store.path) / "metadata.parquet"
    file.write_bytes(file.read_bytes()[::-1])
    assert [problem.split(": ")[1] for problem in verify(store.path, deep=True).problems] == ["checksum differs"]


def test_a_store_of_the_first_version_has_no_columns(tmp_path: Path) -> None:
    store = encode(tmp_path, NumpyDataset(), max_bad=0)
    manifest = Path(store.path) / "manifest.json"
    digest = store.metadata_digest
    del store.info["metadata_digest"]  # as the first version wrote it
    manifest.write_bytes(store.manifest.to_bytes())
    old = open_image_store(store.path)
    assert "metadata_digest" not in old.info
    assert (old.metadata, old.metadata_digest) == ({}, digest)
    assert encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path).hit


def test_the_command_encodes_every_data_set_of_a_collection_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = [WithColumns(20 + n, f"pacs-{name}", region=["x"] * (20 + n)) for n, name in enumerate(("art", "photo"))]
    encoder = NumpyEncoder()
    monkeypatch.setattr("featcache.cli.encode.open_datasets", lambda *_, **__: list(map(whole_dataset, domains)))
    monkeypatch.setattr("featcache.cli.arguments.load_encoder", lambda *_, **__: encoder)
    command = ["encode", "collection:pacs:x", "--chunk-rows", "8", "--max-bad", "1", "--quiet", "--root", str(tmp_path)]
    assert main([*command, "--shard", "1/2"]) == 0
    said = capsys.readouterr().out
    assert "pacs-art/train with numpy: shard 1/2 is done; 2 of 3 chunks are done by others or not yet done" in said
    assert [entry.name for entry in list_stores(tmp_path)] == ["(unfinished)", "(unfinished)"]
    assert main([*command, "--shard", "0/2"]) == 0
    assert [entry.name for entry in list_stores(tmp_path)] == ["pacs-art", "pacs-photo"]
    assert encoder.images == 20 + 21 - 2
    assert main([*command, "--shard", "2/2"]) == 2
    assert "expected an index from 0 to one less" in capsys.readouterr().err
    assert all(stat(entry.path / "metadata.parquet") for entry in list_stores(tmp_path))
