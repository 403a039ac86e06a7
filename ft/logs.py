"""What a run writes down: one JSON object a line, and TensorBoard where it is asked for."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import MissingExtraError
from featcache.store.atomic import put

__all__ = ["Log", "TensorBoardLog"]


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
