"""SIGTERM and SIGHUP end a run with one line, its exit code, released claims, and valid files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_pictures import write_pictures

from featcache.cli.main import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def started(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "featcache", *words]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not list(folder.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < until, pattern
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_encode_releases_its_claims(tmp_path: Path, number: signal.Signals, code: int) -> None:
    data = write_pictures(tmp_path / "pictures", 500)
    words = ("encode", data, "--split", "all", "--root", str(tmp_path / "cache"), "--chunk-rows", "2", "--quiet")
    run = started(*words, cwd=tmp_path)
    wait_for("cache/images/*/*/done/000001.json", tmp_path, run)
    run.send_signal(number)
    out, said = run.communicate(timeout=60)
    assert run.returncode == code
    assert out == ""
    done = len(list(tmp_path.glob("cache/images/*/*/done/*.json")))
    assert said.splitlines()[-1] == (
        f"featcache: Terminated: ended by {number.name}: pictures/all with tiny: {2 * done} of 500 rows are kept; "
        "rows are written in chunks of 2 (--chunk-rows); run the same command again to continue"
    )
    assert "Traceback" not in said
    assert not list(tmp_path.glob("cache/images/*/*/claims/*"))
    assert not list(tmp_path.rglob("*.partial"))
    assert 2 <= done < 60
    assert main([*words]) == 0


def test_finetune_ends_as_it_resumes(tmp_path: Path) -> None:
    words = ("finetune", "digits", "--out", "run", "--steps", "60", "--batch-size", "8", "--save-every", "2", "--quiet")
    run = started(*words, "--workers", "1", "--device", "cpu", cwd=tmp_path)
    wait_for("run/resume.safetensors", tmp_path, run)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 143
    assert said.count("\n") == 1
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.old")]
    assert '"step": 60' not in (tmp_path / "run" / "log.jsonl").read_text()


def test_handlers_are_only_there_for_the_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["list", "--root", str(tmp_path)]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import featcache.cli.list as verb\n"
        "verb.run = lambda args: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "from featcache.cli.main import main; sys.exit(main(['list']))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, cwd=tmp_path).returncode == 0


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "featcache", "list", "--root", str(tmp_path)]
    run = subprocess.run(command, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_line(tmp_path: Path, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "featcache", "list", "--root", str(tmp_path)]
        environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
        both = subprocess.run(command, env=environment, stdout=full, stderr=full)
    assert (run.returncode, both.returncode) == (2, 2)
    assert run.stderr == (
        "featcache: OSError: standard output: No space left on device; make room there, or name another place\n"
    )


def test_running_out_of_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    import torch

    for greedy in (lambda args: np.empty(2**62, np.uint8), lambda args: torch.empty(2**60, dtype=torch.uint8)):
        monkeypatch.setattr("featcache.cli.list.run", greedy)
        assert main(["list", "--root", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("featcache: MemoryError: out of memory") or "_ArrayMemoryError: out of memory" in said
        assert "lower --batch-size" in said
        assert said.count("\n") == 1
