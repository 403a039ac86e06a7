"""The write protocol on a disk that loses power, and on an object store whose requests go wrong, at every point.

The rule: a reader gets the right rows or an error of ours; the same command again finishes the store; what a finished
run has returned outlives a power cut.
"""

import random
from contextlib import suppress

import pytest
from crashes import ROOT, Bucket, BucketPath, Disk, DiskPath, Job, is_right, recorded, running_on, state

from featcache.errors import FeatcacheError, StoreIncompleteError
from featcache.store import repair, verify
from featcache.store.reading import checks

FAULTS = ("failed", "lost", "repeated", "delayed")


def reads_right(job: Job, versions: int = 1) -> bool:
    """Whether a reader gets the right rows; False for one of our errors."""
    checks.forget()
    try:
        store = job.open()
        assert is_right(store, versions)
    except FeatcacheError:
        return False
    return True


def survives(disk: Disk, *, finished: bool) -> None:
    with running_on(disk):
        job = Job(DiskPath(disk, ROOT))
        readable = reads_right(job)
        assert readable or not finished, "a finished store is lost"
        job.result()
        assert reads_right(Job(DiskPath(disk, ROOT)))


def power_cuts(n: int, seed: int) -> int:
    """Power cuts at every point of the log in turn, `n` in all; returns how many left a readable store."""
    whole, chance, finished = recorded(), random.Random(seed), 0
    for number in range(n):
        length = number % (len(whole.log) + 1)
        disk = state(whole.log, length, chance)
        try:
            survives(disk, finished=length == len(whole.log))
        except AssertionError as error:
            raise AssertionError(f"power cut {number} behind entry {length} of {len(whole.log)}: {error}") from error
        finished += length == len(whole.log)
    return finished


def test_the_log_is_that_of_the_protocol() -> None:
    log = recorded().log
    kinds = {entry[0] for entry in log}
    assert kinds == {"name", "write", "sync file", "sync folder", "move", "remove"}
    moved = [entry[2].name for entry in log if entry[0] == "move"]
    assert moved.index("000000.json") > moved.index("0")  # the marker follows its chunks
    named = [entry[1].name for entry in log if entry[0] == "name"]
    assert named.index("manifest.json") > max(
        place for place, name in enumerate(named) if name.startswith("000002.json")
    )


def test_a_power_cut_at_any_point_loses_no_finished_store_and_shows_no_wrong_row() -> None:
    assert power_cuts(400, seed=1) >= 1


def test_names_that_are_not_synced_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test can fail: without syncing folders, a finished store is lost."""
    from featcache.store.places import local

    monkeypatch.setattr(local, "sync_folder", lambda folder: None)
    whole, chance = recorded(), random.Random(0)
    disks = [state(whole.log, len(whole.log), chance) for _ in range(20)]

    def survive() -> None:
        for disk in disks:
            survives(disk, finished=True)

    with pytest.raises(AssertionError, match="a finished store is lost"):
        survive()


@pytest.mark.nightly
def test_ten_thousand_power_cuts() -> None:
    finished = power_cuts(10_000, seed=2)
    print(f"10,000 power cuts, {finished} behind the end of the run, 0 inconsistent")


def faulty_run(at: int, fault: str, delay: int, *, drifts: bool) -> None:
    """Run until one run finishes, with a fault at request `at`; late requests arrive in between or at the end."""
    bucket = Bucket(at, fault, delay)
    root = BucketPath(bucket, ROOT)
    with running_on(None):
        for version in range(4):
            try:
                Job(root, version if drifts else 0).result()
            except (FeatcacheError, OSError):
                reads_right(Job(root), versions=4)
                continue
            break
        else:
            raise AssertionError("no run finished")
        assert reads_right(Job(root), versions=4) or fault == "delayed"
        bucket.land()
        if not reads_right(Job(root), versions=4):  # a late chunk of another version, or a late removal of the manifest
            with suppress(StoreIncompleteError):
                repair(verify(Job(root).path, deep=True))
            Job(root).run()
        assert reads_right(Job(root), versions=4)


def faults(n: int, seed: int) -> int:
    """Faults at every request in turn, `n` in all; returns the number of requests of a run."""
    bucket, chance = Bucket(), random.Random(seed)
    with running_on(None):
        Job(BucketPath(bucket, ROOT)).result()
    for number in range(n):
        at, fault = number % bucket.requests, FAULTS[(number // bucket.requests) % len(FAULTS)]
        delay, drifts = chance.randrange(1, 2 * bucket.requests), chance.random() < 0.5
        try:
            faulty_run(at, fault, delay, drifts=drifts)
        except AssertionError as error:
            raise AssertionError(f"request {at} {fault}, {delay} later, drifts {drifts}: {error}") from error
    return bucket.requests


def test_a_request_that_fails_at_any_point_shows_no_wrong_row() -> None:
    assert faults(300, seed=1) > 50


@pytest.mark.nightly
def test_five_thousand_failing_requests() -> None:
    print(f"5,000 faults over {faults(5_000, seed=2)} requests a run, 0 inconsistent")
