"""Garbage collection: what is listed and what is kept; nothing is deleted without the flag."""

import os
import time
from pathlib import Path

import pytest
from fakes import TAP, NumpyDataset, NumpyEncoder, TappedEncoder

from featcache import EncodeOptions, encode_dataset, list_stores
from featcache.cli.gc import parse_age
from featcache.cli.main import main
from featcache.errors import FeatcacheError, ImageReadError
from featcache.store import verify
from featcache.store.places import local as atomic
from featcache.store.upkeep.deletion import delete, find_garbage, stores_to_delete

DAY = 86_400.0


def finished(root: Path, seed: int = 0) -> Path:
    return Path(encode_dataset(NumpyDataset(), NumpyEncoder(seed), root=root).store.path)


def unfinished(root: Path) -> Path:
    with pytest.raises(ImageReadError):
        encode_dataset(NumpyDataset(50, broken=[30]), NumpyEncoder(), root=root, options=EncodeOptions(chunk_rows=8))
    [path] = [entry.path for entry in list_stores(root) if not entry.finished]
    return Path(path)


def age(folder: Path, seconds: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def every_file(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def test_old_unfinished_stores_are_collected(tmp_path: Path) -> None:
    kept, old = finished(tmp_path), unfinished(tmp_path)
    assert find_garbage(tmp_path, 7 * DAY) == []
    age(old, 8 * DAY)
    age(kept, 800 * DAY)
    [item] = find_garbage(tmp_path, 7 * DAY)
    assert (item.path, item.why) == (old, "unfinished")
    delete(item)
    assert not old.exists()
    assert verify(kept, deep=True).ok


def test_stray_files_are_collected_but_not_damaged_stores_or_other_versions(tmp_path: Path) -> None:
    damaged, newer = finished(tmp_path, 1), finished(tmp_path, 2)
    (damaged / "manifest.json").write_text("{")
    manifest = newer / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    stray = tmp_path / "images" / ("0" * 24) / ("1" * 24)
    stray.mkdir(parents=True)
    (stray / "notes.txt").write_text("?")
    age(tmp_path, 8 * DAY)
    found = {item.path: item.why for item in find_garbage(tmp_path, 7 * DAY)}
    assert found == {stray: "holds no store"}  # the chunks of a store with a damaged manifest may be whole


def test_leftovers_of_killed_processes_are_collected_without_the_store(tmp_path: Path) -> None:
    store = finished(tmp_path)
    before = every_file(store)
    dead = f"{atomic.HOST}-999999999-abc.partial"
    alive = f"{atomic.HOST}-{os.getpid()}-abc.partial"
    (store / "claims").mkdir(exist_ok=True)
    for name in (f"features/c/0/0.{dead}", f"features/c/0/0.{alive}", "claims/3"):
        (store / name).write_bytes(b"left")
    os.utime(store / "claims/3", (time.time() - 1000,) * 2)
    [item] = find_garbage(tmp_path, 0.0)
    assert sorted(item.names) == ["claims/3", f"features/c/0/0.{dead}"]
    delete(item)
    assert every_file(store) == before | {store / f"features/c/0/0.{alive}"}
    assert verify(store, deep=True).ok


def test_temporary_files_of_other_hosts_are_leftovers_after_a_day_only(tmp_path: Path) -> None:
    store = finished(tmp_path)
    fresh, old = (store / f"features/c/0/0.0123abcd-{pid}-abc.partial" for pid in (1, 2))
    for path in (fresh, old):
        path.write_bytes(b"left")
    os.utime(old, (time.time() - atomic.MAX_AGE - 60,) * 2)
    [item] = find_garbage(tmp_path, 0.0)
    assert item.names == (str(old.relative_to(store)),)
    atomic.sweep_partials(store)
    assert fresh.exists()
    assert not old.exists()


def test_leftovers_of_a_killed_unpack_are_collected(tmp_path: Path) -> None:
    store = finished(tmp_path)
    before = every_file(tmp_path)
    for process in (999999999, os.getpid()):
        partial = tmp_path / f"0123abcd.{atomic.HOST}-{process}-0123abcd.partial/key/key/features"
        partial.mkdir(parents=True)
        (partial / "0").write_bytes(b"left")
    [item] = find_garbage(tmp_path, 0.0)
    assert (item.why, item.nbytes) == ("left by a killed unpack", 4)
    delete(item)
    assert not Path(str(item.path)).exists()
    assert every_file(tmp_path) == before | {partial / "0"}
    assert verify(store, deep=True).ok


def test_the_last_leftover_does_not_take_the_root_along(tmp_path: Path) -> None:
    partial = tmp_path / f"0123abcd.{atomic.HOST}-999999999-0123abcd.partial"
    partial.mkdir()
    (partial / "0").write_bytes(b"left")
    [item] = find_garbage(tmp_path, 0.0)
    delete(item)
    assert list(tmp_path.iterdir()) == []


def test_deleting_what_another_process_has_just_deleted_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "images" / "encoder" / "data"
    path.mkdir(parents=True)
    for item in stores_to_delete([path], tmp_path):
        delete(item)
    assert not path.exists()


def test_a_finished_store_is_deleted_only_by_name_manifest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = finished(tmp_path, 1), finished(tmp_path, 2)
    age(tmp_path, 800 * DAY)
    assert find_garbage(tmp_path, 0.0) == []
    [item] = find_garbage(tmp_path, 7 * DAY, [two])
    removed: list[str] = []
    real = atomic.remove

    def remove(path: Path) -> None:
        removed.append(path.name)
        real(path)

    monkeypatch.setattr(atomic, "remove", remove)
    delete(item)
    assert removed[0] == "manifest.json"
    assert not two.parent.exists()
    assert verify(one, deep=True).ok


def test_gc_deletes_only_with_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    old = unfinished(tmp_path)
    before = every_file(tmp_path)
    assert main(["gc", "--root", str(tmp_path), "--older-than", "0s"]) == 0
    said = capsys.readouterr().out
    assert f"{old}: unfinished" in said
    assert "nothing deleted: run again with --delete" in said
    assert every_file(tmp_path) == before
    assert main(["gc", "fake/train@numpy", "--root", str(tmp_path), "--older-than", "0s", "--delete"]) == 0
    assert every_file(tmp_path) == set()
    assert main(["gc", "--root", str(tmp_path)]) == 0
    assert "nothing to collect" in capsys.readouterr().out


def test_the_listing_shows_size_age_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    age(finished(tmp_path), 3 * DAY)
    assert main(["list", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "fake/train@numpy" in said
    assert "40 x 16" in said
    assert "3 days" in said


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1w", "1.5h"])
def test_invalid_ages_are_refused(text: str) -> None:
    with pytest.raises(FeatcacheError, match="expected a number with s, m, h or d"):
        parse_age(text)


def test_only_an_unfinished_tap_is_collected(tmp_path: Path) -> None:
    options = EncodeOptions(taps=[TAP])
    path = Path(encode_dataset(NumpyDataset(), TappedEncoder(), root=tmp_path, options=options).store.path)
    (path / f"tap-{TAP}" / "manifest.json").unlink()
    assert find_garbage(tmp_path, 7 * DAY) == []
    age(path, 8 * DAY)
    [item] = find_garbage(tmp_path, 7 * DAY)
    assert (item.path, item.why) == (path / f"tap-{TAP}", "unfinished tap or view")
    delete(item)
    assert not (path / f"tap-{TAP}").exists()
    assert verify(path, deep=True).ok
    assert encode_dataset(NumpyDataset(), TappedEncoder(), root=tmp_path, options=options).store.tap(TAP).dim == 24
