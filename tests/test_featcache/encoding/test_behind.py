"""The writer thread: in order, bounded, and with errors that reach the caller."""

import signal
import threading
import time
from pathlib import Path

import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset
from featcache.encoding.pipeline import MOST_WAITING, Behind
from featcache.errors import StoreWriteError
from featcache.store import StoreWriter
from featcache.store.places import local

OPTIONS = EncodeOptions(chunk_rows=4, batch_size=4, workers=1)


def encode_fake(root: Path, encoder: NumpyEncoder | None = None) -> Path:
    return Path(encode_dataset(NumpyDataset(40), encoder or NumpyEncoder(), root=root, options=OPTIONS).store.path)


def test_chunks_are_written_by_another_thread_than_the_one_that_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, plain = set(), StoreWriter.write_chunk

    def write_chunk(self, *args):
        writers.add(threading.current_thread().name)
        return plain(self, *args)

    monkeypatch.setattr(StoreWriter, "write_chunk", write_chunk)
    encode_fake(tmp_path)
    assert writers == {"featcache-writer_0"}


def test_a_full_disk_stops_the_run_within_a_few_chunks_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = local._write

    def full(path: Path, content: bytes, update: local.Update | None) -> None:
        if "features" in str(path) and path.parent.name == "2":
            raise OSError(28, "No space left on device")
        plain(path, content, update)

    monkeypatch.setattr(local, "_write", full)
    encoder = NumpyEncoder()
    with pytest.raises(StoreWriteError, match=r"cannot write .*/features/c/2/0: No space left on device"):
        encode_fake(tmp_path, encoder)
    assert encoder.images < 40
    monkeypatch.setattr(local, "_write", plain)
    again = NumpyEncoder()
    encode_fake(tmp_path, again)
    assert again.images <= 32  # the two chunks before stay, as may those after


def test_an_interrupt_keeps_every_encoded_chunk(tmp_path: Path) -> None:
    class Interrupted(NumpyEncoder):
        def encode_images(self, images):
            if self.images >= 20:
                raise KeyboardInterrupt
            return super().encode_images(images)

    with pytest.raises(KeyboardInterrupt) as stopped:
        encode_fake(tmp_path, Interrupted())
    assert "20 of 40 rows are kept" in stopped.value.__notes__[0]
    again = NumpyEncoder()
    encode_fake(tmp_path, again)
    assert again.images == 20


def test_the_number_of_waiting_calls_is_bounded() -> None:
    go_on = threading.Event()
    with Behind() as behind:
        for _ in range(MOST_WAITING):
            behind.call(go_on.wait)
        third = threading.Thread(target=behind.call, args=[go_on.wait])
        third.start()
        third.join(0.05)
        assert third.is_alive()
        go_on.set()
        third.join()


def test_submitted_calls_finish_if_the_block_raises() -> None:
    done: list[int] = []
    behind = Behind()
    behind.call(done.append, 1)
    behind.__exit__(ValueError, ValueError("of the block"), None)
    assert done == [1]


def test_an_error_of_the_last_call_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.call(lambda: 1 // 0)


def test_a_signal_does_not_cut_off_the_last_calls() -> None:
    """Python up to 3.12 marks a thread as ended where a signal interrupts its `join`, and ends while it writes."""
    interrupted = threading.Event()
    done: list[int] = []

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def work(number: int) -> None:
        interrupted.wait(30)
        time.sleep(0.1)
        done.append(number)

    def interrupted_at_its_end() -> None:
        with Behind() as behind:
            for number in range(2):
                behind.call(work, number)
            signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_at_its_end()
        assert done == [0, 1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
