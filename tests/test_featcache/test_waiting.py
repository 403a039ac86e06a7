"""A run that waits for others reports it after a while."""

import io

import pytest

from featcache import progress


def test_waiting_is_reported_after_five_seconds_and_then_every_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    printed = progress.Printed(said)
    assert isinstance(printed, progress.Waits)
    for second in range(30):
        now[0] = 100.0 + second
        printed.wait("" if second < 2 else "waiting for chunk 3")
    assert said.getvalue() == "waiting for chunk 3\n" * 3  # 7, 17 and 27 seconds
