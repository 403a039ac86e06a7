"""``doctor`` on folders whose write speed cannot be measured."""

from pathlib import Path

import pytest

from featcache.cli.main import main


def test_doctor_tells_a_missing_folder_from_an_unwritable_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["doctor", "--root", str(tmp_path / "none")])
    assert "none (does not exist yet)" in capsys.readouterr().out
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("featcache.cli.doctor.os.access", lambda *_: False)  # as root, all folders are writable
    main(["doctor", "--root", str(tmp_path / "locked")])
    assert "locked (not writable)" in capsys.readouterr().out
