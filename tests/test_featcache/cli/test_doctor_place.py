"""What ``doctor`` says of a folder of stores whose speed it cannot measure."""

from pathlib import Path

import pytest

from featcache.cli.main import main


def test_a_folder_that_is_not_there_is_no_unwritable_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["doctor", "--root", str(tmp_path / "none")])
    assert "none (does not exist yet)" in capsys.readouterr().out
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("featcache.cli.doctor.os.access", lambda *_: False)  # as root, all folders are writable
    main(["doctor", "--root", str(tmp_path / "locked")])
    assert "locked (not writable)" in capsys.readouterr().out
