"""Completion in shells, and the report on the installation."""

import json
import os
import shutil
import subprocess
import sys
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


COMPLETE = {  # what each shell offers for the line "featcache encode --pre" once it has read the script
    "bash": "COMP_WORDS=(featcache encode --pre); COMP_CWORD=2; _featcache; printf '%s\\n' \"${COMPREPLY[@]}\"",
    "zsh": "words=(featcache encode --pre); CURRENT=3; _featcache",
    "fish": "complete -C 'featcache encode --pre'",
}
BEFORE = {"zsh": "compdef() { : }; compadd() { shift; print -l -- ${(P)1} }\n"}
"""Outside of its line editor zsh has no `compadd`: here it prints the array that it is given."""


@pytest.mark.parametrize("shell", SCRIPTS)
def test_each_shell_completes_a_flag(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} on this machine")
    command = tmp_path / "featcache"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m featcache "$@"\n')
    command.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = tmp_path / "script"
    script.write_text(f"{BEFORE.get(shell, '')}{SCRIPTS[shell]}\n{COMPLETE[shell]}\n")
    done = subprocess.run([shell, script], env=env, text=True, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["--precision", "--preprocess", "--pretrained"], done.stderr


def test_doctor_reports_versions_and_stores(
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
