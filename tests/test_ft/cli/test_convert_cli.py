"""What ``convert`` says it has written."""

from pathlib import Path

import pytest

from featcache.cli.main import main


def test_the_files_of_a_lipsum_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", str(tmp_path / "L"), "--to", "lipsum", "--base", "tiny"]) == 0
    written = sorted(file.name for file in (tmp_path / "L").iterdir())
    assert len(written) == 3
    assert f"L: {', '.join(written)}" in capsys.readouterr().out
