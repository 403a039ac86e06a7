"""Taps with tokens in stores: files of bounded size, resumed and repaired like others, pooled on reading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fakes import NumpyDataset

import heads
from featcache import EncodeOptions, FeatureBatches, encode_dataset
from featcache.encoders.base import TokenShape
from featcache.encoders.callables import CallableEncoder
from featcache.encoding.images import EncodeResult
from featcache.errors import EncoderError, FeatcacheError, StoreCorruptError
from featcache.store import ImageStore, find_store, layout, open_image_store, repair, verify
from featcache.store.places import local as atomic
from featcache.store.reading.checks import forget
from featcache.transfer.export import export

TOKENS, DIM = 5, 6


class Pictures(NumpyDataset):
    """Rows may be copied between stores."""

    decoding = "4x4 uint8"


WEIGHTS = np.random.default_rng(4).standard_normal((48, TOKENS * DIM)).astype(np.float32)


class TokenEncoder(CallableEncoder):
    """Tokens that are a projection of the pixels, behind one class token."""

    def __init__(self) -> None:
        super().__init__(self.project, (TOKENS, DIM), digest="tokens")
        self.token_taps = {"patch": TokenShape(TOKENS, DIM), "tokens": TokenShape(TOKENS + 1, DIM, 1)}
        self.images = 0

    def project(self, images: np.ndarray) -> np.ndarray:
        self.images += len(images)
        return (images.reshape(len(images), -1).astype(np.float32) @ WEIGHTS / 256).reshape(-1, TOKENS, DIM)

    def encode_outputs(self, images: Any, taps: Any) -> dict[str, np.ndarray]:
        made = super().encode_outputs(images, taps)
        return made | {"tokens": np.concatenate([made["patch"][:, :1] * 2, made["patch"]], axis=1)}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images a file."""
    monkeypatch.setattr(layout, "TOKEN_NBYTES", 2 * 2 * (TOKENS + 1) * DIM)


def run(root: Path, dataset: NumpyDataset, encoder: TokenEncoder, *taps: str, **options: Any) -> EncodeResult:
    chosen = EncodeOptions(**{"chunk_rows": 8, "batch_size": 3, "taps": taps, **options})
    return encode_dataset(dataset, encoder, root=root, options=chosen)


def expected(dataset: NumpyDataset) -> np.ndarray:
    pixels = dataset.pixels.reshape(len(dataset.pixels), -1).astype(np.float64)
    return (pixels @ WEIGHTS.astype(np.float64) / 256).reshape(-1, TOKENS, DIM)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.endswith(".partial")}


def test_tokens_are_stored_in_files_of_bounded_size(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[11]), TokenEncoder()
    store = run(tmp_path, dataset, encoder, "patch", "tokens", "patch:mean", max_bad=1).store
    assert encoder.images == 39  # one pass for all
    tap, raw, good = store.tap("patch"), expected(dataset), np.arange(40) != 11
    assert tap.shape == (40, TOKENS, DIM) == tap.features.shape
    assert (tap.tokens, tap.dim, store.tokens) == (TOKENS, DIM, None)
    lengths = np.sqrt((raw**2).sum(axis=(1, 2)) / TOKENS)
    features, labels = tap.numpy()
    assert np.abs(features - (raw / lengths[:, None, None])[good]).max() <= 2.0**-10
    assert np.sqrt((features**2).sum(axis=2).mean(axis=1)) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(tap.array("norm")[good], lengths[good], rtol=1e-5)
    assert labels.tolist() == store.numpy()[1].tolist()
    assert np.isnan(tap.gather(np.array([11]))).all()
    blocks = [block.copy() for block, _ in tap.blocks(7)]
    np.testing.assert_array_equal(np.concatenate(blocks), features)
    files = sorted(Path(tap.folder / "features").rglob("c/*/0/0"))
    assert len(files) == 20
    assert {file.stat().st_size for file in files} == {2 * 2 * TOKENS * DIM}
    assert verify(store.path, deep=True).ok
    np.testing.assert_array_equal(zarr.open_array(tap.folder / "features", mode="r")[:], tap.array("features"))


def test_a_single_chunk_is_split_into_files(tmp_path: Path) -> None:
    dataset = NumpyDataset(7)
    store = run(tmp_path, dataset, TokenEncoder(), "patch", chunk_rows=None).store
    assert store.tap("patch").manifest.arrays["features"].chunk_rows == 2
    assert np.isfinite(store.tap("patch").features).all()


@pytest.mark.parametrize("how", ["mean", "max", "gem", "cls"])
def test_pooled_tokens_equal_the_pooled_tap_and_numpy(tmp_path: Path, how: str) -> None:
    dataset, encoder = NumpyDataset(), TokenEncoder()
    store = run(tmp_path, dataset, encoder, "patch", "tokens").store
    made = run(tmp_path / "pooled", dataset, encoder, "tokens", pool=how).store.tap(f"patch:{how}")
    raw = expected(dataset)
    by_hand = {
        "mean": raw.mean(axis=1),
        "max": raw.max(axis=1),
        "cls": 2 * raw[:, 0],
        "gem": (np.maximum(raw, 1e-6) ** 3).mean(axis=1) ** (1 / 3),
    }[how]
    lengths = np.linalg.norm(by_hand, axis=1)
    pooled = store.tap("tokens").pooled(how)
    for found in (made, pooled, store.tap(f"patch:{how}"), find_store(f"fake/train#patch:{how}", tmp_path)):
        assert isinstance(found, ImageStore)
        assert (found.shape, found.tokens) == ((40, DIM), None)
        assert np.abs(found.features - by_hand / lengths[:, None]).max() < 2e-3
        np.testing.assert_allclose(found.array("norm"), lengths, rtol=2e-3)
        assert found.encoder_key == made.encoder_key
        assert found.encoder_name.endswith(f"#patch:{how}")
        np.testing.assert_array_equal(found.gather(np.array([5, 3])), found.array("features")[[5, 3]])
    assert pooled.encoder_key not in (store.encoder_key, store.tap("tokens").encoder_key)


def test_pooling_without_tokens_or_by_an_unknown_method_is_refused(tmp_path: Path) -> None:
    store = run(tmp_path, NumpyDataset(), TokenEncoder(), "patch").store
    with pytest.raises(FeatcacheError, match="one vector per image; name a tap with tokens"):
        store.pooled("mean")
    with pytest.raises(FeatcacheError, match="'median': expected one of mean, cls, max, gem"):
        store.tap("patch").pooled("median")
    with pytest.raises(FeatcacheError, match="do not include a class token"):
        store.tap("patch").pooled("cls")
    with pytest.raises(FeatcacheError, match="no tap with tokens to pool"):
        EncodeOptions(taps=["pre_projection"], pool="mean")
    with pytest.raises(EncoderError, match="no tap 'layer:0'"):
        run(tmp_path, NumpyDataset(), TokenEncoder(), "layer:0")


def test_tokens_are_added_later_and_copied_from_other_stores(tmp_path: Path) -> None:
    encoder = TokenEncoder()
    at_once = run(tmp_path / "once", Pictures(), encoder, "patch").store
    run(tmp_path / "later", Pictures(), encoder)
    store = run(tmp_path / "later", Pictures(), encoder, "patch").store
    assert contents(store.path) == contents(at_once.path)
    grown, encoder.images = Pictures(50), 0
    grown.pixels[:40] = Pictures(40).pixels
    result = run(tmp_path / "later", grown, encoder, "patch")
    assert (result.copied_rows, encoder.images) == (40, 10)
    first = result.store.tap("patch")
    np.testing.assert_array_equal(first.array("features")[:40], store.tap("patch").array("features"))
    np.testing.assert_array_equal(first.array("norm")[:40], store.tap("patch").array("norm"))


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def test_a_kill_after_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(run(tmp_path / "whole", NumpyDataset(20), TokenEncoder(), "patch").store.path)
    path, steps = None, 0
    while path is None:
        left = 29 * steps + 5

        def step(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        monkeypatch.setattr(atomic, "after_step", step)
        try:
            path = run(tmp_path / "killed", NumpyDataset(20), TokenEncoder(), "patch").store.path
        except Killed:
            steps += 1
        assert steps < 50
    monkeypatch.setattr(atomic, "after_step", lambda step: None)
    assert steps > 2
    found = contents(path)
    assert {name: found.get(name) for name in whole} == whole


def test_a_damaged_file_is_named_and_its_chunk_made_again(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), TokenEncoder()
    path = Path(run(tmp_path, dataset, encoder, "patch").store.path)
    before = contents(path)
    file = path / "tap-patch/features/c/9/0/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    forget()
    with pytest.raises(StoreCorruptError, match=r"c/9/0/0: its bytes differ"):
        open_image_store(path).tap("patch").numpy()
    report = verify(path, deep=True)
    assert [part.damaged_chunks for part in report.parts] == [{2}]  # rows 16 to 23
    repair(report)
    encoder.images = 0
    run(tmp_path, dataset, encoder, "patch")
    assert encoder.images == 8
    assert contents(path) == before


def test_files_stay_below_their_size_and_number() -> None:
    layout.TOKEN_NBYTES = 1 << 24  # `small_files` restores it
    specs = layout.image_arrays(50_000, 768, 4096, 196)
    assert specs["features"].chunk_nbytes <= 1 << 24
    assert 4096 % specs["features"].chunk_rows == 0
    huge = layout.image_arrays(10_000_000, 1024, 4096, 256)["features"]
    assert huge.n_chunks <= 2 * layout.TOKEN_FILES
    assert layout.image_arrays(100, 4, 100)["features"].shape == (100, 4)


def test_tokens_are_exported_unchanged_or_refused(tmp_path: Path) -> None:
    tap = run(tmp_path, NumpyDataset(broken=[3]), TokenEncoder(), "patch", max_bad=1).store.tap("patch")
    features, labels = tap.numpy(np.float16)
    export(tap, tmp_path / "out", "npy", dtype="float16")
    np.testing.assert_array_equal(np.load(tmp_path / "out/features.npy"), features)
    ids = (tmp_path / "out/ids.txt").read_text().split()
    assert len(ids) == len(features) == 39
    batches = FeatureBatches(tap, 16, like=torch.zeros(0), shuffle=False)
    found = [(tokens.clone(), classes.clone()) for tokens, classes in batches]
    np.testing.assert_allclose(torch.cat([tokens for tokens, _ in found]).numpy(), features, rtol=1e-6)
    assert torch.cat([classes for _, classes in found]).tolist() == labels.tolist()
    for refused in (
        lambda: export(tap, tmp_path / "out.csv", "csv"),
        lambda: tap.to_pandas(features=True),
        lambda: heads.resident(tap, "cpu"),
        lambda: heads.leaks(tap, tap),
        lambda: heads.join([tap, tap]),
    ):
        with pytest.raises(FeatcacheError, match=r"5 tokens of width 6 per image; pool them"):
            refused()
