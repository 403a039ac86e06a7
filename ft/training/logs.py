"""Losses of the updates since the last log line, looked at together: one wait for the device instead of one a step.

What a run writes down: one JSON object a line, and TensorBoard where it is asked for.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcache.errors import DivergedError, MissingExtraError
from featcache.store.places.local import put
from ft.distributed import total
from ft.training.step import Update

SMALLEST_SCALE = 1.0


@dataclass
class Ledger:
    """What updates reported and nobody has read yet.

    Parameters
    ----------
    world : int
        Number of processes; their losses are averaged.
    half : bool
        fp16: gradients that overflow are expected now and then, and their updates skipped.
    """

    world: int
    half: bool
    _updates: list[Update] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Keep an update's numbers, on their device."""
        self._updates.append(update)

    def read(self, step: int, scale: float) -> dict[str, Any]:
        """Means over the updates since the last reading: the log's record of step `step`, the last of them.

        Parameters
        ----------
        step : int
            Updates made.
        scale : float
            The loss scale of fp16.

        Raises
        ------
        DivergedError
            A loss or, outside of fp16, a gradient is not finite; or the loss scale of fp16 has sunk below 1.
        """
        updates, self._updates = self._updates, []
        names = list(updates[0].terms)
        terms = torch.stack([torch.stack([u.terms[name].double() for name in names]) for u in updates])
        terms = total(terms / self.world).cpu()
        norms = torch.stack([update.gradient_norm.double() for update in updates]).cpu()
        finite = terms.isfinite().all(dim=1) & (norms.isfinite() | self.half)
        if not finite.all():
            at = int((~finite).nonzero()[0])
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, terms[at].tolist(), strict=True))
            raise DivergedError(
                f"update {step - len(updates) + at + 1}: {parts}, gradient norm {float(norms[at]):.4g}: training has "
                "diverged and stops; take a smaller --lr, a longer --warmup, or --clip 1"
                + (", or --precision bf16" if self.half else "")
            )
        if self.half and scale < SMALLEST_SCALE:
            raise DivergedError(f"update {step}: the loss scale of fp16 sank to {scale}; take --precision bf16")
        means = dict(zip(names, terms.mean(dim=0).tolist(), strict=True))
        return {
            "step": step,
            "loss": sum(means.values()),
            "terms": means,
            "lr": updates[-1].rate,
            "gradient_norm": float(norms[-1]),
        }


class Log:
    """``log.jsonl``: records that each hold a ``step``.

    Parameters
    ----------
    path : Path
    after : int
        A resumed run's step: later records are those of the run that was killed, and are dropped; so is a last line
        that was cut short.
    """

    def __init__(self, path: Path, after: int) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= after] if after else []
        put(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """The run is over."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


class TensorBoardLog:
    """The numbers of the same records as TensorBoard scalars.

    Raises
    ------
    MissingExtraError
        tensorboard is not installed.
    """

    def __init__(self, folder: Path, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                f"--tensorboard: tensorboard is not installed ({error}); pip install 'featcache[finetune]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record under its name; those of a nested object under ``name/part``."""
        for name, value in record.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                if name != "step" and isinstance(number, int | float):
                    self._writer.add_scalar(f"{name}/{part}".rstrip("/"), number, record["step"])

    def close(self) -> None:
        """The run is over."""
        self._writer.close()
