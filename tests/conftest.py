"""Shared by all tests: a root folder of its own for every test."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's stores."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "cache"))
