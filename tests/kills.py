"""Every writing verb, ended by SIGKILL and SIGTERM at random moments, and what is then on the disk.

``python tests/kills.py FOLDER KILLS TERMS SEED`` prints one JSON object: how many runs each signal ended, by verb, and
every rule that was broken. The rules: a named file holds its old or its new bytes, never others; after SIGTERM the exit
code is 143 and neither claims nor partial files are left; the same command, run again, ends with the bytes of a run
that was not disturbed.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from small_pictures import write_pictures

import heads
import heads.report
from featcache.cli.main import main
from featcache.encoding import banks, images, texts
from featcache.transfer import export, import_features
from ft.checkpoints import convert
from ft.merging import fisher, sweep
from ft.training import loop

LOADED = (banks, images, texts, export, import_features, convert, fisher, sweep, loop, heads, heads.report)
TRAIN = "pictures/all"
COMMANDS = {
    "encode": "encode imagefolder:pictures --split all --chunk-rows 2 --quiet --tap pre_projection",
    "text": "text pictures.txt --quiet",
    "import": "import features.npz --encoder-name m --name n",
    "fit": f"fit ridge {TRAIN} -o head.safetensors --root good",
    "export csv": f"export {TRAIN} out.csv --root good",
    "export npy": f"export {TRAIN} out --root good",
    "export parquet": f"export {TRAIN} out.parquet --root good",
    "evaluate": f"evaluate ridge.safetensors --on {TRAIN} --root good --per-sample samples.npz --confusion c.npz",
    "fisher": "fisher imagefolder:pictures:all -o f.safetensors --limit 4 --quiet --root good",
    "convert": "convert tiny converted --overwrite",
    "wise": "wise tiny tiny --alphas 0 0.5 --out merged --overwrite",
    "finetune": "finetune imagefolder:pictures --split all --out run --steps 6 --batch-size 4 --save-every 2 "
    "--workers 1 --quiet --device cpu --root good",
}
WRITES = {"fit": "head.safetensors", "evaluate": "samples.npz c.npz", "fisher": "f.safetensors", "convert": "converted"}
WRITES |= {"export csv": "out.csv", "export npy": "out", "export parquet": "out.parquet", "wise": "merged"}
WRITES |= {"finetune": "run"}
VERBS = {name: (words.split(), WRITES.get(name, "cache").split()) for name, words in COMMANDS.items()}
"""Name -> command line, and what it writes."""
VOLATILE = {"provenance.json", "log.jsonl", "resume.safetensors", "options.json"}  # with times of day and durations


def setup(folder: Path) -> None:
    """What the verbs read."""
    os.chdir(folder)
    os.environ["FEATCACHE_ROOT"] = "cache"
    torch.set_num_threads(1)
    write_pictures(folder / "pictures", 24)
    (folder / "pictures.txt").write_text("cat\ndog\n")
    chance = np.random.default_rng(0)
    np.savez("features.npz", features=chance.standard_normal((9000, 16)).astype(np.float32), labels=np.arange(9000) % 3)
    encode = ["encode", "imagefolder:pictures", "--split", "all", "--quiet", "--root", "good"]
    fit = ["fit", "ridge", TRAIN, "-o", "ridge.safetensors", "--root", "good"]
    assert [finish(encode), finish(fit)] == [0, 0]


def begin(words: Sequence[str]) -> int:
    """Start a run in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        code = 1
        try:
            code = main(list(words))
        finally:
            os._exit(code)
    return child


def finish(words: Sequence[str]) -> int:
    """Run to the end; the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(begin(words), 0)[1])


def contents(places: Sequence[str]) -> dict[str, str]:
    """Digest of every file that a verb has finished."""
    files = [path for place in map(Path, places) for path in ([place] if place.is_file() else place.rglob("*"))]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name not in VOLATILE and not is_temporary(path)
    }


def is_temporary(path: Path) -> bool:
    """Whether a file, or a folder above it, is one that a run fills before it gives it its name."""
    return any(part.endswith((".partial", ".tmp", ".old")) or part.startswith(".tmp") for part in path.parts)


def left_over(process: int) -> list[str]:
    """Claims and partial files of a process; those of killed ones are swept by the run that finishes."""
    found = [path for path in Path().rglob("*") if path.is_file() and not path.is_relative_to("pictures")]
    claims = [path for path in found if path.parent.name == "claims" and path.read_text().endswith(f"-{process}")]
    named = [path for path in found if is_temporary(path) and f"{process}" in str(path)]
    return [str(path) for path in {*claims, *named}]


def clear(places: Sequence[str]) -> None:
    for place in map(Path, places):
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.unlink()
    for path in [*Path().glob("*.partial"), *Path().glob(".*.tmp"), *Path().glob(".*.old")]:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


class Trial:
    """One verb: its undisturbed result, and runs that signals end."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self.name, self.chance = name, chance
        self.words, self.places = VERBS[name]
        self.broken: list[str] = []
        self.ended = {signal.SIGKILL: 0, signal.SIGTERM: 0}
        clear(self.places)
        began = time.monotonic()
        assert finish(self.words) == 0, name
        self.seconds = time.monotonic() - began
        self.good = contents(self.places)
        assert self.good, name
        clear(self.places)

    def disturb(self, number: signal.Signals) -> None:
        """Start, wait, end; then check what is there."""
        child = begin(self.words)
        time.sleep(self.chance.uniform(0.02, 1.0) * self.seconds)
        os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (-number, 128 + number):
            self.ended[number] += 1
        elif code:
            self.broken.append(f"{self.name}: exit code {code} after {number.name}")
        if number == signal.SIGTERM and code == 143 and (left := left_over(child)):
            self.broken.append(f"{self.name}: {left} left after SIGTERM")
        found = contents(self.places)
        if "cache" not in self.places and "run" not in self.places:  # stores are judged when they are finished
            wrong = [path for path, digest in found.items() if self.good.get(path) != digest]
            self.broken += [f"{self.name}: {path} has other bytes after {number.name}" for path in wrong]

    def resume(self) -> None:
        """Run to the end on what is there; compare, and start afresh."""
        if (code := finish(self.words)) != 0:
            self.broken.append(f"{self.name}: exit code {code} when run again")
        elif (found := contents(self.places)) != self.good:
            names = sorted(set(found) ^ set(self.good)) or [name for name in found if found[name] != self.good[name]]
            self.broken.append(f"{self.name}: {names[:5]} differ when run again")
        clear(self.places)


def run(folder: Path, kills: int, terms: int, seed: int) -> dict[str, object]:
    """Trials until so many runs were ended by each signal."""
    setup(folder)
    chance = random.Random(seed)
    trials = [Trial(name, chance) for name in VERBS]
    turn = 0

    def count(number: signal.Signals) -> int:
        return sum(trial.ended[number] for trial in trials)

    while (
        sum(trial.ended[signal.SIGKILL] for trial in trials) < kills
        or sum(t.ended[signal.SIGTERM] for t in trials) < terms
    ):
        trial = trials[turn % len(trials)]
        turn += 1
        many = (
            sum(t.ended[signal.SIGTERM] for t in trials) * kills > sum(t.ended[signal.SIGKILL] for t in trials) * terms
        )
        for _ in range(chance.randint(1, 3)):
            trial.disturb(signal.SIGKILL if many or chance.random() < 0.5 else signal.SIGTERM)
        trial.resume()
    return {
        "SIGKILL": {trial.name: trial.ended[signal.SIGKILL] for trial in trials},
        "SIGTERM": {trial.name: trial.ended[signal.SIGTERM] for trial in trials},
        "broken": [line for trial in trials for line in trial.broken],
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
