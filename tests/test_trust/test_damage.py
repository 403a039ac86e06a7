"""The bench of damage: every file damaged in every way, read by every reader.

The rule: the same result as undamaged, or an error of ours that names the file.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from damage import CHANGES, WORLDS, World, damages, encode, plain
from fakes import TAP

from featcache.cli.main import main
from featcache.errors import FeatcacheError, StoreSchemaError
from featcache.store import read_manifest, repair, verify
from featcache.store.layout import same_metadata
from featcache.store.reading import checks

SECONDS = 8.0
"""Cases of each bench in `make test`, drawn at random."""
LONG = float(os.environ.get("FEATCACHE_TEST_SECONDS", 900))
"""Most cases of each world in the nightly tests."""
UNDETECTED = ("names/", "claims/")
"""Empty files that are never read."""

UNREADABLE = ("(damaged)", "(unfinished)", "(other version)")
"""Names of unreadable stores in listings."""

Damaged = tuple[Path, str, bytes | None]


def every_damage(world: World, seed: int = 0) -> Iterator[Damaged]:
    files = world.files()
    for number, file in enumerate(files):
        inside = file.relative_to(world.folder).as_posix()
        others = [world.neighbours.get(inside), files[number - 1].read_bytes()]
        for place, neighbour in enumerate(other for other in others if other is not None):
            for what, content in damages(file.read_bytes(), neighbour, seed + number):
                edited = file.suffix in (".json", ".jsonl") and what.startswith(("bit", *CHANGES))
                if (world.swaps if what == "swapped" else place == 0) and (world.edits or not edited):
                    yield file, what, content


def apply(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    checks.forget()  # times on a disk are too coarse for what happens here in a millisecond


def outcome(world: World, name: str) -> tuple[str, object]:
    """Result of a reader, or its error."""
    try:
        return "returned", plain(world.reads[name]())
    except FeatcacheError as error:
        return "refused", str(error)
    except Exception as error:  # what is looked for
        return "crashed", f"{type(error).__name__}: {error}"


def breaks_the_rule(name: str, file: Path, found: tuple[str, object], sound: tuple[str, object]) -> bool:
    kind, value = found
    if kind == "refused":
        # A store without its manifest is named by its folder; a search by name says how many stores are damaged.
        named = (file.name, str(file.parent), "damaged")
        return not any(text in str(value) for text in named)
    if name == "listed" and kind == "returned":
        return found != sound and not any(
            text in str(value) for text in ("(damaged)", "(unfinished)", "(other version)")
        )
    return found != sound


def run_bench(world: World, seconds: float | None = None) -> tuple[int, Counter[str], list[str]]:
    """Accesses, outcomes and violations: of all cases, or of random ones for some seconds."""
    sound = {name: outcome(world, name) for name in world.reads}
    failed = {name: value for name, (kind, value) in sound.items() if kind != "returned"}
    assert not failed, failed
    cases = [
        (damaged, name)
        for damaged in every_damage(world)
        for name in world.reads
        if damaged[0].relative_to(world.folder).match(world.of.get(name, "*"))
    ]
    if seconds is not None:
        random.Random(time.time_ns()).shuffle(cases)
    else:
        cases.sort(key=lambda case: str(case[0][0]))
    until = time.monotonic() + (seconds or 1e9)
    outcomes: Counter[str] = Counter()
    whole = {path: path.read_bytes() for path in world.files()}
    broken: list[str] = []
    for (file, what, content), name in cases:
        if time.monotonic() > until:
            break
        before = file.read_bytes()
        apply(file, content)
        found = outcome(world, name)
        outcomes[found[0]] += 1
        if breaks_the_rule(name, file, found, sound[name]):
            shown = str(found[1])[:300] if found[0] != "returned" else "another result"
            broken.append(f"{file.relative_to(world.root)}, {what}, read by {name}: {found[0]}: {shown}")
        if name in world.mends:
            for path in set(world.files()) - set(whole):
                path.unlink()
            for path, content in whole.items():
                apply(path, content)
        apply(file, before)
    return sum(outcomes.values()), outcomes, broken


@pytest.mark.parametrize("kind", WORLDS)
def test_damage_changes_nothing_or_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seconds = SECONDS if kind == "images" else SECONDS / 8
    accesses, _, broken = run_bench(WORLDS[kind](tmp_path), seconds)
    assert accesses > 5
    assert not broken, "\n".join(broken)


@pytest.mark.nightly
def test_every_damage_changes_nothing_or_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total, every = 0, list[str]()
    for kind, make in WORLDS.items():
        (tmp_path / kind).mkdir()
        accesses, outcomes, broken = run_bench(make(tmp_path / kind), LONG)
        print(f"{kind}: {accesses:,} accesses, {dict(outcomes)}, {len(broken)} break the rule")
        every += broken
        total += accesses
    print(f"{total:,} accesses, {len(every)} break the rule")
    assert not every, "\n".join(every)
    assert total >= 5_000


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "provenance.json"
    }


def says_the_same(content: bytes | None, before: bytes) -> bool:
    """Whether two JSON files differ only in white space, or in empty fields that some versions of zarr omit."""
    return content is not None and same_metadata(content, before)


def check_repairs(root: Path, seconds: float | None) -> int:
    """Damage a file, verify, repair, encode again: `verify` names it, and the store is what it was.

    Bit for bit, apart from the order of keys in a header that was written again.
    """
    store = encode(root)
    sound = contents(store)
    world = World(root, store, {})
    first = {file: file.read_bytes() for file in world.files()}
    cases = [case for case in every_damage(world) if not case[0].relative_to(store).as_posix().startswith(UNDETECTED)]
    random.Random(time.time_ns()).shuffle(cases)
    until = time.monotonic() + (seconds or 1e9)
    for number, (file, what, content) in enumerate(cases):
        if time.monotonic() > until:
            return number
        before = file.read_bytes()
        if says_the_same(content, first[file]) or (
            file.parts[-3] == f"tap-{TAP}" and what.startswith("altered bad.0.2")
        ):
            continue  # the error text in a marker of a part is not read
        apply(file, content)
        case = f"{file.relative_to(store)}, {what}"
        if what == "altered schema" and file.name == "manifest.json":  # that of another version: left as it is
            with pytest.raises(StoreSchemaError, match="written with store schema 2"):
                read_manifest(file.parent)
            with suppress(StoreSchemaError):
                repair(verify(store, deep=True))
            assert file.read_bytes() == content
            apply(file, before)
        elif file.name == "manifest.json" and content is None:
            assert encode(root) == store, case  # as if it had never been finished
        else:
            report = verify(store, deep=True)
            if file.name != "stamps.bin" or content is not None:  # only a cache, made again
                shown = " ".join(report.problems)
                assert file.name in shown or file.parent.name in shown, f"{case}: {report.problems}"
            repair(report)
        assert encode(root) == store, case
        now = contents(store)
        assert set(now) == set(sound), case
        differ = {name for name in now if now[name] != sound[name] and not says_the_same(now[name], sound[name])}
        assert not differ, f"{case}: {differ}"
        after = verify(store, deep=True)
        assert after.ok, f"{case}: {after.problems}"
    return len(cases)


def test_verify_repair_and_encode_restore_the_same_bytes(tmp_path: Path) -> None:
    assert check_repairs(tmp_path, SECONDS / 2) > 3


@pytest.mark.nightly
def test_no_damage_outlives_repair_and_encode(tmp_path: Path) -> None:
    print(f"{check_repairs(tmp_path, None):,} damages repaired")


def test_repair_alone_restores_what_the_manifest_determines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = encode(tmp_path)
    for name in ("zarr.json", "labels/zarr.json", "done/000002.json", "tap-hidden/done/000000.json", "provenance.json"):
        sound = (store / name).read_bytes()
        (store / name).write_bytes(sound.replace(b"0", b"8", 1) if name != "provenance.json" else b"{}")
        assert main(["verify", str(store), "--deep"]) == 4
        assert f"{name}: " in capsys.readouterr().out
        assert main(["verify", str(store), "--repair"]) == 4
        assert "no chunk was damaged" in capsys.readouterr().out
        assert main(["verify", str(store), "--deep"]) == 0
        capsys.readouterr()
        if name != "provenance.json":
            assert json.loads((store / name).read_bytes()) == json.loads(sound)
    assert main(["info", str(store)]) == 0
    assert "removed by `featcache verify --repair`" in capsys.readouterr().out
