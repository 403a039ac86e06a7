"""Shared by all tests: a separate root folder for every test, and which tests are slow."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's stores."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "cache"))


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the test functions that tests/slow.txt lists, as ``path::name`` without parameters."""
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)
