"""A killed run loses nothing: stopped after every step of the write protocol, and by SIGKILL at random moments."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset
from featcache.store import verify
from featcache.store.places import local as atomic

CHUNKS, CHUNK_ROWS = 8, 4
HERE = Path(__file__)
PATHS = os.pathsep.join(map(str, (HERE.parent, HERE.parents[2], HERE.parents[3])))  # tests, then this checkout
NOT_DATA = {"provenance.json"}  # when and how it was made; everything else is bit-identical


def encode_fake(root: Path, chunks: int = CHUNKS) -> Path:
    """Encode rows into that many chunks, the last of which is short."""
    options = EncodeOptions(chunk_rows=CHUNK_ROWS, batch_size=3, workers=1, max_bad=1)
    data = NumpyDataset(chunks * CHUNK_ROWS - 1, broken=[5])
    return Path(encode_dataset(data, NumpyEncoder(), root=root, options=options).store.path)


def contents(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file() and path.name not in NOT_DATA)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(encode_fake(tmp_path_factory.mktemp("whole")))


def count_steps(root: Path, chunks: int) -> int:
    steps: list[str] = []
    atomic.after_step, before = steps.append, atomic.after_step
    try:
        encode_fake(root, chunks)
    finally:
        atomic.after_step = before
    return len(steps)


def run_and_die_after(step: int, root: Path, chunks: int) -> int:
    """Encode in a child process that ends abruptly after that many steps of the protocol; returns its exit status."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)  # counted without a gap by the two threads of a writer

        def stop(_: str) -> None:
            if next(steps) == step:
                os._exit(9)

        atomic.after_step = stop
        try:
            encode_fake(root, chunks)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory if there is one, for hundreds of runs that each sync a hundred files."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def stop_after_every_step(root: Path, chunks: int) -> None:
    """The whole sweep."""
    undisturbed = contents(encode_fake(root / "whole", chunks))
    total = count_steps(root / "count", chunks)
    assert total > chunks * 5 * 6  # chunks x (arrays + marker) x steps of a put
    for step in range(1, total + 1):
        folder = root / f"step{step}"
        assert run_and_die_after(step, folder, chunks) == 9
        assert contents(encode_fake(folder, chunks)) == undisturbed, f"differs after a stop at step {step} of {total}"
        shutil.rmtree(folder)
    print(f"{total} steps")


def kill_at_random(root: Path, kills: int) -> None:
    """SIGKILL that many forked runs, each once it has begun, after a random time; none may have finished."""
    chance = random.Random(7)
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            atomic.after_step = lambda step: time.sleep(0.002)
            os.write(writing, b"ready")
            try:
                encode_fake(root)
            finally:
                os._exit(0)
        os.read(reading, 5)
        time.sleep(chance.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading)
        os.close(writing)


def in_an_interpreter(task: str, folder: Path, number: int) -> str:
    """What a function of this file prints in an interpreter of its own, for forking a test runner is slow."""
    command = [sys.executable, __file__, task, str(folder), str(number)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("chunks", [4, pytest.param(CHUNKS, marks=pytest.mark.nightly)])
def test_a_stop_after_every_single_step_is_recovered_bit_by_bit(memory: Path, chunks: int) -> None:
    assert int(in_an_interpreter("stops", memory, chunks).split()[0]) > chunks * 5 * 6


def test_five_kills_at_random_are_recovered_bit_by_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    in_an_interpreter("kills", tmp_path, 5)
    store = encode_fake(tmp_path)
    assert contents(store) == undisturbed
    assert verify(store, deep=True).ok


if __name__ == "__main__":
    {"stops": stop_after_every_step, "kills": kill_at_random}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
