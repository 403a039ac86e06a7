"""Two processes that share a batch have the loss and the parameter gradients of one process."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden import sines

from featcache.processes import is_first
from ft.distributed import gather, processes
from ft.objectives import contrastive
from ft.regularizers.base import Step
from ft.regularizers.variance_covariance import VarianceCovariance

WORLD = 2
PATIENCE = timedelta(seconds=120)
CAPTIONS = torch.tensor([0, 1, 2, 1, 0, 3, 1])
SPLIT = ([0, 1, 2, 3, 4], [5, 6])  # of different lengths, as at the end of an epoch


def losses(weight: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of the whole batch, for the image tower ``x @ weight``."""
    features, texts = (sines((7, 5), 0.2) @ weight)[rows], sines((4, 3), 0.9)[CAPTIONS[rows]]
    return VarianceCovariance(1.0, 1.0)(Step(features=features)), contrastive(features, texts, 5.0, CAPTIONS[rows])


def gradients(rows: list[int]) -> torch.Tensor:
    found = []
    for number in range(2):
        weight = sines((5, 3), 1.3, 0.5).requires_grad_()
        value = losses(weight, rows)[number]
        found += [value.detach()[None], torch.autograd.grad(value, weight)[0].reshape(-1)]
    return torch.cat(found)


def worker(rank: int, folder: Path) -> None:
    """One of two processes; averages gradients as DistributedDataParallel does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD, timeout=PATIENCE
    )
    try:
        found = gradients(SPLIT[rank])
        dist.all_reduce(found)
        torch.save(found / WORLD, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    # rank 0 runs here, rank 1 in another process
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([*command, "1", str(tmp_path)], env=environment)
    worker(0, tmp_path)
    assert other.wait(timeout=60) == 0
    expected = gradients(list(range(7)))
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gather_in_one_process_returns_its_rows() -> None:
    rows = torch.ones(2, 3)
    assert gather(rows) is rows


def test_processes_wait_for_the_first_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example while it encodes the training split; torch's limits are 10 and 30 minutes."""
    begin = dist.init_process_group

    def alone(backend: str, **settings: Any) -> None:
        begin(backend, store=dist.HashStore(), rank=0, world_size=1, **settings)

    monkeypatch.setattr(dist, "init_process_group", alone)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with processes("cpu") as place:
        assert place.world == 2
        group = dist.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=12)


@pytest.mark.parametrize(("environment", "first"), [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False)])
def test_is_first_before_the_process_group(
    environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


@pytest.mark.parametrize("part", SPLIT)
def test_gradients_of_parts_differ(part: list[int]) -> None:
    assert not torch.allclose(gradients(part), gradients(list(range(7))), rtol=1e-2)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
