"""Pickles on the command line: the refusal explains --trust, and using it warns on stderr."""

import logging
from pathlib import Path

import pytest
import torch
from clip_models import make_model, write_folder
from foreign_checkpoints import pickled_classifier

from featcache.cli.main import main
from featcache.encoders.checkpoints import is_pickled


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    pickled_classifier(tmp_path / "finetuned.pt", make_model(3))
    write_folder(tmp_path / "base", make_model(0))
    return ["convert", str(tmp_path / "finetuned.pt"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]


def test_the_refusal_names_trust_and_says_what_it_does(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    for words in (
        "finetuned.pt: a pickled Python object, which is not read",
        "unpickling runs any code in the file",
        "featcache convert --trust FILE OUT",
        "in a separate process but with your rights",
    ):
        assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_trust_warns_in_one_line_on_stderr(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as on the command line: pytest's own are taken away
    assert main([*command, "--trust"]) == 0
    file = tmp_path / "finetuned.pt"
    expected = f"{file}: --trust runs the code in this file, in a separate process but with your rights\n"
    assert capsys.readouterr().err == expected
    assert (tmp_path / "out" / "open_clip_model.safetensors").exists()


def test_trust_is_silent_if_nothing_is_unpickled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(make_model(3).state_dict(), tmp_path / "state.pt")
    write_folder(tmp_path / "base", make_model(0))
    command = ["convert", str(tmp_path / "state.pt"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main([*command, "--trust"]) == 0
    assert not [record for record in caplog.records if "--trust" in record.getMessage()]


def test_no_code_runs_where_the_conversion_is_refused_anyway(
    command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*command[:3], "--trust"]) == 2  # a folder without a --base
    assert not [record for record in caplog.records if "--trust" in record.getMessage()]


def test_errors_of_other_files_do_not_mention_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name, message in (("text.pt", "not a safetensors file"), ("numbers.pt", "holds no state dict")):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "your rights" not in error
    assert not is_pickled(tmp_path / "text.pt")
    assert is_pickled(tmp_path / "numbers.pt")
