"""Fine-tuning, end to end: ``finetune`` trains a model on a data set and leaves checkpoints that `encode` takes.

A run can be killed at any moment: the same call goes on from its last state and ends with the same bits, equal device,
threads and number of processes assumed.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.encoding.pipeline import default_ahead, default_workers
from featcache.errors import DivergedError, TrainingError
from featcache.processes import wait
from featcache.progress import Progress, Silent
from ft.checkpoints.folder import BEST, LAST, LOG, START
from ft.distributed import Place, processes
from ft.training.averages import EMA, SWA
from ft.training.data import training_batches
from ft.training.logs import Ledger, Log, TensorBoardLog
from ft.training.options import FinetuneOptions
from ft.training.output import head_path, open_folder, write_head, write_model, write_options
from ft.training.resume import RESUME, Progression, read_resume, restore, write_resume
from ft.training.setup import Run, prepare
from ft.training.validate import judge


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left behind.

    Parameters
    ----------
    last, best : Path
        Model folders; `best` is that of the best step on the selection split, and `last` where there is none.
    start_head, last_head, best_head : Path
        Heads for ``featcache evaluate``; that with which training began belongs to the initial model.
    steps : int
    best_step : int or None
    judged : list of dict
        ``step``, ``accuracy`` and ``nll`` on the selection split.
    """

    last: Path
    best: Path
    start_head: Path
    last_head: Path
    best_head: Path
    steps: int
    best_step: int | None
    judged: list[dict[str, Any]]


def open_split(spec: str, labels: str = "names") -> Dataset:
    """``DATASET:SPLIT``, as in ``digits:val`` or ``imagefolder:DIR:val``.

    Raises
    ------
    TrainingError
        There is no split in it.
    """
    data, _, split = spec.rpartition(":")
    if not data:
        raise TrainingError(f"{spec!r}: expected DATASET:SPLIT, as in digits:val")
    return open_dataset(data, split, labels=labels)


def finetune(
    data: str | Dataset,
    model: str = "tiny",
    pretrained: str | None = None,
    *,
    out: str | Path,
    options: FinetuneOptions | Mapping[str, Any] | None = None,
    split: str = "train",
    val: str | Dataset | None = None,
    labels: str = "names",
    root: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Fine-tune a model, or go on with a run that was killed.

    Parameters
    ----------
    data : str or Dataset
        As `featcache.encode` takes it; `split` names the split of a string.
    model, pretrained
        See `featcache.encoders.load_encoder`.
    out : str or Path
        Folder of the run: ``last`` and ``best`` (model folders), their heads, ``log.jsonl``, ``options.json``,
        ``resume.safetensors``. A run that was begun there is resumed.
    options : FinetuneOptions or mapping of its fields
    val : str or Dataset, optional
        Selection split, ``DATASET:SPLIT``: judged without augmentation; its best step is kept as ``best``. It should
        be no split that is reported.
    labels : {"names", "int"}
        What the labels of a list file are.
    root : str or Path, optional
        Folder of all stores.
    device : str, optional
    overwrite : bool
        Start anew where a run was begun.
    progress : Progress, optional

    Returns
    -------
    FinetuneResult

    Raises
    ------
    TrainingError
        Options that do not fit together, or a folder of something else.
    MismatchError
        The folder holds another run; a head, a bank or a selection split that does not belong.
    DivergedError
        A loss became NaN or infinite; the last good checkpoint is kept.
    """
    chosen = options if isinstance(options, FinetuneOptions) else FinetuneOptions.from_dict(options or {})
    dataset = open_dataset(data, split, labels=labels) if isinstance(data, str) else data
    held_out = open_split(val, labels) if isinstance(val, str) else val
    folder = Path(out)
    with processes(device) as place, _own_randomness(place):
        if place.first:
            open_folder(folder, overwrite)
        wait()
        run = prepare(dataset, held_out, model, pretrained, chosen, place, root)
        return _Loop(run, folder, progress or Silent()).train()


@contextmanager
def _own_randomness(place: Place) -> Iterator[None]:
    """Steps seed torch's generators; those of the caller come back after the run."""
    devices = [torch.device(place.device)] if place.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Loop:
    """The loop over updates, with what happens between them."""

    def __init__(self, run: Run, out: Path, progress: Progress) -> None:
        self.run, self.out, self.progress = run, out, progress
        self.options, self.stepper, self.place = run.options, run.stepper, run.place
        self.ledger = Ledger(run.place.world, run.options.precision == "fp16")
        self.state = self._resumed()
        self.logs: list[Log | TensorBoardLog] = []
        if self.place.first:
            write_options(run, out)
            if self.state.step == 0:
                write_head(run, out, START, 0)
            self.logs.append(Log(out / LOG, self.state.step))
            if self.options.tensorboard:
                self.logs.append(TensorBoardLog(out / "tensorboard", self.state.step))

    def _resumed(self) -> Progression:
        found = read_resume(self.out / RESUME, self.run.identity)
        wait()
        return Progression() if found is None else restore(self.stepper, self.run.average, *found)

    def train(self) -> FinetuneResult:
        """All updates that are left."""
        run, state = self.run, self.state
        self.progress.start(run.what, run.total * self.options.batch_size, state.step * self.options.batch_size)
        self._began = time.monotonic() - state.seconds
        device, workers = run.encoder.device, self.options.workers or default_workers()
        steps = range(state.step, run.total)
        ahead = default_ahead(run.encoder)
        try:
            for batch in training_batches(run.dataset, run.view, run.order, steps, device, workers, ahead):
                self.ledger.add(self.stepper.update(batch, run.rate(batch.step)))
                state.step += 1
                self._average()
                self._between()
                self.progress.advance(self.options.batch_size)
            if self.stepper.prior is not None:
                self.stepper.prior.settle()
                wait()  # the first process tidies up what all have written down
        finally:
            for log in self.logs:
                log.close()
            if self.stepper.prior is not None and (self.place.world == 1 or state.step == run.total):
                self.stepper.prior.close()  # all processes are here, or gone
        self.progress.finish()
        return self._result()

    def _average(self) -> None:
        """Take the new weights into the average: each update for EMA, the end of each late epoch for SWA."""
        average, step, total = self.run.average, self.state.step, self.run.total
        late = step > self.options.swa_start * total and step % self.run.order.steps_per_epoch == 0
        if isinstance(average, EMA) or (isinstance(average, SWA) and (late or (step == total and not average.count))):
            average.update(self.stepper.model.trained())

    def _between(self) -> None:
        """Log, judge and save where it is time; nothing is judged or saved before the losses were looked at."""
        judge_now, save_now = self._due(self.options.eval_every), self._due(self.options.save_every)
        judge_now = judge_now and self.run.val is not None
        if not (judge_now or save_now or self._due(self.options.log_every)):
            return
        self._log(self._read_ledger())
        judged = None
        with self.stepper.model.holding(self._averaged()):
            if judge_now:
                judged = self._judge()
            if save_now and self.place.first:
                write_model(self.run, self.out, LAST, self.state.step, judged)
        if save_now and self.place.first:
            self.state.seconds = time.monotonic() - self._began
            write_resume(self.out / RESUME, self.stepper, self.run.average, self.state, self.run.identity)
        wait()

    def _due(self, every: int) -> bool:
        step = self.state.step
        return step == self.run.total or step % (every or self.run.order.steps_per_epoch) == 0

    def _averaged(self) -> dict[str, torch.Tensor] | None:
        average = self.run.average
        return average.state_dict() if average is not None and average.count else None

    def _read_ledger(self) -> dict[str, Any]:
        try:
            record = self.ledger.read(self.state.step, self.stepper.scaler.get_scale())
        except DivergedError as error:
            kept = f"{self.out / RESUME} and {self.out / LAST}" if (self.out / RESUME).exists() else "none was made yet"
            raise DivergedError(f"{error}; the last good checkpoint is kept: {kept}") from error
        seconds = time.monotonic() - self._began
        return record | {"epoch": self.state.step / self.run.order.steps_per_epoch, "seconds": round(seconds, 3)}

    def _judge(self) -> dict[str, float]:
        """Judge on the selection split; keep the model where it is better than all before it."""
        run, state = self.run, self.state
        if run.val is None:
            raise TrainingError("there is no selection split to judge on")
        judged = judge(self.stepper.model, self.stepper.objective, run.val, self.place, self._workers)
        self._log({"step": state.step, "val": judged})
        state.history.append({"step": state.step, **judged})
        value = judged["accuracy"] if self.options.select == "accuracy" else -judged["nll"]
        if state.best is None or value > state.best:
            state.best, state.best_step = value, state.step
            if self.place.first:
                write_model(run, self.out, BEST, state.step, judged)
        return judged

    @property
    def _workers(self) -> int:
        return self.options.workers or default_workers()

    def _log(self, record: Mapping[str, Any]) -> None:
        for log in self.logs:
            log.write(record)

    def _result(self) -> FinetuneResult:
        best = LAST if self.state.best_step is None else BEST
        return FinetuneResult(
            last=self.out / LAST,
            best=self.out / best,
            start_head=head_path(self.out, START),
            last_head=head_path(self.out, LAST),
            best_head=head_path(self.out, best),
            steps=self.state.step,
            best_step=self.state.best_step,
            judged=self.state.history,
        )
