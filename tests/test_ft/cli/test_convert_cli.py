"""Output of ``convert``."""

from pathlib import Path

import numpy as np
import pytest

from featcache.cli.main import main
from heads import LinearHead, save


def test_the_files_of_a_lipsum_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", str(tmp_path / "L"), "--to", "lipsum", "--base", "tiny"]) == 0
    written = sorted(file.name for file in (tmp_path / "L").iterdir())
    assert len(written) == 3
    assert f"L: {', '.join(written)}" in capsys.readouterr().out


def test_a_bias_per_class_matters_only_where_lipsum_files_hold_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = save(LinearHead(np.eye(3, 128), np.arange(3), ("a", "b", "c")), tmp_path / "h.safetensors")
    command = ["convert", "tiny", "--to", "lipsum", "--base", "tiny", "--head", str(head)]
    assert main([*command, str(tmp_path / "L")]) == 0
    assert main([*command, str(tmp_path / "best.ckpt")]) == 2
    assert "has a bias per class, and cls in Lipsum-FT's files has none; give one without" in capsys.readouterr().err
    assert not (tmp_path / "best.ckpt").exists()
