"""Moments of a store: equal to one product in float64, by fold, kept beside it, the same from several processes."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

import heads.estimators.kept_moments
import heads.solvers.ridge.moments
from featcache.encoding.images import EncodeOptions, encode_dataset
from featcache.errors import HeadError
from featcache.progress import Silent
from featcache.store import ImageStore
from heads.estimators.kept_moments import moments_path, store_moments
from heads.solvers.folds import FoldAssigner
from heads.solvers.ridge.moments import Moments

ROOT = Path(__file__).parents[3]


def encoded(dataset: NumpyDataset, root: Path, encoder: NumpyEncoder | None = None, **options: Any) -> ImageStore:
    options = {"chunk_rows": 16, "max_bad": 2, **options}
    options = {"options": EncodeOptions(**options), "root": root, "progress": Silent()}
    return encode_dataset(dataset, encoder or NumpyEncoder(), **options).store


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """200 rows in small chunks, two of them unreadable."""
    dataset = NumpyDataset(200, broken=(3, 77), labels=np.random.default_rng(0).integers(0, 3, 200).tolist())
    return encoded(dataset, tmp_path)


def reference(store: ImageStore, folds: int) -> list[tuple[Any, Any, Any]]:
    X, y = store.numpy(np.float64)
    fold = FoldAssigner(3, folds)(y)
    one_hot = np.eye(3)[y]
    parts = [(X[fold == k], one_hot[fold == k]) for k in range(folds)]
    return [(x.T @ x, t.T @ x, t.sum(axis=0)) for x, t in parts]


def assert_equal(found: list[Moments], wanted: list[tuple[Any, Any, Any]]) -> None:
    assert len(found) == len(wanted)
    for part, (gram, sums, counts) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(part.xtx, gram, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(part.class_sums, sums, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(part.counts, counts)


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize(("block", "piece"), [(32_768, 8_192), (48, 7), (1, 1)])
def test_moments_equal_plain_products(
    store: ImageStore, folds: int, block: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads.estimators.kept_moments, "BLOCK_ROWS", block)
    monkeypatch.setattr(heads.solvers.ridge.moments, "PIECE_ROWS", piece)
    monkeypatch.setattr(heads.solvers.ridge.moments, "FOLD_PIECE_ROWS", piece)
    assert_equal(store_moments(store, folds, cache=False), reference(store, folds))


def test_the_second_time_reads_no_feature(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store_moments(store)
    path = moments_path(store)
    assert path is not None
    assert path.exists()
    monkeypatch.setattr(ImageStore, "blocks", None)
    again = store_moments(store)
    assert_equal(again, [(part.xtx, part.class_sums, part.counts) for part in first])


def test_other_labels_or_features_get_another_file(store: ImageStore, tmp_path: Path) -> None:
    path = moments_path(store)
    dataset = NumpyDataset(200, broken=(3, 77), labels=[0] * 199 + [1])
    relabelled = encoded(dataset, tmp_path, update_labels=True)
    assert moments_path(relabelled) != path
    assert_equal(store_moments(relabelled), reference(relabelled, 5))
    assert moments_path(encoded(dataset, tmp_path, NumpyEncoder(seed=1))) != moments_path(relabelled)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_file_is_written_again(store: ImageStore, damage: str) -> None:
    store_moments(store)
    path = moments_path(store)
    assert path is not None
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"torn": len(content) // 2, "flipped": len(content), "empty": 0}[damage]])
    assert_equal(store_moments(store), reference(store, 5))
    assert_equal(store_moments(store), reference(store, 5))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_full_or_read_only_disk_is_no_error(store: ImageStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(heads.estimators.kept_moments.atomic, "put", refuse)
    assert_equal(store_moments(store), reference(store, 5))
    path = moments_path(store)
    assert path is not None
    assert not path.exists()


def test_two_processes_sum_to_the_same(store: ImageStore, tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np, heads.estimators.kept_moments as m\n"
        "from featcache.store import open_image_store\n"
        "from featcache.processes import process_group\n"
        "m.BLOCK_ROWS = 24\n"
        "with process_group() as (rank, size):\n"
        "    parts = m.store_moments(open_image_store(sys.argv[1]), distributed=True, cache=False)\n"
        "    assert size == 2\n"
        "    np.savez(f'{sys.argv[2]}/{rank}.npz', xtx=[p.xtx for p in parts], counts=[p.counts for p in parts],"
        " sums=[p.class_sums for p in parts])\n"
    )
    (tmp_path / "run.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(tmp_path / "run.py"), str(store.path), str(tmp_path)], check=True, env=environment)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as file:
            parts = [
                Moments.of_classes(*parts) for parts in zip(file["xtx"], file["sums"], file["counts"], strict=True)
            ]
        assert_equal(parts, reference(store, 5))


def test_too_few_folds_or_rows_are_refused(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="folds is 0"):
        store_moments(store, 0)
    unreadable = encoded(NumpyDataset(2, broken=(0, 1)), tmp_path / "none")
    with pytest.raises(HeadError, match="no valid row"):
        store_moments(unreadable)
