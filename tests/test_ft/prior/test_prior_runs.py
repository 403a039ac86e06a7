"""Runs with a stored prior: later epochs, later runs and other processes read v0 instead of computing it."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from clip_models import make_model, write_folder
from finetuning import N, Pictures, log, train, weights

from featcache.encoders import load_encoder
from featcache.store import content_key, list_stores, open_prior_store
from ft.training.model import Frozen

WORLD, EPOCHS, STEPS = 2, 3, 9
PATIENCE = timedelta(seconds=120)
CHANGES: dict[str, Any] = {
    "steps": STEPS,
    "log_every": 1,
    "prior": "store",
    "regularizers": {"feature_distillation": 1.0, "logit_distillation": 1.0},
}
CASES = {"crops": ("wise_ft", N), "one view": ("none", N), "one view, rows left over": ("none", N + 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images in each later pass through the frozen tower."""
    seen: list[int] = []
    compute = Frozen.image_features

    def counted(self: Frozen, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return compute(self, images)

    monkeypatch.setattr(Frozen, "image_features", counted)
    return seen


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count(monkeypatch)


def priors(root: Path) -> list[Any]:
    return [entry for entry in list_stores(root) if entry.kind == "priors"]


def trajectory(out: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["gradient_norm"], line["terms"]) for line in log(out)]


def check_same(one: Path, two: Path) -> None:
    """Bit for bit: losses, gradients and weights."""
    assert len(trajectory(one)) == STEPS
    assert trajectory(one)[-1][3]["feature_distillation"] > 0
    assert trajectory(one) == trajectory(two)
    last = weights(two / "last")
    assert all(torch.equal(value, last[name]) for name, value in weights(one / "last").items())


def test_constant_views_are_computed_once(model: str, tmp_path: Path, seen: list[int]) -> None:
    train(tmp_path / "first", model, **CHANGES)
    assert sum(seen) == N
    (entry,) = priors(tmp_path / "cache")
    encoder = load_encoder(model)
    expected = encoder.encode_images([encoder.prepare(picture) for picture in Pictures().pixels])
    np.testing.assert_allclose(open_prior_store(entry.path).gather(np.arange(N)), expected, rtol=1e-4, atol=1e-5)
    train(tmp_path / "second", model, **CHANGES)
    assert sum(seen) == N
    check_same(tmp_path / "first", tmp_path / "second")
    train(tmp_path / "online", model, **CHANGES | {"prior": "online"})
    assert sum(seen) == N + 8 * STEPS
    first, online = ([line[1] for line in trajectory(tmp_path / name)] for name in ("first", "online"))
    np.testing.assert_allclose(first, online, rtol=1e-4)


def test_rows_left_over_by_one_epoch_are_computed_in_the_next(model: str, tmp_path: Path, seen: list[int]) -> None:
    """Their whole batch is computed; stored rows are used bit for bit."""
    train(tmp_path / "first", model, Pictures(N + 2), **CHANGES)
    assert N < sum(seen) < 8 * STEPS
    computed = sum(seen)
    train(tmp_path / "second", model, Pictures(N + 2), **CHANGES)
    assert sum(seen) == computed
    check_same(tmp_path / "first", tmp_path / "second")


def test_crops_have_a_store_for_each_epoch(model: str, tmp_path: Path, seen: list[int]) -> None:
    train(tmp_path / "first", model, augment="wise_ft", **CHANGES)
    assert sum(seen) == 8 * STEPS
    assert len(priors(tmp_path / "cache")) == EPOCHS


def test_a_compiled_tower_has_stores_of_its_own(
    model: str, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds differently; stores of the plain tower keep their keys."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    plain = {"tower": load_encoder(model).image_identity, "stored": "float32"}
    keys = []
    for compiled in (False, True):
        train(tmp_path / f"first {compiled}", model, compile=compiled, **CHANGES)
        assert sum(seen) == N
        train(tmp_path / f"second {compiled}", model, compile=compiled, **CHANGES)
        assert sum(seen) == N
        seen.clear()
        keys.append({entry.path.parent.name for entry in priors(tmp_path / "cache")})
    assert keys[0] == {content_key(plain)}
    assert len(keys[1]) == 2


def worker(rank: int, folder: Path, model: str) -> None:
    """One of two processes: each case twice, with the images that its frozen tower saw."""
    meeting = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=PATIENCE)
    computed: dict[str, list[int]] = {}
    try:
        with pytest.MonkeyPatch.context() as patch:
            seen = count(patch)
            for case, (augment, n) in CASES.items():
                for number in (0, 1):
                    train(folder / f"{case} {number}", model, Pictures(n), augment=augment, **CHANGES)
                    computed.setdefault(case, []).append(sum(seen))
                    seen.clear()
    finally:
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(computed))


@pytest.fixture(scope="module")
def two_processes(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs; rank 0 runs in this process, rank 1 in another."""
    folder = tmp_path_factory.mktemp("two")
    root = Path(__file__).parents[3]
    settings = {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "FEATCACHE_ROOT": str(folder / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_ROOT", settings["FEATCACHE_ROOT"])
        other = subprocess.Popen([sys.executable, __file__, "1", str(folder), model], env=os.environ | settings)
        worker(0, folder, model)
        assert other.wait(timeout=60) == 0
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_of_two_processes_computes_nothing_and_follows_the_first(case: str, two_processes: Path) -> None:
    computed = [json.loads((two_processes / f"{rank}.json").read_text())[case] for rank in range(WORLD)]
    first, second = (sum(numbers) for numbers in zip(*computed, strict=True))
    assert second == 0
    if case == "one view, rows left over":
        assert N < first < 8 * STEPS
    else:  # each image once per view, in whichever process saw it first
        assert first == (N if case == "one view" else 8 * STEPS)
    check_same(two_processes / f"{case} 0", two_processes / f"{case} 1")


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
