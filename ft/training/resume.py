"""The saved state of a run, from which it resumes after a kill.

Trained weights, optimiser, average and progress are stored in one safetensors file with JSON in its header, replaced
atomically. No random state is saved: order, views, captions and random texts depend only on the seed and the step.
"""

import json
import math
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from featcache.errors import MismatchError, TrainingError
from featcache.parameters import check_record
from featcache.store.places.tensors import check_sound
from ft.checkpoints.folder import write_state
from ft.checkpoints.state import Json, State, check_shapes, shapes_of
from ft.training.averages import EMA, SWA
from ft.training.options import FinetuneOptions
from ft.training.step import Stepper

RESUME = "resume.safetensors"
FORMAT = "featcache-finetune-1"
_ANEW = "name another --out (or replace this run with --overwrite)"
PARTS = ("progression", "identity", "scaler")
"""Parts of the record of a state, besides its format."""


@dataclass
class Progression:
    """Updates made, best value on the selection split and its step, seconds over all restarts, and all metrics."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    history: list[Json] = field(default_factory=list)

    @property
    def best_nll(self) -> float:
        """NLL of the best step on the selection split, which breaks ties."""
        return next((float(row["nll"]) for row in self.history if row["step"] == self.best_step), math.inf)


def write_resume(
    path: Path, stepper: Stepper, average: EMA | SWA | None, progression: Progression, identity: Json
) -> None:
    """Replace the state file by the current state."""
    record = {
        "format": FORMAT,
        "progression": asdict(progression),
        "identity": dict(identity),
        "scaler": stepper.scaler.state_dict(),
    }
    state = _prefixed("model", stepper.model.trained())
    for name, parameter in stepper.parameters.items():  # a parameter without a gradient so far has no state
        state |= _prefixed(f"optimizer/{name}", stepper.optimizer.state.get(parameter, {}))
    if stepper.teacher is not None:
        state |= _prefixed("teacher", stepper.teacher.resume_state())
    if average is not None:
        state |= _prefixed("average", average.resume_state())
    write_state(state, path, {"run": json.dumps(record)})


def read_resume(path: Path, identity: Json) -> tuple[Json, dict[str, torch.Tensor]] | None:
    """The record and the tensors of a state file; None if it does not exist.

    Raises MismatchError if it was saved by a run with other options, data or model; TrainingError if it cannot be read.
    """
    if not path.exists():
        return None
    try:
        check_sound(path)
        with safe_open(str(path), framework="pt") as file:
            record: Json = json.loads((file.metadata() or {}).get("run", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); {_ANEW}") from error
    if record.get("format") != FORMAT:
        raise TrainingError(f"{path}: not a state that this version can resume; {_ANEW}")
    try:
        check_record(record, dict.fromkeys(PARTS, Json), str(path), PARTS)
    except ValueError as error:
        raise TrainingError(f"{error}; {_ANEW}") from error
    defaults = FinetuneOptions().to_dict()  # an older run lacks the options that were added since
    known, given = defaults | record["identity"], defaults | json.loads(json.dumps(identity))
    if differing := [name for name in sorted(known.keys() | given.keys()) if known.get(name) != given.get(name)]:
        changes = ", ".join(f"{name} {known.get(name)!r} -> {given.get(name)!r}" for name in differing[:5])
        raise MismatchError(
            f"{path.parent} holds a run that differs: {changes}; resume it with {_same(known, differing)}, or {_ANEW}"
        )
    return record, tensors


def _same(known: Json, differing: list[str]) -> str:
    """Flags that give the options of the saved run again, where each of them can be written as one flag."""
    flags = []
    for name in differing:
        value, flag = known.get(name), name.replace("_", "-")
        if name not in FinetuneOptions.__dataclass_fields__ or isinstance(value, dict):
            return "the same model, data and options"
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is None:
            flags.append(f"no --{flag}")
        else:
            flags.append(shlex.join([f"--{flag}", *map(str, value if isinstance(value, list) else [value])]))
    return ", ".join(flags)


def restore(stepper: Stepper, average: EMA | SWA | None, record: Json, tensors: State) -> Progression:
    """Restore a saved state; MismatchError if its tensors do not match the model."""
    groups = {key: _unprefixed(key, tensors) for key in ("model", "optimizer", "average", "teacher")}
    check_shapes(shapes_of(stepper.model.trained()), shapes_of(groups["model"]), ("the model", "the saved state"))
    stepper.model.take(groups["model"])
    _restore_optimizer(stepper, groups["optimizer"])
    if average is not None:
        average.resume(groups["average"])
    if stepper.teacher is not None:
        stepper.teacher.resume(groups["teacher"])
    stepper.scaler.load_state_dict(record["scaler"])
    return Progression(**record["progression"])


def _prefixed(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": value for name, value in state.items()}


def _unprefixed(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in state.items() if name.startswith(f"{prefix}/")}


def _restore_optimizer(stepper: Stepper, saved: State) -> None:
    optimizer = stepper.optimizer
    names = {id(parameter): name for name, parameter in stepper.parameters.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition("/")
        states.setdefault(ordered.index(name), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
