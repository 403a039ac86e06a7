"""Named output files: links are followed, devices and pipes refused, `-` is standard output, full disks are named."""

import csv
import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyDataset, NumpyEncoder
from safetensors.numpy import load as load_safetensors

from featcache import EncodeOptions, encode_dataset
from featcache.cli.main import main
from featcache.errors import OutputError
from featcache.store.places import local, targets
from featcache.store.places.targets import new_folder, replacing, write_target
from ft.checkpoints.folder import write_state
from heads import append_rows, load


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path / "cache", options=EncodeOptions(chunk_rows=8))
    return tmp_path


FIT = ("fit", "ridge", "fake/train", "--set", "alphas=[1.0]", "-o")
VERBS: dict[str, Callable[[str], list[str]]] = {
    "fit": lambda target: [*FIT, target],
    "export csv": lambda target: ["export", "fake/train", target, "--format", "csv"],
    "export parquet": lambda target: ["export", "fake/train", target, "--format", "parquet"],
    "export safetensors": lambda target: ["export", "fake/train", target, "--format", "safetensors"],
    "export npy": lambda target: ["export", "fake/train", target, "--format", "npy"],
    "results": lambda target: ["evaluate", "head.safetensors", "--on", "fake/train", "--results", target],
    "per-sample": lambda target: ["evaluate", "head.safetensors", "--on", "fake/train", "--per-sample", target],
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("verb", VERBS)
def test_targets_that_are_not_regular_files_are_refused_and_kept(
    place: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main([*FIT, "head.safetensors"]) == 0
    capsys.readouterr()
    ending = ".npz" if verb == "per-sample" else ""
    pipe, device = place / f"pipe{ending}", place / f"device{ending}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/full")
    for target, kind in ((pipe, stat.S_ISFIFO), (device, stat.S_ISCHR)):
        said = refused(capsys, VERBS[verb](str(target)))
        assert str(target) in said
        assert kind(target.stat().st_mode)
    assert device.is_symlink()


@pytest.mark.parametrize("verb", ["fit", "export csv", "results"])
def test_output_through_a_link_writes_the_linked_file(place: Path, verb: str) -> None:
    assert main([*FIT, "head.safetensors"]) == 0
    (place / "elsewhere").mkdir()
    link, file = place / "link", place / "elsewhere" / "file"
    link.symlink_to(file)
    assert main(VERBS[verb](str(link))) == 0
    assert link.is_symlink()
    assert file.stat().st_size > 0
    os.chmod(file, 0o600)
    assert main(VERBS[verb](str(link))) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not [*place.rglob("*.partial"), *place.rglob("*.tmp")]


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_dash_is_standard_output(place: Path, capfdbinary: pytest.CaptureFixture[bytes], name: str) -> None:
    assert main(["export", "fake/train", name]) == 0
    shown = capfdbinary.readouterr()
    rows = list(csv.DictReader(io.StringIO(shown.out.decode())))
    assert len(rows) == 40
    assert b"40 x 16" in shown.err
    assert main([*FIT, name]) == 0
    content = capfdbinary.readouterr().out
    (place / "head.safetensors").write_bytes(content)
    assert load_safetensors(content)["weights"].shape == (3, 16)
    assert len(load(place / "head.safetensors").classnames) == 3
    assert main(["export", "fake/train", name, "--format", "safetensors"]) == 0
    assert load_safetensors(capfdbinary.readouterr().out)["features"].shape == (40, 16)
    assert not (place / "-").exists()


def test_a_missing_folder_or_permission_is_reported_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("")
    for target in ("file/head.safetensors", "a\0b", "x" * 300, "\udcff" * 300):
        assert "Error" in refused(capsys, [*FIT, target])
    (place / "round").symlink_to(place / "round")
    assert "link" in refused(capsys, [*FIT, "round"])


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing a file fails: there is no space for its last bytes."""
    monkeypatch.setattr(targets, "synced", True)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "write", lambda *_: 3)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "file": lambda path: write_target(path, b"new content"),
    "state": lambda path: write_state({"weight": torch.ones(3)}, path),
    "rows": lambda path: append_rows(path, [{"head": "ridge"}]),
}


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_reported_and_old_files_stay(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "out"
    path.write_text('{"old": 1}\n')
    with pytest.raises(OutputError, match=r"cannot write .*/out: No space left on device.*; make room there, or name"):
        WRITERS[writer](path)
    assert path.read_text() == '{"old": 1}\n'
    assert os.listdir(tmp_path) == ["out"]


def test_the_space_needed_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Not a directory"):
        write_target("/dev/full/x", b"")
    with pytest.raises(OutputError, match="19 bytes are needed"), targets.writing(tmp_path / "a", 19):
        full()


def test_a_copy_without_space_names_the_new_file(tmp_path: Path) -> None:
    """shutil's error names the file that was read first."""
    with (
        pytest.raises(OutputError, match=r"cannot write .*/model.*No space left.*; nothing there was replaced"),
        targets.new_folder(tmp_path / "model") as folder,
    ):
        raise OSError(
            errno.ENOSPC, os.strerror(errno.ENOSPC), "/usr/tiny/config.json", None, str(folder / "config.json")
        )
    assert os.listdir(tmp_path) == []


def test_errors_about_files_that_were_read_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not-there"), replacing(tmp_path / "out"):
        (tmp_path / "not-there").read_bytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_new_folder_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr("featcache.store.places.local._swap", lambda one, two: False)
    for content in ("old", "new"):
        with new_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "new"}


def test_an_interrupted_change_of_folders_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems that cannot exchange two names atomically."""
    out, moves = tmp_path / "model", []
    out.mkdir()
    (out / "config.json").write_text("old")
    real = os.replace

    def stop(old: Any, new: Any) -> None:
        moves.append(new)
        if len(moves) == 2:
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr("featcache.store.places.local._swap", lambda one, two: False)
    monkeypatch.setattr("featcache.store.places.local.os.replace", stop)
    with pytest.raises(KeyboardInterrupt), new_folder(out):
        moves.clear()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "config.json").read_text() == "old"


def test_exports_keep_their_bytes(place: Path) -> None:
    """npy files equal those that numpy writes."""
    from featcache.store import find_store

    assert main(["export", "fake/train", "out"]) == 0
    features, labels = find_store("fake/train", place / "cache").numpy(np.float32)
    for name, array in (("features", features), ("labels", labels)):
        file = io.BytesIO()
        np.save(file, array)
        assert (place / "out" / f"{name}.npy").read_bytes() == file.getvalue()


def dead_process() -> str:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return local.owner().replace(str(os.getpid()), str(child))


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path: Path) -> None:
    names = {
        f"out.csv.{dead_process()}-0123abcd.partial": False,
        f"out.csv.{local.owner()}-0123abcd.partial": True,  # of a process that is alive
        "out.csv.mine.partial": True,  # no name of ours
        f"other.csv.{dead_process()}-0123abcd.partial": True,
    }
    for name in names:
        (tmp_path / name).write_text("part")
        os.utime(tmp_path / name, (0, 0))
    write_target(tmp_path / "out.csv", b"whole")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_an_interrupted_clean_up_is_finished_when_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featcache.store.places.local.shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model"):
        raise ValueError
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    local.give_up_all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["", ".", "..", "thesis", "runs"])
@pytest.mark.parametrize("words", ["merge soup tiny tiny", "convert tiny", "wise tiny tiny --alphas 0.5"])
def test_only_model_folders_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, out: str
) -> None:
    for name in ("here/thesis/thesis.tex", "here/runs/a/config.json", "here/notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    target = [out] if words.startswith("convert") else ["--out", out]
    if words.startswith("wise"):
        (tmp_path / "here" / out / "alpha=0.500").mkdir()
        (tmp_path / "here" / out / "alpha=0.500" / "mine").write_text("mine")
        before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert main([*words.split(), *target, "--overwrite"]) == 2
    assert "its files would be lost" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_model_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["convert", "tiny", "new", "--overwrite"]) == 0
