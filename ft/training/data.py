"""Training batches in an order that seed and step alone decide, decoded and cropped in threads.

Batch b of epoch e is a slice of one permutation made from (seed, e); the view of a picture follows from (seed, e,
sample id). So a run that is resumed, or that has another number of processes or threads, sees the same pixels, and no
random state needs to be saved. The last batch of an epoch is dropped where it is not whole, as in the papers.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from featcache.datasets.base import Dataset, Picture
from featcache.encoders.base import Batch
from featcache.errors import ImageReadError, TrainingError
from ft.objectives.base import Rows, TrainingBatch

View = Callable[[Picture, int, str], Batch]


@dataclass(frozen=True)
class Order:
    """Which rows make up the batch of each step.

    Parameters
    ----------
    n : int
        Samples of the data set.
    batch_size : int
        Rows of a step, over all processes.
    seed : int
    shuffle : bool
    rank, world : int
        This process and the number of processes; each takes its slice of the batch.

    Raises
    ------
    TrainingError
        A batch larger than the data set, or one that the processes cannot share evenly.

    Examples
    --------
    >>> Order(5, 2, seed=0, shuffle=False).rows(1), Order(5, 2, seed=0, shuffle=False).rows(2)
    ((0, array([2, 3])), (1, array([0, 1])))
    """

    n: int
    batch_size: int
    seed: int
    shuffle: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size > self.n:
            raise TrainingError(
                f"batch_size {self.batch_size}: the data set has {self.n} images; take a smaller --batch-size"
            )
        if self.batch_size % self.world:
            raise TrainingError(f"batch_size {self.batch_size} cannot be shared evenly by {self.world} processes")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.n // self.batch_size

    def rows(self, step: int) -> tuple[int, Rows]:
        """Epoch, and the rows of this process, of step 0, 1, ...; all rows of one process follow each other."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = _permutation(self.n, self.seed, epoch) if self.shuffle else np.arange(self.n)
        share = self.batch_size // self.world
        start = number * self.batch_size + self.rank * share
        return epoch, order[start : start + share]


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Rows:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def training_batches(
    dataset: Dataset, view: View, order: Order, steps: range, device: str, workers: int, ahead: int
) -> Iterator[TrainingBatch]:
    """The batches of some steps, in order, `ahead` of them being worked on in advance.

    Raises
    ------
    ImageReadError
        An image cannot be read or decoded: training on the others would be another run.
    """
    labels, ids = torch.from_numpy(dataset.index.labels), dataset.index.ids

    def image(row: int, epoch: int) -> Batch:
        try:
            picture = dataset.decode(dataset.read(row), row)
        except Exception as error:  # decoders raise anything on damaged files
            raise ImageReadError(
                f"{dataset.name}/{dataset.split}: {ids[row]} cannot be read ({error}); mend or remove it"
            ) from error
        return view(picture, epoch, ids[row])

    def images(rows: Rows, epoch: int) -> list[Batch]:
        return [image(row, epoch) for row in rows.tolist()]

    with ThreadPoolExecutor(workers, thread_name_prefix="featcache-train") as pool:
        waiting: deque[tuple[int, int, Rows, list[Future[Any]]]] = deque()
        try:
            for step in steps:
                epoch, rows = order.rows(step)
                pieces = np.array_split(rows, min(len(rows), 4 * workers))
                waiting.append((step, epoch, rows, [pool.submit(images, piece, epoch) for piece in pieces]))
                if len(waiting) > ahead:
                    yield _collected(*waiting.popleft(), labels, device)
            while waiting:
                yield _collected(*waiting.popleft(), labels, device)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collected(
    step: int, epoch: int, rows: Rows, futures: list[Future[Any]], labels: torch.Tensor, device: str
) -> TrainingBatch:
    pixels = torch.from_numpy(np.stack([image for future in futures for image in future.result()]))
    targets = labels[torch.from_numpy(rows)]
    if device.startswith("cuda"):
        pixels, targets = pixels.pin_memory(), targets.pin_memory()
    return TrainingBatch(step, epoch, rows, pixels.to(device, non_blocking=True), targets.to(device, non_blocking=True))
