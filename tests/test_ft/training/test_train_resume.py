"""A killed and resumed run equals an uninterrupted one, and two processes equal one."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import start
from safetensors import safe_open
from safetensors.torch import load_file

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.errors import MismatchError, TrainingError
from featcache.store import PriorStore, open_prior_store
from ft.checkpoints.folder import write_state
from ft.training.loop import finetune
from ft.training.options import FinetuneOptions
from ft.training.resume import FORMAT, PARTS, read_resume

WORLD = 2
TERMS = {"lipsum": 0.5, "variance_covariance": 1.0, "l2sp": 0.01, "logit_distillation": 1.0}
PATHS: dict[str, dict[str, Any]] = {
    "cross entropy": {
        "regularizers": TERMS,
        "prior": "store",
        "clip": 1.0,
        "layer_decay": 0.8,
        "average": "ema",
        "ema_decay": 0.9,
    },
    "contrastive": {
        "objective": "contrastive",
        "templates": "digits",
        "regularizers": {
            "orthogonality": 0.1,
            "self_distillation": {"weight": 1.0, "every": 2, "start": 0.5},
        },
        "accumulate": 2,
        "average": "swa",
        "swa_start": 0.0,
    },
    "micro-batches": {"steps": 3, "regularizers": {"variance_covariance": 1.0}, "accumulate": 2},
    "half": {"precision": "fp16", "lr": 1e-4, "regularizers": {"lipsum": {"weight": 0.5, "mode": "bank", "bank": 200}}},
}

UNHARMED = "micro-batches"  # shared by two processes, but not killed: others are
SHARED = ("cross entropy", "contrastive", UNHARMED)


class Few:
    """The first images of a split of digits."""

    decoding = prepared = opened_as = None

    def __init__(self, split: str, n: int) -> None:
        whole = open_dataset("digits", split)
        index = whole.index
        self.name, self.split = whole.name, split
        self.read, self.decode = whole.read, whole.decode
        parts = (index.ids[:n], index.sizes[:n], index.stamps[:n], index.labels[:n])
        self.index = type(index)(*parts, index.classnames)


def options(**changes: Any) -> FinetuneOptions:
    start = {"steps": 7, "batch_size": 16, "lr": 1e-3, "augment": "wise_ft", "workers": 1, "seed": 3}
    return FinetuneOptions(**(start | {"eval_every": 2, "save_every": 3, "log_every": 2} | changes))


def run(model: str, out: Path, root: Path, name: str, **changes: Any) -> Any:
    train: Dataset = Few("train", 48)
    chosen = options(**(PATHS[name] | changes))
    return finetune(train, model, out=out, options=chosen, val=Few("val", 20), root=root, device="cpu")


def killed_and_resumed(model: str, out: Path, root: Path, name: str) -> int:
    """Kill forked runs, each at a later place, and resume until one finishes; returns the number of kills."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            arm(kills)
            run(model, out, root, name)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            return kills
        kills += 1


def arm(kills: int) -> None:
    """Kill the next process in an update, or while a model or the state is written."""
    import ft.checkpoints.folder
    import ft.training.loop
    import ft.training.resume
    from ft.training.step import Stepper

    def deadly(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
        left = iter(range(calls))

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if kills == 0:
        ft.checkpoints.folder.save_file = deadly(ft.checkpoints.folder.save_file, 1)
    elif kills == 1:
        Stepper.update = deadly(Stepper.update, 4)  # type: ignore[method-assign]
    elif kills == 2:
        ft.training.loop.write_resume = deadly(ft.training.loop.write_resume, 1)
    elif kills == 3:
        os.replace = deadly(os.replace, 1)


def contents(out: Path) -> dict[str, Any]:
    """Every tensor that a run has written, and its log without times."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.safetensors")):
        found |= {f"{path.relative_to(out)}: {name}": value for name, value in load_file(path).items()}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log"] = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    assert one.keys() == two.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name])
    ]


def in_a_process(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    root = Path(__file__).parents[3]
    search = os.pathsep.join([str(root), str(root / "tests")])
    settings = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *arguments], env=os.environ | settings | environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


@pytest.fixture(scope="module")
def killed(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``straight/NAME`` and ``killed/NAME`` of runs in one process."""
    folder = tmp_path_factory.mktemp("killed")
    assert in_a_process("kill", model, str(folder), *SHARED).wait(timeout=300) == 0
    return folder


def check_killed(folder: Path, name: str) -> None:
    straight, resumed = contents(folder / "straight" / name), contents(folder / "killed" / name)
    assert not differences(straight, resumed)
    assert [line["step"] for line in straight["log"] if "loss" in line] == [2, 3, 4, 6, 7]
    assert (folder / "killed" / name / "kills").read_text() == "4"
    if PATHS[name].get("prior") == "store":  # recorded by the killed runs, under a separate root
        epochs = [open_prior_store(path) for path in (folder / "root killed" / PriorStore.kind).glob("*/*")]
        assert len(epochs) == 3
        assert sum(int(epoch.valid.sum()) for epoch in epochs) > 4 * 16  # of 7 x 16; rows in flight may be lost


@pytest.mark.parametrize("name", ["cross entropy", "contrastive"])
def test_killed_and_resumed_equals_uninterrupted(name: str, killed: Path) -> None:
    check_killed(killed, name)


@pytest.mark.nightly
def test_killed_and_resumed_with_fp16(model: str, tmp_path: Path) -> None:
    assert in_a_process("kill", model, str(tmp_path), "half").wait(timeout=300) == 0
    check_killed(tmp_path, "half")


def test_a_finished_run_is_not_run_again(killed: Path, model: str) -> None:
    out = killed / "straight" / "contrastive"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    result = run(model, out, killed / "root kill", "contrastive")
    assert result.steps == 7
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert [row["step"] for row in result.judged] == [2, 4, 6, 7]


def test_another_run_is_not_resumed(killed: Path, model: str) -> None:
    with pytest.raises(MismatchError, match=r"differs: lr 0.001 -> 0.5; resume it with --lr 0.001, or name another"):
        run(model, killed / "straight" / "contrastive", killed / "root kill", "contrastive", lr=0.5)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {"drop_last": False}, "drop_last True -> False; resume it with --drop-last, or name another"),
        ({"head_bias": False}, {}, "head_bias False -> True; resume it with --no-head-bias, "),
        ({"clip": 1.0}, {"clip": None, "train": ["head"]}, "resume it with --clip 1.0, --train image head, "),
        ({"clip": None}, {"clip": 1.0}, "resume it with no --clip, "),
        ({"val": "a"}, {"val": "b", "lr": 1.0}, "resume it with the same model, data and options, "),
        ({}, {"regularizers": {"l2sp": {"weight": 1.0}}}, "resume it with the same model, data and options, "),
    ],
)
def test_refusing_another_run_names_the_flags_that_resume_it(
    old: dict[str, Any], new: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "resume.safetensors"
    record: dict[str, Any] = {"format": FORMAT} | {name: {} for name in PARTS} | {"identity": old}
    write_state({"model/w": torch.zeros(1)}, path, {"run": json.dumps(record)})
    with pytest.raises(MismatchError, match=re.escape(words)):
        read_resume(path, new)
    found = read_resume(path, old | {"drop_last": True})  # the default of an option that the older run did not know
    assert found is not None
    assert found[0] == record


def test_a_damaged_state_is_refused(killed: Path, model: str, tmp_path: Path) -> None:
    state = (killed / "straight" / "contrastive" / "resume.safetensors").read_bytes()
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / "resume.safetensors").write_bytes(state[:999])
    with pytest.raises(TrainingError, match=r"cannot be read .* --overwrite"):
        run(model, tmp_path, killed / "root kill", "contrastive")


@pytest.mark.parametrize("part", PARTS)
def test_a_state_that_lacks_a_part_is_refused(tmp_path: Path, part: str) -> None:
    record: dict[str, Any] = {"format": FORMAT} | {name: {} for name in PARTS if name != part}
    path = tmp_path / "resume.safetensors"
    write_state({"model/weight": torch.zeros(1)}, path, {"run": json.dumps(record)})
    with pytest.raises(TrainingError, match=rf"resume.safetensors: lacks '{part}'; name another --out"):
        read_resume(path, {})


def test_resume_state_contains_no_pickle(killed: Path) -> None:
    path = killed / "straight" / "cross entropy" / "resume.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["run"])
    assert record["progression"]["step"] == 7
    assert not [path for path in (killed / "straight").rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.fixture(scope="module")
def pair(model: str, killed: Path) -> Path:
    """The folder of `killed`, where ``straight/NAME`` are runs of one process, with ``two/NAME`` of two."""
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(WORLD)} for rank in range(WORLD)]
    workers = [in_a_process("two", model, str(killed), *SHARED, **rank) for rank in ranks]
    assert [process.wait(timeout=300) for process in workers] == [0] * WORLD
    return killed


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_equal_one(name: str, pair: Path) -> None:
    """The gradient of the first update (a tenth of it is Adam's first moment), and the losses of the whole run.

    Weights cannot be compared: where the gradient is zero up to rounding (biases of keys), Adam still moves them by the
    full learning rate.
    """
    one, two = (load_file(pair / many / f"{name} first" / "resume.safetensors") for many in ("straight", "two"))
    moments = [key for key in one if key.endswith("exp_avg")]
    size = max(float(one[key].abs().max()) for key in moments)
    assert size > 1e-3
    assert max(float((one[key] - two[key]).abs().max()) for key in moments) < 2e-6 * size
    logs = (contents(pair / many / name)["log"] for many in ("straight", "two"))
    for first, second in zip(*logs, strict=True):
        numbers = "terms" if "terms" in first else "val"
        assert second[numbers] == pytest.approx(first[numbers], rel=1e-4, abs=1e-6)


def test_processes_must_share_a_batch_evenly() -> None:
    from ft.training.data import Order

    with pytest.raises(TrainingError, match="cannot be shared evenly by 3 processes"):
        Order(100, 16, seed=0, world=3)


def test_process_shares_add_up_to_the_batch() -> None:
    from ft.training.data import Order

    for step in (0, 5, 17):
        shares = [Order(100, 12, 0, rank=rank, world=3).rows(step)[1].tolist() for rank in range(3)]
        assert [row for share in shares for row in share] == Order(100, 12, 0).rows(step)[1].tolist()


def test_a_smaller_last_batch_is_shared_evenly() -> None:
    """Of 100 images in batches of 12, four are left: one for each of three processes, and one that is left out."""
    from ft.training.data import Order

    orders = [Order(100, 12, 0, rank=rank, world=3, drop_last=False) for rank in range(3)]
    assert [len(order.rows(8)[1]) for order in orders] == [1, 1, 1]
    seen = [row for step in range(9) for order in orders for row in order.rows(step)[1].tolist()]
    assert len(seen) == len(set(seen)) == 99 == orders[0].images(9)
    assert orders[0].images(10) == 99 + 12
    assert orders[0].rows(9)[0] == 1
    with pytest.raises(TrainingError, match=r"2 images; use a smaller --batch-size$"):
        Order(2, 12, 0, world=3, drop_last=False)


def main(task: str, model: str, place: str, *names: str) -> None:
    folder = Path(place)
    if task == "two":
        import torch.distributed as dist

        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    for name in names:
        out, root = folder / ("two" if task == "two" else "straight"), folder / f"root {task}"
        run(model, out / f"{name} first", root, name, steps=1)
        run(model, out / name, root, name)
        if task == "kill" and name != UNHARMED:
            kills = killed_and_resumed(model, folder / "killed" / name, folder / "root killed", name)
            (folder / "killed" / name / "kills").write_text(str(kills))


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_a_run_of_an_older_version_is_resumed(model: str, tmp_path: Path) -> None:
    """Its record lacks options that were added later, which may stay at their defaults."""
    identity = start(model).identity
    assert not {"shots", "objective_weight", "eval_templates", "eval_names"} & identity.keys()
    assert not {"eval_start", "keep_every"} & start(model, keep_every=1, eval_start=True).identity.keys()
    assert start(model, objective_weight=0.5).identity["objective_weight"] == 0.5
