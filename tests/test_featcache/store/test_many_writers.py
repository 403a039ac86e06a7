"""Many writers of one store: ranks, shards and independent processes share chunks, are killed, and restart."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder, projected

from featcache import EncodeOptions, encode_dataset
from featcache.encoding.chunks import normalise
from featcache.encoding.options import Share
from featcache.encoding.store_job import FINISH
from featcache.errors import FeatcacheError, MismatchError, ShardDoneError, StoreIncompleteError, StoreSchemaError
from featcache.store import ImageStore, StoreWriter, claims, open_store, places, verify
from featcache.store.claims import STALE_SECONDS, Claims
from featcache.store.layout import ArraySpec
from featcache.store.manifest import Marker
from featcache.store.places import create, put
from featcache.store.places import local as atomic
from featcache.store.upkeep.deletion import Garbage, delete, stores_to_delete

ROWS, CHUNK_ROWS = 95, 4
HERE = Path(__file__)
PATHS = os.pathsep.join(map(str, (HERE.parent, HERE.parents[2], HERE.parents[3])))  # tests, then this checkout
NOT_DATA = {"provenance.json"}


def encode(root: Path, share: Share | None = None, encoder: NumpyEncoder | None = None, n: int = ROWS) -> ImageStore:
    options = EncodeOptions(chunk_rows=CHUNK_ROWS, batch_size=3, workers=1, max_bad=1, share=share)
    dataset = NumpyDataset(n, broken=[5])
    return encode_dataset(dataset, encoder or NumpyEncoder(), root=root, options=options).store


def contents(store: Path) -> dict[str, bytes]:
    files = (path for path in Path(store).rglob("*") if path.is_file() and path.name not in NOT_DATA)
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(encode(tmp_path_factory.mktemp("whole")).path)


def test_shards_cover_every_chunk_once() -> None:
    for count in (1, 2, 3, 7):
        parts = [Share(index, count, only=True).order(range(20)) for index in range(count)]
        assert sorted(chunk for part in parts for chunk in part) == list(range(20))
        for index in range(count):
            assert sorted(Share(index, count).order(range(20))) == list(range(20))
            assert Share(index, count).order(range(20))[: len(parts[index])] == parts[index]


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "1/0", "1/2/3", ""])
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(FeatcacheError, match="expected"):
        Share.parse(text)


def test_the_rank_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Share.from_environment() == Share(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Share.from_environment() == Share(2, 4)


def test_shards_encode_their_chunks_and_the_last_one_finishes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    encoders = [NumpyEncoder() for _ in range(3)]
    for index in (2, 0):
        with pytest.raises(
            ShardDoneError, match=rf"shard {index}/3 is done; \d+ of 24 chunks are done by others or not"
        ):
            encode(tmp_path, Share(index, 3, only=True), encoders[index])
    store = encode(tmp_path, Share(1, 3, only=True), encoders[1])
    assert contents(store.path) == undisturbed
    assert [encoder.images for encoder in encoders] == [32, 31, 31]  # row 5 is broken, the last chunk is short


def test_one_rank_finishes_what_the_others_left(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert contents(encode(tmp_path, Share(3, 4)).path) == undisturbed


def run(root: Path, code: str = "", **environment: str) -> "subprocess.Popen[bytes]":
    """A process that encodes once a byte arrives on its standard input."""
    script = f"""
import sys, time
from pathlib import Path
from featcache.store.places import local as atomic
from test_many_writers import *
{code}
print("ready", flush=True)
sys.stdin.read(1)
try:
    encode(Path({str(root)!r}))
except ShardDoneError:
    pass
"""
    env = os.environ | {"PYTHONPATH": PATHS, "FEATCACHE_FSYNC": "0"} | environment
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    return process


def start(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b".")
        process.stdin.flush()


def finish(process: "subprocess.Popen[bytes]") -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


def test_independent_writers_share_the_work_and_both_find_the_store(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    slow = "import fakes\nplain = NumpyEncoder.encode_images\n"
    slow += "NumpyEncoder.encode_images = lambda self, images: (time.sleep(0.05), plain(self, images))[1]\n"
    slow += "import atexit, featcache.encoding.store_job as job\nrows = []\nmake_share = job.StoreJob.make_share\n"
    slow += "job.StoreJob.make_share = lambda *a: (rows.append(make_share(*a)), rows[-1])[1]\n"
    slow += "atexit.register(lambda: print(sum(rows)))\n"
    pair = [run(tmp_path, slow) for _ in range(2)]
    start(pair)
    done = []
    for process in pair:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        done.append(int(output))
    assert contents(next(tmp_path.glob("images/*/*"))) == undisturbed
    assert min(done) > ROWS // 4
    assert sum(done) <= ROWS + 2 * CHUNK_ROWS  # no work twice, but for a claim released at the wrong moment


def kill_and_restart(root: Path, kills: int, seed: int) -> int:
    """Start a changing number of ranks and kill each at a random moment, until `kills` were; returns how many."""
    chance, killed = random.Random(seed), 0
    slow = "atomic.after_step = lambda step: time.sleep(0.002)"
    while killed < kills:
        world = chance.choice([1, 2, 3, 4])
        ranks = [run(root, slow, RANK=str(rank), WORLD_SIZE=str(world)) for rank in range(world)]
        start(ranks)
        for rank in chance.sample(ranks, world):
            time.sleep(chance.uniform(0.0, 0.15))
            rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.communicate()
            killed += rank.returncode == -signal.SIGKILL
        finished = list(root.glob("images/*/*/manifest.json"))
        if finished:  # start over, half way: some chunks stay
            finished[0].unlink()
            for marker in finished[0].parent.glob("done/*[02468].json"):
                marker.unlink()
    return killed


def check_chaos(root: Path, undisturbed: dict[str, bytes]) -> None:
    for store in root.glob("images/*/*"):
        for path in store.glob("done/*.json"):
            content = Marker.from_bytes(
                path.read_bytes(),
                int(path.stem),
                {"features", "norm", "valid", "content"},
                range(4 * int(path.stem), min(ROWS, 4 * int(path.stem) + 4)),
            )
            assert content is not None  # a marker is complete, or there is none
    made = encode(root)
    assert {name: text for name, text in contents(Path(made.path)).items() if "partial" not in name} == undisturbed
    features, _ = made.numpy()
    expected = np.delete(projected(NumpyDataset(ROWS), NumpyEncoder()), 5, axis=0)
    assert np.abs(features - expected).max() <= 2.0**-11
    assert verify(made.path, deep=True).ok


def test_killed_ranks_restarted_in_another_number_lose_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert kill_and_restart(tmp_path, 5, seed=1) >= 5
    check_chaos(tmp_path, undisturbed)


@pytest.mark.nightly
def test_a_hundred_kills_lose_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert kill_and_restart(tmp_path, 100, seed=2) >= 100
    check_chaos(tmp_path, undisturbed)


def test_a_process_of_another_container_is_not_taken_for_dead() -> None:
    """Containers that share the network have one hardware address, and each its own process ids."""
    code = f"from featcache.store.places.local import is_alive; print(is_alive('{atomic.owner()}'))"
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    if subprocess.run([*inside[:6], "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a namespace of process ids")
    run = subprocess.run(inside, env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"


def test_claims_are_exclusive_until_they_expire(tmp_path: Path) -> None:
    now = [time.time()]
    mine, yours = Claims(tmp_path, lambda: now[0]), Claims(tmp_path, lambda: now[0])
    assert mine.take(3)
    assert not yours.take(3)
    assert yours.take(4)
    mine.release(3)
    assert yours.take(3)
    assert not mine.take(3)
    assert mine.waited_for().startswith(f"waiting for chunk 3, claimed by {atomic.HOST}-{os.getpid()}-")
    now[0] += STALE_SECONDS + 5
    assert mine.take(3)
    put(tmp_path / "claims" / "7", f"{atomic.HOST}-999999999-x".encode())  # no such process
    now[0] = time.time()
    assert mine.take(7)
    put(tmp_path / "claims" / "8", b"another host-1")
    assert not mine.take(8)
    mine.release_all()
    yours.clear()
    assert not list((tmp_path / "claims").iterdir())


def test_two_writers_in_one_process_claim_and_release_concurrently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, yours = Claims(tmp_path), Claims(tmp_path)
    assert mine.take(0)

    def given_back_meanwhile(path: Path, content: bytes) -> bool:
        mine.release(0)
        return False

    monkeypatch.setattr(claims, "create", given_back_meanwhile)
    monkeypatch.setattr(Claims, "_is_stale", lambda self, path: False)
    assert not yours.take(0)


def test_an_interrupt_leaves_no_claim_of_a_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, yours = Claims(tmp_path), Claims(tmp_path)

    def step(what: str) -> None:
        if what == interrupted:
            raise KeyboardInterrupt

    for interrupted in ("rename", "sync folder"):  # the file is there by then
        monkeypatch.setattr(atomic, "after_step", step)
        with pytest.raises(KeyboardInterrupt):
            mine.take(interrupted)
        monkeypatch.setattr(atomic, "after_step", lambda step: None)
        assert yours.take(interrupted)
    assert all(mine.take(chunk) for chunk in range(3))
    interrupted = "remove"
    monkeypatch.setattr(atomic, "after_step", step)
    with pytest.raises(KeyboardInterrupt):
        mine.release_all()
    monkeypatch.setattr(atomic, "after_step", lambda step: None)
    assert all(yours.take(chunk) for chunk in range(3))


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_claim_of_a_host_whose_clock_is_wrong_is_waited_for_two_minutes_at_most(tmp_path: Path, hours: int) -> None:
    now = [1000.0]
    mine, claim = Claims(tmp_path, lambda: now[0]), tmp_path / "claims" / "8"
    put(claim, b"another-1-ab")
    os.utime(claim, (time.time() + 3600 * hours,) * 2)
    if hours >= 0:  # an hour behind looks like a dead writer: two writers of a chunk are harmless
        assert not mine.take(8)
        assert (
            mine.waited_for()
            == "waiting for chunk 8, claimed by another-1-ab; taken over in 120 s unless it is renewed"
        )
        now[0] += STALE_SECONDS - 1
        assert not mine.take(8)
        os.utime(claim, (time.time() + 3600 * hours + 20,) * 2)  # renewed
        now[0] += 2
        assert not mine.take(8)
        now[0] += STALE_SECONDS + 1
    assert mine.take(8)
    assert mine.waited_for() == ""


def test_a_retried_claim_is_recognised_as_our_own(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    assert mine.take(1)
    assert mine.take(1)
    assert not Claims(tmp_path).take(1)


def test_leftovers_of_dead_writers_are_deleted_by_the_next_run(tmp_path: Path) -> None:
    options = EncodeOptions(max_bad=1)
    store = Path(encode_dataset(NumpyDataset(9), NumpyEncoder(), root=tmp_path, options=options).store.path)
    before = contents(store)
    dead = f"{atomic.HOST}-999999999-abc"
    put(store / "claims" / "3", dead.encode())
    put(store / "claims" / "finish", b"another-1-ab")  # perhaps alive
    (store / "features" / f"x.{dead}.partial").write_bytes(b"half")
    assert encode_dataset(NumpyDataset(9), NumpyEncoder(), root=tmp_path, options=options).hit
    assert contents(store) == before | {"claims/finish": b"another-1-ab"}


def test_a_renewed_claim_does_not_expire(tmp_path: Path) -> None:
    now = [time.time()]
    mine = Claims(tmp_path, lambda: now[0])
    mine.take(1)
    os.utime(tmp_path / "claims" / "1", (now[0] - 1000, now[0] - 1000))
    now[0] += 21
    mine.renew()
    assert not Claims(tmp_path, lambda: now[0]).take(1)


def test_two_runs_that_begin_at_once_agree_on_the_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run creates the store between this run's look at it and its own creation."""
    import featcache.encoding.store_job as store_job

    real = store_job.begun_chunk_rows
    raced: list[bool] = []

    def look(path: Path, default: int) -> int:
        found = real(path, default)
        if found == default and not raced:
            raced.append(True)
            with pytest.raises(ShardDoneError):
                encode(tmp_path, Share(0, 30, only=True))
        return found

    monkeypatch.setattr(store_job, "begun_chunk_rows", look)
    options = EncodeOptions(chunk_rows=16, max_bad=1)
    store = encode_dataset(NumpyDataset(ROWS, broken=[5]), NumpyEncoder(), root=tmp_path, options=options).store
    assert store.manifest.arrays["features"].chunk_rows == CHUNK_ROWS
    assert raced


class Moody(NumpyEncoder):
    """An encoder that gives other last bits in every run, as on a GPU."""

    def __init__(self, mood: float) -> None:
        super().__init__()
        self.mood = np.float32(1 + mood)

    def encode_images(self, images: object) -> np.ndarray:
        return super().encode_images(images) + self.mood


def unit_rows(encoder: Moody) -> np.ndarray:
    return normalise(encoder.encode_images(list(NumpyDataset(ROWS).pixels)))[0]


def test_a_late_writer_of_other_bytes_invalidates_the_manifest(tmp_path: Path) -> None:
    """B looks before A finishes the store, and writes its chunk afterwards: the store is right at all times."""
    late: list[int] = []
    real = StoreWriter.marker

    def marker(self: StoreWriter, chunk: int) -> Marker | None:
        if chunk == 7 and len(late) < 2:
            late.append(chunk)
            if len(late) == 2:  # B is about to write
                late.append(chunk)
                patch.setattr(StoreWriter, "marker", real)
                whole = encode(tmp_path, encoder=Moody(0))  # A does the rest and finishes
                assert verify(whole.path, deep=True).ok
            return None  # what B saw a moment ago
        return real(self, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "marker", marker)
        patch.setattr(Claims, "take", lambda self, what: True)
        store = encode(tmp_path, encoder=Moody(0.01))
    assert len(late) == 3
    assert verify(store.path, deep=True).ok
    moods = [unit_rows(Moody(mood)).astype(np.float16)[7 * CHUNK_ROWS : 8 * CHUNK_ROWS] for mood in (0, 0.01)]
    found = store.gather(np.arange(7 * CHUNK_ROWS, 8 * CHUNK_ROWS))
    assert not np.array_equal(moods[0], moods[1])
    np.testing.assert_array_equal(found, moods[1])  # the last one to write it


def test_an_overtaken_finaliser_removes_its_manifest(tmp_path: Path) -> None:
    real = places.create
    raced: list[bool] = []

    def overtaken(path: Path, content: bytes) -> bool:
        done = real(path, content)
        if path.name == "manifest.json" and not raced:
            raced.append(True)
            (path.parent / "done" / "000002.json").unlink()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "create", overtaken)
        store = encode(tmp_path)
    assert raced
    assert verify(store.path, deep=True).ok
    assert len(list(Path(store.path).glob("done/*.json"))) == -(-ROWS // CHUNK_ROWS)


@pytest.mark.parametrize("moment", ["drop_damaged", "clear", "_manifest_agrees"])
def test_a_store_deleted_while_it_is_encoded_is_whole_in_the_end(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """`featcache rm` in another terminal lists the files before the manifest is there, and deletes them at `moment`."""
    kind = Claims if moment == "clear" else StoreWriter
    real, put_rows, take = getattr(kind, moment), StoreWriter._put_rows, Claims.take
    listed, tries = list[list[Garbage]](), list[object]()

    def put(self: StoreWriter, spec: ArraySpec, *values: Any) -> str:
        written = put_rows(self, spec, *values)
        if spec.name == "labels":
            listed[:] = listed or [stores_to_delete([self.store], tmp_path)]
        return written

    def taken(self: Claims, what: int | str) -> bool:
        if what == FINISH:
            tries.append(what)
            assert len(tries) < 5, "it would never end"
        return take(self, what)

    def deleting(self: Any, *values: Any) -> Any:
        if moment == "drop_damaged" and not listed:
            listed.append(stores_to_delete([self.store], tmp_path))
        while listed and listed[0]:
            delete(listed[0].pop())
        return real(self, *values)

    monkeypatch.setattr(Claims, "take", taken)
    monkeypatch.setattr(StoreWriter, "_put_rows", put)
    monkeypatch.setattr(kind, moment, deleting)
    store = encode(tmp_path)
    assert listed == [[]]
    assert contents(store.path) == undisturbed


def test_a_store_whose_labels_are_deleted_as_it_is_finished_is_finished_again(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, agrees, tries = Claims.take, StoreWriter._manifest_agrees, list[object]()

    def taken(self: Claims, what: int | str) -> bool:
        tries.extend([what] if what == FINISH else [])
        assert len(tries) < 5, "it would never end"
        return take(self, what)

    def deleting(self: StoreWriter, *values: Any) -> bool:
        if len(tries) == 1:
            (Path(self.store) / "labels/c/0").unlink()
        return agrees(self, *values)

    monkeypatch.setattr(Claims, "take", taken)
    monkeypatch.setattr(StoreWriter, "_manifest_agrees", deleting)
    assert contents(encode(tmp_path).path) == undisturbed


def test_a_store_of_another_schema_is_left_alone(tmp_path: Path) -> None:
    store = encode(tmp_path)
    manifest = Path(store.path) / "manifest.json"
    newer = manifest.read_bytes().replace(b'"schema": 1', b'"schema": 2')
    manifest.write_bytes(newer)
    with pytest.raises(StoreSchemaError, match="store schema 2, this featcache reads schema 1"):
        encode(tmp_path)
    assert manifest.read_bytes() == newer
    manifest.unlink()
    header = Path(store.path) / "zarr.json"
    header.write_bytes(header.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    before = contents(store.path)
    with pytest.raises(StoreSchemaError, match="store schema 2"):
        encode(tmp_path)
    assert contents(store.path) == before
    with pytest.raises(StoreIncompleteError):
        open_store(store.path)


def test_a_store_moved_by_hand_is_refused(tmp_path: Path) -> None:
    store = Path(encode(tmp_path).path)
    (store / "manifest.json").unlink()
    other = Path(encode(tmp_path / "other", n=94).path)
    (store / "zarr.json").write_bytes((other / "zarr.json").read_bytes())
    with pytest.raises(MismatchError, match="moved by hand"):
        encode(tmp_path)


def test_create_never_replaces_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert create(tmp_path / "a", b"1")
    assert not create(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links here")))
    assert create(tmp_path / "b", b"3")
    assert not create(tmp_path / "b", b"4")
    assert (tmp_path / "b").read_bytes() == b"3"
    assert not list(tmp_path.glob("*.partial"))
