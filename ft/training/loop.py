"""Fine-tuning, end to end: ``finetune`` trains a model on a data set and writes checkpoints that can be encoded.

A run may be killed at any time. The same call resumes it from the last saved state, and ends bit for bit as an
uninterrupted run does on the same device, with the same number of threads and processes.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.datasets.sources.held import Held, as_dataset
from featcache.encoding.pipeline import default_ahead, default_workers
from featcache.errors import DivergedError, FeatcacheError, TrainingError
from featcache.processes import wait
from featcache.progress import Progress, Silent
from ft.checkpoints.folder import BEST, LAST, LOG, START, head_path
from ft.checkpoints.state import Json
from ft.distributed import processes
from ft.training.averages import EMA, SWA
from ft.training.data import refuse_multilabel, training_batches
from ft.training.options import FinetuneOptions
from ft.training.output import (
    Log,
    TensorBoardLog,
    before_after,
    open_folder,
    rows_before,
    start_again,
    write_head,
    write_model,
    write_options,
)
from ft.training.resume import RESUME, Progression, read_resume, restore, write_resume
from ft.training.setup import Run, prepare
from ft.training.step import Ledger
from ft.training.validation import keep_features, validate


class RunSettings(TypedDict, total=False):
    """Keyword arguments of `finetune` beside the training options."""

    split: str
    """Training split, if `data` is a name; default ``train``."""
    labels: str
    """Labels of a list file: ``names`` (default) or ``int``."""
    root: str | Path | None
    """Folder of all stores."""
    device: str | None
    """Default: ``cuda`` where it is available, else ``cpu``."""
    overwrite: bool
    """Start again instead of resuming the run in `out`."""
    progress: Progress | None


@dataclass(frozen=True)
class FinetuneResult:
    """Files and metrics of a finished run.

    Parameters
    ----------
    last, best : model folders; `best` is that of the best step on the selection split, or `last` without one
    start_head, last_head, best_head : heads for ``featcache evaluate``; `start_head` belongs to the initial model
    steps : updates made
    best_step : None without a selection split
    judged : ``step``, ``accuracy`` and ``nll`` on the selection split
    before_after
        With `FinetuneOptions.eval_start`: results rows of the initial model and of the last update on that split.
    """

    last: Path
    best: Path
    start_head: Path
    last_head: Path
    best_head: Path
    steps: int
    best_step: int | None
    judged: list[Json]
    before_after: list[Json] = field(default_factory=list)


def open_split(spec: str, labels: str = "names") -> Dataset:
    """Open ``DATASET:SPLIT``, as in ``digits:val`` or ``imagefolder:DIR:val``.

    Raises TrainingError if `spec` names no split.
    """
    data, _, split = spec.rpartition(":")
    if not data:
        raise TrainingError(f"{spec!r}: expected DATASET:SPLIT, as in digits:val")
    return open_dataset(data, split, labels=labels)


def finetune(
    data: Held,
    model: str = "tiny",
    pretrained: str | None = None,
    *,
    out: str | Path,
    options: FinetuneOptions | Mapping[str, Any] | None = None,
    val: Held = None,
    **settings: Unpack[RunSettings],
) -> FinetuneResult:
    """Fine-tune a model, or resume a run that was killed.

    Parameters
    ----------
    data : see `featcache.encode`
    model, pretrained : see `featcache.encoders.load_encoder`
    out
        Folder of the run: ``last`` and ``best`` (model folders), their heads, ``log.jsonl``, ``options.json``,
        ``resume.safetensors``, ``best_val.safetensors``. An unfinished run in it is resumed.
    options : a mapping has the names of the fields as keys
    val
        Selection split, ``DATASET:SPLIT`` or data in memory, evaluated without augmentation; the best step is kept as
        ``best``. Do not report results on this split.
    **settings : see `RunSettings`

    Raises
    ------
    TrainingError
        Options contradict each other, or the folder holds other files.
    MismatchError
        The folder holds another run; or a head, a bank or the selection split does not match the model or the data.
    DivergedError
        A loss became NaN or infinite. The last good checkpoint is kept.
    """
    chosen = options if isinstance(options, FinetuneOptions) else FinetuneOptions.from_dict(options or {})
    labels = settings.get("labels", "names")
    split = settings.get("split", "train")
    dataset = open_dataset(data, split, labels=labels) if isinstance(data, str) else as_dataset(data, split)
    validation = open_split(val, labels) if isinstance(val, str) else val if val is None else as_dataset(val, "val")
    refuse_multilabel(dataset, validation)
    folder = Path(out).expanduser()
    is_new = not folder.exists()
    with processes(settings.get("device")) as place:
        devices = [torch.device(place.device)] if place.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):  # every update seeds torch's generators
            if place.first:
                open_folder(folder)
            wait()
            try:
                run = prepare(dataset, validation, model, pretrained, chosen, place, settings.get("root"))
            except FeatcacheError:
                if is_new:
                    with suppress(OSError):  # removes only an empty folder
                        folder.rmdir()
                raise
            if place.first and settings.get("overwrite", False):  # not before the new run is known to be sound
                start_again(run, folder)
            wait()
            return _Loop(run, folder, settings.get("progress") or Silent()).train()


class _Loop:
    """The training loop, with averaging, logging, validation and checkpoints between the updates."""

    def __init__(self, run: Run, out: Path, progress: Progress) -> None:
        self.run, self.out, self.progress = run, out, progress
        self.options, self.stepper, self.place = run.options, run.stepper, run.place
        self.workers = self.options.workers or default_workers()
        self.ledger = Ledger(run.place.world, run.options.precision == "fp16")
        found = read_resume(out / RESUME, run.identity)
        wait()
        self.state = Progression() if found is None else restore(self.stepper, run.average, *found)
        if found is not None:
            run.trained.before = rows_before(out)
        self.logs: list[Log | TensorBoardLog] = []
        if self.place.first:
            write_options(run, out)
            if self.state.step == 0:
                write_head(run, out, START, 0)
            self.logs.append(Log(out / LOG, self.state.step))
            if self.options.tensorboard:
                self.logs.append(TensorBoardLog(out / "tensorboard", self.state.step))

    def train(self) -> FinetuneResult:
        """Make the remaining updates."""
        run, state, prior, images = self.run, self.state, self.stepper.prior, self.run.order.images
        title = f"finetune {run.encoder.name} on {run.dataset.name}/{run.dataset.split}"
        self.progress.start(title, images(run.total), images(state.step))
        self._began = time.monotonic() - state.seconds
        device, ahead, steps = run.encoder.device, default_ahead(run.encoder), range(state.step, run.total)
        batches = training_batches(run.dataset, run.view, run.order, steps, device, self.workers, ahead, run.trained)
        try:
            if state.step == 0 and self.options.eval_start and run.val is not None:
                self._validate(run.val)
            for batch in batches:
                self.ledger.add(self.stepper.update(batch, run.rate(batch.step)))
                state.step += 1
                self._average()
                self._between()
                self.progress.advance(images(state.step) - images(state.step - 1))
            if prior is not None:
                prior.settle()
                wait()  # the first process collects the features of all in stores
        finally:
            for log in self.logs:
                log.close()
            if prior is not None and (self.place.world == 1 or state.step == run.total):
                prior.close()  # all processes have settled
        self.progress.finish()
        best = LAST if state.best_step is None else BEST
        return FinetuneResult(
            last=self.out / LAST,
            best=self.out / best,
            start_head=head_path(self.out, START),
            last_head=head_path(self.out, LAST),
            best_head=head_path(self.out, best),
            steps=state.step,
            best_step=state.best_step,
            judged=state.history,
            before_after=before_after(run, state.history),
        )

    def _average(self) -> None:
        """Update the average: EMA after every update, SWA at the end of each epoch after `swa_start`."""
        average, step, last = self.run.average, self.state.step, self.run.total
        late = step > self.options.swa_start * last and step % self.run.order.steps_per_epoch == 0
        if isinstance(average, EMA) or (isinstance(average, SWA) and (late or (step == last and not average.count))):
            average.update(self.stepper.model.trained())

    def _between(self) -> None:
        """Log, validate and save if due; losses are always checked before anything is validated or saved."""
        run, state, average = self.run, self.state, self.run.average
        val = run.val if self._due(self.options.eval_every) else None
        saving, kept = self._due(self.options.save_every), self._kept()
        if val is None and not (saving or kept or self._due(self.options.log_every)):
            return
        self._log(self._read_ledger())
        run.trained.share(self.place)
        averaged = average.state_dict() if average is not None and average.count else None
        with self.stepper.model.holding(averaged):
            metrics = None if val is None else self._validate(val)
            for name in (LAST if saving else None, kept):
                if name and self.place.first:
                    write_model(run, self.out, name, state.step, metrics)
        if saving and self.place.first:
            state.seconds = time.monotonic() - self._began
            write_resume(self.out / RESUME, self.stepper, average, state, run.identity)
        wait()

    def _kept(self) -> str | None:
        """Name of the checkpoint to keep after this step, if any."""
        epoch, rest = divmod(self.state.step, self.run.order.steps_per_epoch)
        every = self.options.keep_every
        return f"checkpoint_{epoch}" if every and not rest and epoch % every == 0 else None

    def _due(self, every: int) -> bool:
        step = self.state.step
        return step == self.run.total or step % (every or self.run.order.steps_per_epoch) == 0

    def _read_ledger(self) -> Json:
        try:
            record = self.ledger.read(self.state.step, self.stepper.scaler.get_scale())
        except DivergedError as error:
            kept = f"{self.out / LAST} and {self.out / RESUME}" if (self.out / RESUME).exists() else "none yet"
            raise DivergedError(f"{error}; the last good checkpoint is kept: {kept}") from error
        seconds = time.monotonic() - self._began
        return record | {"epoch": self.state.step / self.run.order.steps_per_epoch, "seconds": round(seconds, 3)}

    def _validate(self, val: Dataset) -> dict[str, float]:
        """Evaluate on the selection split; save the model if it is the best so far, except the initial one."""
        state = self.state
        metrics, features = validate(self.stepper.model, self.stepper.objective, val, self.place, self.workers)
        self._log({"step": state.step, "val": metrics})
        value = metrics["accuracy"] if self.options.select == "accuracy" else -metrics["nll"]
        better = state.best is None or value > state.best or (value == state.best and metrics["nll"] < state.best_nll)
        state.history.append({"step": state.step, **metrics})
        if better and state.step:
            state.best, state.best_step = value, state.step
            if self.place.first:
                write_model(self.run, self.out, BEST, state.step, metrics)
            keep_features(features, self.out, state.step, self.place)
        return metrics

    def _log(self, record: Json) -> None:
        for log in self.logs:
            log.write(record)
