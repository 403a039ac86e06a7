"""Completion in shells, and the report on the installation."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import encode_dataset
from featcache.cli.completion import SCRIPTS, candidates
from featcache.cli.main import main


def test_verbs_flags_choices_and_stores_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path)
    assert candidates(["re"]) == sorted(["relabel", "rename", "report", "retrieve"])
    assert candidates(["list", "--r"]) == ["--root"]
    assert candidates(["encode", "digits", "--precision", ""]) == ["bf16", "fp16", "fp32"]
    assert candidates(["info", "--root", str(tmp_path), "fa"]) == ["fake/train", "fake/train@numpy"]
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path))
    assert candidates(["info", "fake/train@"]) == ["fake/train@numpy"]
    assert candidates(["nonsense", ""]) == []
    assert candidates(["fit", "ri"]) == ["ridge"]
    assert candidates(["sweep", "zero_shot", "ri"]) == ["ridge"]
    assert candidates(["fit", "ridge", "fa"]) == ["fake/train", "fake/train@numpy"]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "featcache completion words" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_doctor_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("featcache.datasets.hub.getproxies", dict)
    encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path)
    assert main(["doctor", "--root", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["versions"]["numpy"], record["hub"], record["stores"]) == (np.__version__, False, 1)
    assert record["write_bytes_per_second"] > 0
    assert main(["doctor", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "model hub    not reachable" in said
    assert f"stores       1 in {tmp_path}" in said
