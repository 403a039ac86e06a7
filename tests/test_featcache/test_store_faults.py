"""Stopping the process anywhere loses nothing: after every step of the write protocol, and by SIGKILL at random."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featcache import EncodeOptions, encode_dataset
from featcache.store import atomic, verify
from fakes import NumpyDataset, NumpyEncoder

ROWS, CHUNK_ROWS = 36, 4  # nine chunks
NOT_DATA = {"provenance.json"}  # says when and by whom; everything else is bit-identical


def encode_fake(root: Path) -> Path:
    options = EncodeOptions(chunk_rows=CHUNK_ROWS, batch_size=3, workers=1)
    return encode_dataset(NumpyDataset(ROWS, broken=[5]), NumpyEncoder(), root=root, options=_allow(options)).store.path


def _allow(options: EncodeOptions) -> EncodeOptions:
    return EncodeOptions(**{**options.__dict__, "max_bad": 1})


def contents(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file() and path.name not in NOT_DATA)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(encode_fake(tmp_path_factory.mktemp("whole")))


def count_steps(root: Path) -> int:
    steps = []
    atomic.after_step, before = steps.append, atomic.after_step
    try:
        encode_fake(root)
    finally:
        atomic.after_step = before
    return len(steps)


def run_and_die_after(step: int, root: Path) -> int:
    """Encode in a child that stops dead after that many steps of the protocol; returns its exit status."""
    child = os.fork()
    if child == 0:
        steps = 0

        def stop(_: str) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                os._exit(9)

        atomic.after_step = stop
        try:
            encode_fake(root)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_stop_after_every_single_step_is_recovered_bit_by_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    total = count_steps(tmp_path / "count")
    assert total > 9 * 5 * 6  # chunks x (arrays + marker) x steps of a put
    for step in range(1, total + 1):
        root = tmp_path / f"step{step}"
        assert run_and_die_after(step, root) == 9
        assert contents(encode_fake(root)) == undisturbed, f"differs after a stop at step {step} of {total}"


SLOW_ENCODE = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from featcache.store import atomic
from test_store_faults import encode_fake
atomic.after_step = lambda step: time.sleep(0.002)
print("ready", flush=True)
encode_fake(Path(sys.argv[1]))
"""


def test_five_kills_at_random_are_recovered_bit_by_bit(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    here = Path(__file__).parent
    script = SLOW_ENCODE.format(paths=[str(here), str(here.parent)])
    chance = random.Random(7)
    killed = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert killed == 5
    store = encode_fake(tmp_path)
    assert contents(store) == undisturbed
    assert verify(store, deep=True).ok
