"""Grown, reordered, changed data sets: only new content is decoded and encoded, the rest is copied bit for bit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import CLASSES, NumpyDataset, NumpyEncoder, projected

from featcache import EncodeOptions, encode_dataset
from featcache.cli.main import main
from featcache.datasets.base import SampleIndex
from featcache.encoding.images import EncodeResult
from featcache.store import open_image_store, verify
from featcache.store.places import local as atomic


class Pictures(NumpyDataset):
    """Some of 60 pictures by number, in any order; equal numbers are equal content under different ids."""

    decoding = "4x4 uint8"

    def __init__(self, numbers: Sequence[int], broken: Sequence[int] = ()) -> None:
        super().__init__(60, broken)
        self.numbers, self.decoded = list(numbers), 0
        self.pixels = self.pixels[self.numbers]
        self.labels = np.arange(len(self.numbers)) % len(CLASSES)
        self.stamps = np.full(len(self.numbers), 7, dtype=np.int64)

    @property
    def index(self) -> SampleIndex:
        ids = [f"{place}-{number}" for place, number in enumerate(self.numbers)]
        return SampleIndex(ids, np.full(len(ids), 48), self.stamps.copy(), self.labels.astype(np.int64), CLASSES)

    def decode(self, content: bytes | memoryview, row: int) -> np.ndarray:
        self.decoded += 1
        return super().decode(content, row)


class Noisy(NumpyEncoder):
    """Every call adds new noise: equal rows must be copies."""

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        noise = np.random.default_rng(self.images).standard_normal((len(images), self.dim)).astype(np.float32)
        return super().encode_images(images) + 1e-2 * noise


def run(root: Path, dataset: NumpyDataset, encoder: NumpyEncoder, **options: object) -> EncodeResult:
    return encode_dataset(
        dataset, encoder, root=root, options=EncodeOptions(**{"chunk_rows": 8, "batch_size": 3} | options)
    )


def assert_copied(old: EncodeResult, new: EncodeResult, was: Sequence[int], now: Sequence[int]) -> None:
    for name in ("features", "norm"):
        then, found = old.store.array(name), new.store.array(name)
        for row, number in enumerate(now):
            if number in was:
                assert found[row].tobytes() == then[list(was).index(number)].tobytes()


def cases() -> dict[str, list[int]]:
    shuffled = np.random.default_rng(0).permutation(40)
    return {
        "grown": [*range(40), 50, 51, 52],
        "grown in the middle": [*range(20), 45, 46, *range(20, 40)],
        "reordered": shuffled.tolist(),
        "a shuffled subset": shuffled[:17].tolist(),
        "duplicate contents": [3, 3, 41, 3, 5, 41],
        "other images alone": [41, 42, 43],
    }


@pytest.mark.parametrize("name", cases())
def test_only_new_content_is_encoded(tmp_path: Path, name: str) -> None:
    numbers, encoder = cases()[name], Noisy()
    old = run(tmp_path, Pictures(range(40)), encoder)
    fresh = sum(number >= 40 for number in numbers)
    encoder.images, dataset = 0, Pictures(numbers)
    new = run(tmp_path, dataset, encoder)
    assert (encoder.images, dataset.decoded) == (fresh, fresh)
    assert (new.encoded_rows, new.copied_rows, new.hit) == (fresh, len(numbers) - fresh, False)
    assert_copied(old, new, range(40), numbers)
    assert np.isfinite(new.store.numpy()[0]).all()
    assert new.store.labels.tolist() == dataset.labels.tolist()
    assert verify(new.store.path, deep=True).ok


def test_copied_rows_equal_encoded_rows(tmp_path: Path) -> None:
    run(tmp_path / "both", Pictures(range(40)), NumpyEncoder())
    copied = run(tmp_path / "both", Pictures([*range(10, 50)]), NumpyEncoder()).store
    dataset, encoder = Pictures([*range(10, 50)]), NumpyEncoder()
    assert np.abs(copied.numpy()[0] - projected(dataset, encoder)).max() <= 2.0**-11


def test_no_reuse_and_other_decoders_encode_everything(tmp_path: Path) -> None:
    encoder = Noisy()
    run(tmp_path, Pictures(range(20)), encoder)
    assert run(tmp_path, Pictures(range(10)), encoder, reuse=False).encoded_rows == 10
    other = Pictures(range(9))
    other.decoding = "another"
    assert run(tmp_path, other, encoder).copied_rows == 0
    silent = NumpyDataset(12)  # does not say how it decodes
    assert run(tmp_path, silent, encoder).copied_rows == 0
    assert run(tmp_path, Pictures(range(8)), NumpyEncoder(seed=1)).copied_rows == 0  # another encoder


def test_a_changed_image_is_encoded(tmp_path: Path) -> None:
    encoder = Noisy()
    run(tmp_path, Pictures(range(20)), encoder)
    dataset = Pictures([*range(20), 30])
    dataset.pixels[5] += 1
    result = run(tmp_path, dataset, encoder)
    assert (result.encoded_rows, result.copied_rows) == (2, 19)


def test_bad_rows_are_not_copied(tmp_path: Path) -> None:
    encoder = Noisy()
    run(tmp_path, Pictures(range(20), broken=[4]), encoder, max_bad=1)
    result = run(tmp_path, Pictures(range(19)), encoder)
    assert (result.encoded_rows, result.copied_rows) == (1, 18)
    assert result.store.valid.all()


@pytest.mark.parametrize("name", ["features/c/1/0", "norm/c/1", "content/c/1/0", "valid/c/1"])
def test_damaged_chunks_are_not_copied(tmp_path: Path, name: str) -> None:
    encoder = Noisy()
    old = run(tmp_path, Pictures(range(20)), encoder)
    file = Path(old.store.path / name)
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    encoder.images = 0
    new = run(tmp_path, Pictures([*range(20), 30]), encoder)
    assert (new.encoded_rows, new.copied_rows, encoder.images) == (8 + 1, 12, 9)
    assert np.abs(new.store.numpy()[0] - projected(Pictures([*range(20), 30]), encoder)).max() < 0.1  # but the noise


def test_unfinished_and_damaged_stores_are_not_donors(tmp_path: Path) -> None:
    encoder = Noisy()
    one = run(tmp_path, Pictures(range(20)), encoder).store.path
    Path(one / "manifest.json").unlink()
    two = run(tmp_path, Pictures(range(19)), encoder)
    assert two.copied_rows == 0
    Path(two.store.path / "features/c/0/0").unlink()
    assert run(tmp_path, Pictures(range(18)), encoder).copied_rows == 0


class Killed(BaseException):
    """Not an Exception, so that nothing catches it."""


def test_a_run_killed_while_copying_rows_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, numbers = Noisy(), [*range(20), 30, 31]
    old = run(tmp_path, Pictures(range(20)), encoder)
    kills = 0
    while True:
        left = 11 * kills + 3

        def step(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        monkeypatch.setattr(atomic, "after_step", step)
        try:
            path = run(tmp_path, Pictures(numbers), encoder).store.path
            break
        except Killed:
            kills += 1
    monkeypatch.setattr(atomic, "after_step", lambda step: None)
    assert kills > 3
    new = run(tmp_path, Pictures(numbers), encoder)
    assert (new.hit, new.store.path) == (True, path)
    assert_copied(old, new, range(20), numbers)
    assert np.isfinite(open_image_store(path).numpy()[0]).all()
    assert verify(path, deep=True).ok


def test_the_result_line_counts_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    chance = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    encode = ["encode", f"imagefolder:{tmp_path / 'pictures'}", "--split", "all", "--quiet", "--root", str(tmp_path)]
    assert main(encode) == 0
    Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures/a/new.png")
    capsys.readouterr()
    assert main(encode) == 0
    assert "1 rows encoded, 6 copied from other stores" in capsys.readouterr().out
