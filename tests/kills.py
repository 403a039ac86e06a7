"""Every writing verb, ended by SIGKILL and SIGTERM at its write points, and what is then on the disk.

A write point is a call that changes a file: opening one for writing, renaming, linking, removing, making a folder, and
every step of the write protocol of `featcache.store.places.local`. Runs are counted by these points and ended at one of
them, or a few milliseconds behind it, so that a trial does not depend on how fast the machine is.

- ``python tests/kills.py FOLDER trials KILLS TERMS SEED [VERB...]`` ends runs at random points until so many were ended
  by each signal;
- ``python tests/kills.py FOLDER points SIGNAL EVERY [VERB...]`` ends one run at each point (or every n-th) in turn.

Both print one JSON object: how many runs were ended, by verb, and every rule that was broken. The rules: a named file
holds its old or its new bytes, never others; after SIGTERM the exit code is 143 and neither claims nor partial files
are left; the same command, run again, ends with the bytes of a run that was not disturbed.
"""

import atexit
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clip_models
import diffusion_models
import numpy as np
import torch
from small_pictures import write_pictures

import ft.cli.demo
import heads
import heads.cli.demo
import heads.report
import heads.sweeps.run
from featcache.cli.main import main
from featcache.datasets.base import SampleIndex
from featcache.datasets.sources.published import digits
from featcache.encoding import banks, images, texts
from featcache.store.places import local
from featcache.transfer import export, import_features
from ft.checkpoints import convert
from ft.generation import diffusion
from ft.merging import fisher, sweep
from ft.training import loop

LOADED = [banks, images, texts, export, import_features, convert, fisher, sweep, loop, heads.report, heads.sweeps.run]
LOADED += (ft.cli.demo,)
ALL = "pictures/all"


@dataclass(frozen=True)
class Verb:
    """A command line, its outputs, and what exists before: a copy of another file or folder."""

    words: str
    writes: str
    copied: str = ""
    otherwise: str = ""
    """Command that finishes the work of a killed run."""
    code: int = 0
    """Exit code of a complete run."""


GOOD, AS_N = "--root good", "--encoder-name m --name n"
COMMANDS = {
    "encode": Verb("encode imagefolder:pictures --split all --chunk-rows 8 --quiet --tap pre_projection", "cache"),
    "text": Verb("text pictures.txt --quiet", "cache"),
    "import": Verb(f"import features.npz {AS_N}", "cache"),
    "rename": Verb(f"rename {ALL} photographs/train", "cache", "kept"),
    "relabel": Verb(f"relabel {ALL} cat=tiger dog=wolf", "cache", "kept"),
    "rm": Verb(f"rm {ALL} --yes", "cache", "kept", "gc --older-than 0d --delete"),
    "fit": Verb(f"fit ridge {ALL} -o head.safetensors {GOOD}", "head.safetensors", "classes.txt"),
    "export csv": Verb(f"export {ALL} out.csv {GOOD}", "out.csv", "classes.txt"),
    "export npy": Verb(f"export {ALL} out {GOOD}", "out"),
    "export parquet": Verb(f"export {ALL} out.parquet {GOOD}", "out.parquet"),
    "export safetensors": Verb(f"export {ALL} out.safetensors {GOOD}", "out.safetensors"),
    "evaluate": Verb(
        f"evaluate ridge.safetensors --on {ALL} {GOOD} --per-sample samples.npz --confusion c.npz --results r.jsonl",
        "samples.npz c.npz r.jsonl",
    ),
    "sweep": Verb(f"sweep ridge nearest_mean --train {ALL} --on {ALL} --results r.jsonl --quiet {GOOD}", "r.jsonl"),
    "fisher": Verb(f"fisher imagefolder:pictures:all -o f.safetensors --limit 4 --quiet {GOOD}", "f.safetensors"),
    "convert": Verb("convert tiny converted --overwrite", "converted", "plain"),
    "wise": Verb("wise tiny tiny --alphas 0 0.5 --out merged --overwrite", "merged"),
    "generate": Verb(
        "generate classes.txt --out drawn --images 2 --batch-size 2 --size 8 --device cpu --quiet", "drawn"
    ),
    "finetune": Verb(
        f"finetune imagefolder:pictures --split all --out run --steps 4 --batch-size 4 --save-every 2 --workers 1 "
        f"--quiet --device cpu {GOOD}",
        "run",
    ),
    "demo": Verb("demo --output shown --root cache", "shown cache"),
    "encode holdout": Verb("encode imagefolder:pictures --holdout 0.25 --split train test --name n --quiet", "cache"),
    "encode labels": Verb("encode table:rows/after.csv --name t --update-labels --quiet", "cache", "tabled"),
    "text random": Verb("text --random 40 --length 3 --quiet", "cache"),
    "import labels": Verb(f"import moved.npz {AS_N} --update-labels", "cache", "imported"),
    "verify": Verb(f"verify {ALL} --repair", "cache", "harmed", code=4),
    "gc": Verb("gc --older-than 0d --delete", "cache", "begun"),
    "export fe": Verb(f"export {ALL} out.txt --format fe {GOOD}", "out.txt", "classes.txt"),
    "export texts": Verb(f"export texts/pictures out.ckpt {GOOD}", "out.ckpt"),
    "evaluate -o": Verb(
        f"evaluate texts.safetensors ridge.safetensors --alphas 0 0.5 1 --select {ALL} --on n/train --allow-seen "
        f"-o chosen.safetensors --results r.jsonl {GOOD}",
        "chosen.safetensors r.jsonl",
    ),
    "retrieve": Verb(f"retrieve {ALL} --captions captions.json --results r.jsonl --quiet", "cache r.jsonl", "kept"),
    "table": Verb(
        "table zero_shot --data imagefolder:pictures --models tiny --results r.jsonl --quiet", "r.jsonl cache"
    ),
    "report": Verb("report rows.jsonl -o shown", "shown"),
    "merge": Verb("merge soup tiny made/last -o merged --overwrite", "merged", "plain"),
    "moments": Verb(
        f"moments imagefolder:pictures:all -o m.safetensors --model local-dir:made/last --limit 4 --quiet {GOOD}",
        "m.safetensors",
    ),
    "convert to a file": Verb("convert tiny converted.safetensors --overwrite", "converted.safetensors", "classes.txt"),
    "convert to transformers": Verb("convert plain converted --to huggingface --overwrite", "converted", "plain"),
}
UNFINISHED = ("cache", "run")
"""Folders that are compared only when finished."""
VOLATILE = {"provenance.json", "log.jsonl", "resume.safetensors", "options.json", "report.html", "report.md"}
"""Files that hold dates and durations."""
DURATIONS = ("fit_seconds",)


def setup(folder: Path) -> None:
    """Inputs of the verbs."""
    os.chdir(folder)
    os.environ["FEATCACHE_ROOT"] = "cache"
    torch.set_num_threads(1)
    write_pictures(folder / "pictures", 24)
    (folder / "pictures.txt").write_text("cat\ndog\n")
    (folder / "classes.txt").write_text("owl\nant\nbee\n")
    write_rows()
    diffusion.Painter = lambda *_: diffusion_models.Draft()  # type: ignore[assignment, misc]
    heads.cli.demo.open_dataset, heads.cli.demo.TESTS = few_digits, heads.cli.demo.TESTS[:2]  # type: ignore[assignment]
    clip_models.write_folder(folder / "plain", clip_models.make_model())
    encode = "encode imagefolder:pictures --split all --quiet"
    for words in (
        f"{encode} --tap pre_projection --root kept",
        "encode table:rows/before.csv --name t --quiet --root tabled",
        f"import features.npz {AS_N} --root imported",
        f"finetune imagefolder:pictures --split all --out made --steps 1 --batch-size 4 --workers 1 --quiet {GOOD}",
        f"{encode} --tap pre_projection {GOOD}",
        f"text pictures.txt --quiet {GOOD}",
        f"{encode} --name n --holdout 0.25 --split train {GOOD}",
        f"fit ridge {ALL} -o ridge.safetensors {GOOD}",
        f"fit zero_shot texts/pictures -o texts.safetensors {GOOD}",
        f"evaluate texts.safetensors --on {ALL} --results rows.jsonl {GOOD}",
    ):
        assert finish(words.split()) == 0, (words, Path("said").read_text()[-2000:])
    harm(folder)


def write_rows() -> None:
    """Features and tables, each with labels before and after a change; captions."""
    chance, labels = np.random.default_rng(0), np.arange(9000) % 3
    features = chance.standard_normal((9000, 16)).astype(np.float32)
    np.savez("features.npz", features=features, labels=labels)
    np.savez("moved.npz", features=features, labels=(labels + 1) % 3)
    shutil.copytree("pictures", "rows")
    paths = sorted(Path("rows").rglob("*.png"))
    for name, other in (("before", "dog"), ("after", "wolf")):
        rows = [f"{path.relative_to('rows')},{path.parent.name.replace('dog', other)}" for path in paths]
        Path(f"rows/{name}.csv").write_text("\n".join(["path,label", *rows, ""]))
    captions = {str(path.relative_to("rows")): [f"a {path.parent.name}, number {path.stem}"] for path in paths}
    Path("captions.json").write_text(json.dumps(captions))


def harm(folder: Path) -> None:
    """Copies of a root: with a damaged file that can be derived, and with a store that was never finished."""
    for name in ("harmed", "begun"):
        shutil.copytree("kept", name)
    (damaged,) = folder.glob("harmed/images/*/*/labels/zarr.json")
    damaged.write_text(damaged.read_text().replace("24", "20"))
    (manifest,) = folder.glob("begun/images/*/*/manifest.json")
    manifest.unlink()


def few_digits(spec: str, split: str) -> digits.DigitsDataset:
    """Every eighth of the handwritten digits."""
    whole = digits.open_digits(spec.partition(":")[2] or "clean", split)
    index, few = whole.index, slice(None, None, 8)
    kept = SampleIndex(index.ids[few], index.sizes[few], index.stamps[few], index.labels[few], index.classnames)
    return replace(whole, index=kept, originals=whole.originals[few])


@dataclass
class Ending:
    """When a run is ended: signal, write point, and seconds after it."""

    number: signal.Signals = signal.SIGKILL
    point: int = -1
    delay: float = 0.0


passed = mmap.mmap(-1, 8)
"""Number of write points that the latest run reached."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod")


def count_points(ending: Ending) -> None:
    """Count the write points of this process, and end it at one of them."""
    here, lock = str(Path.cwd()), threading.Lock()

    def end() -> None:
        if ending.delay:
            time.sleep(ending.delay)
        os.kill(os.getpid(), ending.number)

    def come_to_one(_: object = None) -> None:
        with lock:
            number = int.from_bytes(passed[:], "little") + 1
            passed[:] = number.to_bytes(8, "little")
        if number == ending.point:
            threading.Thread(target=end, daemon=True).start() if ending.delay else end()

    def watch(event: str, values: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(values[2], int) and values[2] & WRITING
        if (opened or event in CHANGING) and isinstance(values[0], str | os.PathLike):
            path = os.fspath(values[0])
            if not os.path.isabs(path) or path.startswith(here):
                come_to_one()

    local.after_step = come_to_one
    sys.addaudithook(watch)


def begin(words: Sequence[str], ending: Ending | None = None) -> int:
    """Start a run in a child; returns its process id."""
    passed[:] = bytes(8)
    child = os.fork()
    if child == 0:
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 1
        try:
            count_points(ending or Ending())
            code = main(list(words))
        finally:
            for thread in threading.enumerate():  # as Python ends
                if thread is not threading.current_thread() and not thread.daemon:
                    with contextlib.suppress(RuntimeError):  # the signal came before it was started
                        thread.join()
            atexit._run_exitfuncs()
            os._exit(code)
    return child


def finish(words: Sequence[str], ending: Ending | None = None) -> int:
    """Run to the end; the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(begin(words, ending), 0)[1])


def contents(places: Sequence[str]) -> dict[str, str]:
    """Digest of every file that a verb has finished, and of every row of results."""
    files = [path for place in map(Path, places) for path in ([place] if place.is_file() else place.rglob("*"))]
    found: dict[str, str] = {}
    for path in files:
        if not path.is_file() or is_temporary(path):
            continue
        if path.name in VOLATILE:
            found[str(path)] = "there"
        elif path.suffix == ".jsonl":
            found |= {f"{path}: {digest(row(line))}": "row" for line in path.read_bytes().splitlines(keepends=True)}
        else:
            found[str(path)] = digest(path.read_bytes())
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def row(line: bytes) -> bytes:
    """A line of results without durations; an incomplete line is unchanged."""
    if not line.endswith(b"\n"):
        return line
    record = {name: value for name, value in json.loads(line).items() if name not in DURATIONS}
    return json.dumps(record).encode()


def is_temporary(path: Path) -> bool:
    """Whether a file is partial, or in a partial folder that gets its name when complete."""
    return any(part.endswith((".partial", ".tmp")) or part.startswith(".tmp") for part in path.parts)


def left_over(process: int) -> list[str]:
    """Claims and partial files of a process; the run that finishes removes those of killed ones."""
    found = [path for path in Path().rglob("*") if not path.is_relative_to("pictures")]
    claims = [path for path in found if path.parent.name == "claims" and f"-{process}-" in path.read_text()]
    named = [path for path in found if is_temporary(path) and f"{process}" in str(path)]
    return sorted(str(path) for path in {*claims, *named})


def clear(places: Sequence[str]) -> None:
    for place in map(Path, places):
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.unlink()
    for path in [path for path in Path().rglob("*") if is_temporary(path)]:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


class Trial:
    """One verb: its undisturbed result, and runs ended by signals."""

    def __init__(self, name: str) -> None:
        verb = COMMANDS[name]
        self.whole = verb.code
        self.name, self.words, self.places, self.copied = name, verb.words.split(), verb.writes.split(), verb.copied
        self.otherwise = verb.otherwise.split()
        self.broken: list[str] = []
        self.ended = {signal.SIGKILL: 0, signal.SIGTERM: 0}
        for _ in range(2):  # the first run also makes stores that the others find
            self.afresh()
            began = time.monotonic()
            assert finish(self.words) == self.whole, f"{name}: {Path('said').read_text()[-2000:]}"
        self.seconds, self.points = time.monotonic() - began, int.from_bytes(passed[:], "little")
        self.good = contents(self.places)
        self.afresh()
        self.before = contents(self.places)
        assert self.good != self.before, name

    def afresh(self) -> None:
        """As before the first run."""
        clear(self.places)
        if self.copied:
            (shutil.copytree if Path(self.copied).is_dir() else shutil.copyfile)(self.copied, self.places[0])

    def disturb(self, ending: Ending) -> None:
        """Start a run, end it, and check the files."""
        child = begin(self.words, ending)
        code, number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ending.number
        where = f"after {number.name} at write point {ending.point} of {self.points}"
        if code in (-number, 128 + number):
            self.ended[number] += 1
        elif code not in (0, self.whole) and not self.otherwise and not self.is_done():
            self.broken.append(f"{self.name}: exit code {code} {where}: {Path('said').read_text()[-300:]}")
        if number == signal.SIGTERM and code in (143, -number) and (left := left_over(child)):
            self.broken.append(f"{self.name}: {left[:5]} left {where}")
        if code == -signal.SIGTERM and contents(self.places) != self.good:  # or it came when all was done
            self.broken.append(f"{self.name}: no orderly end {where}")
        judged = [place for place in self.places if place not in UNFINISHED]
        found = contents(judged)
        known = {path for path in self.good | self.before if any(path.startswith(place) for place in judged)}
        for path in {path for path in known | set(found) if "/claims/" not in path}:
            if found.get(path) not in (self.before.get(path), self.good.get(path)):
                self.broken.append(f"{self.name}: {path} has other bytes {where}")

    def resume(self, where: str) -> None:
        """Run to completion on the existing files, compare, and reset."""
        code = finish(self.words)
        if code and self.otherwise:
            code = finish(self.otherwise)
        if code not in (0, self.whole) and not self.is_done():
            said = Path("said").read_text()[-300:]
            self.broken.append(f"{self.name}: exit code {code} when run again {where}: {said}")
        elif (found := contents(self.places)) != self.good:
            names = sorted(set(found) ^ set(self.good)) or [name for name in found if found[name] != self.good[name]]
            self.broken.append(f"{self.name}: {names[:5]} differ when run again {where}")

    def is_done(self) -> bool:
        """Whether a verb reported that nothing is left to do (``rm``, ``rename``)."""
        return bool(self.copied) and contents(self.places) == self.good


def at_points(number: signal.Signals, every: int, names: Sequence[str]) -> list[Trial]:
    """One run ended at each write point of some verbs in turn, and run again."""
    trials = [Trial(name) for name in names]
    for trial in trials:
        for point in range(1, trial.points + 1, every):
            trial.afresh()
            trial.disturb(Ending(number, point))
            trial.resume(f"after {number.name} at {point} of {trial.points}")
    return trials


LEAST = 8
"""Runs of a slow verb per signal; the others make up the total."""


def at_random(kills: int, terms: int, seed: int, names: Sequence[str]) -> list[Trial]:
    """Repeat until each signal has ended a number of runs, with a complete run after one to three."""
    chance = random.Random(seed)
    trials = [Trial(name) for name in names]
    slow = 3 * sorted(trial.seconds for trial in trials)[len(trials) // 2]
    wanted = {signal.SIGKILL: kills, signal.SIGTERM: terms}

    def count(number: signal.Signals) -> int:
        return sum(trial.ended[number] for trial in trials)

    while any(count(number) < n for number, n in wanted.items()):
        for trial in trials:
            if trial.seconds > slow and all(trial.ended[n] >= min(LEAST, wanted[n] // len(trials)) for n in wanted):
                continue
            points = []
            trial.afresh()
            for _ in range(chance.randint(1, 3)):
                number = min(wanted, key=lambda n: (count(n) / max(wanted[n], 1), chance.random()))
                delay = chance.choice([0.0, 0.0, chance.uniform(0, 0.03)])
                points.append(chance.randint(1, trial.points))
                trial.disturb(Ending(number, points[-1], delay))
            trial.resume(f"after ends at {points} of {trial.points}")
            Path("so-far.json").write_text(json.dumps(told(trials)))  # to be read while it runs
    return trials


def told(trials: Sequence[Trial]) -> dict[str, object]:
    return {
        "SIGKILL": {trial.name: trial.ended[signal.SIGKILL] for trial in trials},
        "SIGTERM": {trial.name: trial.ended[signal.SIGTERM] for trial in trials},
        "points": {trial.name: trial.points for trial in trials},
        "seconds": {trial.name: round(trial.seconds, 2) for trial in trials},
        "broken": [line for trial in trials for line in trial.broken],
    }


WAYS: dict[str, Callable[..., list[Trial]]] = {
    "trials": lambda k, t, seed, *names: at_random(int(k), int(t), int(seed), names or list(COMMANDS)),
    "points": lambda number, every, *names: at_points(signal.Signals[number], int(every), names or list(COMMANDS)),
}

if __name__ == "__main__":
    setup(Path(sys.argv[1]).resolve())
    print(json.dumps(told(WAYS[sys.argv[2]](*sys.argv[3:])), indent=1))
