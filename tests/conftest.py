"""Fixtures for all tests: a separate root folder for each, and marks for slow tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # on a bare GPU machine, whose tests do without
    pass
else:
    settings.register_profile("nightly", deadline=None)  # `make nightly`; see tests/test_trust/test_fuzz.py

os.environ |= {"FEATCACHE_BATCH_SIZE": "64", "FEATCACHE_CHUNK_ROWS": "4096"}  # not by the speed of this machine
os.environ.setdefault("FEATCACHE_FSYNC", "0")  # a sync waits for the disk; tests of power cuts switch it on
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread per worker: on busy cores, two wait for each other in a loop


@pytest.fixture(autouse=True, scope="session")
def _own_working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run tests in a temporary folder, since some commands write ``results.jsonl`` to the working directory."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own root, so that none touches the user's stores."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "cache"))


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the test functions of tests/slow.txt (``path::name``); skip GPU tests without a GPU, unless asked for."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and config.option.markexpr != "gpu" and not cuda_is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make gpu)"))
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)


def cuda_is_available() -> bool:
    """Whether torch has a CUDA device."""
    import torch

    return torch.cuda.is_available()
