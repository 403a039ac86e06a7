"""Training batches in an order that depends only on the seed and the step, decoded and cropped in threads.

Batch b of epoch e is a slice of a permutation drawn from (seed, e); the view of an image is drawn from (seed, e,
sample id). A resumed run, and one with another number of processes or threads, therefore sees the same pixels, and no
random state has to be saved. The last batch of an epoch may be smaller than the others, or left out (`drop_last`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash

from featcache.datasets.base import Dataset, PlainDataset
from featcache.datasets.holdout import Subset
from featcache.encoders.base import Batch
from featcache.encoding.augment import View
from featcache.encoding.pipeline import worked_batches
from featcache.errors import EncoderError, ImageReadError, TrainingError
from ft.distributed import Place, largest
from ft.objectives.base import Rows, TrainingBatch
from heads.rows.few_shot import draw_shots
from heads.rows.hashes import Hashes


@dataclass(frozen=True)
class Order:
    """Which of `n` rows form the batch of each step; each process (`rank` of `world`) takes its slice of it.

    Without `drop_last`, an epoch ends with a smaller batch, and only its rows beyond a multiple of the number of
    processes are left out. Raises TrainingError if a batch is larger than the data set and `drop_last` is set, or if
    the processes cannot share it evenly.

    >>> Order(5, 2, seed=0, shuffle=False).rows(1), Order(5, 2, seed=0, shuffle=False).rows(2)
    ((0, array([2, 3])), (1, array([0, 1])))
    >>> Order(5, 2, seed=0, shuffle=False, drop_last=False).rows(2)
    (0, array([4]))
    """

    n: int
    batch_size: int
    seed: int
    shuffle: bool = True
    rank: int = 0
    world: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        if not self.images_per_epoch:
            raise TrainingError(
                f"batch_size {self.batch_size}: the data set has {self.n} images; use a smaller --batch-size"
                + (", or --no-drop-last" if self.drop_last else "")
            )
        if self.batch_size % self.world:
            raise TrainingError(f"batch_size {self.batch_size} cannot be shared evenly by {self.world} processes")

    @property
    def images_per_epoch(self) -> int:
        """Rows in the batches of an epoch."""
        return self.n - self.n % (self.batch_size if self.drop_last else self.world)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-self.images_per_epoch // self.batch_size)

    def images(self, steps: int) -> int:
        """Rows in the first `steps` batches of a run."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.images_per_epoch + rest * self.batch_size

    def rows(self, step: int) -> tuple[int, Rows]:
        """Epoch of step 0, 1, ..., and the rows of this process: a contiguous slice of the batch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = _permutation(self.n, self.seed, epoch) if self.shuffle else np.arange(self.n)
        start = number * self.batch_size
        share = min(self.batch_size, self.images_per_epoch - start) // self.world
        return epoch, order[start + self.rank * share :][:share]


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Rows:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def refuse_multilabel(*datasets: PlainDataset | None) -> None:
    """Raise TrainingError for multi-label data: the objectives take one label per image."""
    for dataset in datasets:
        if dataset is not None and dataset.index.targets is not None:
            raise TrainingError(
                f"{dataset.name}/{dataset.split} is multi-label, and fine-tuning takes one label per image; fit a "
                "head, such as multilabel_logistic, on its features"
            )


def few_shots(dataset: Dataset, shots: int, seed: int) -> Subset:
    """`shots` samples of each class, the same that `heads.few_shot` draws from a store of the data set.

    Raises HeadError if a class has fewer samples.
    """
    rows = draw_shots(dataset.index.labels, shots, seed, n_classes=len(dataset.index.classnames))
    return Subset(dataset, rows, f"{dataset.split}-{shots}shots-seed{seed}")


class TrainedRows:
    """Hashes of those of `n` samples that a run has trained on, over all its processes and restarts.

    `before` holds the sorted hashes from before the run was resumed; None if it kept none.
    """

    def __init__(self, n: int) -> None:
        self.before: Hashes | None = np.zeros(0, np.uint64)
        self._found, self._read = np.zeros(n, np.uint64), np.zeros(n, bool)

    def add(self, row: int, content: bytes | memoryview) -> None:
        """Record the hash of a sample that was read."""
        if not self._read[row]:
            digest = xxhash.xxh3_128_digest(content)  # its first half, as in `featcache.store.ImageStore.row_hashes`
            self._found[row], self._read[row] = int.from_bytes(digest[:8], "little"), True

    def share(self, place: Place) -> None:
        """Add the samples that other processes have read."""
        if place.world > 1:
            unread = np.iinfo(np.int64).min
            own = torch.from_numpy(np.where(self._read, self._found.view(np.int64), unread))
            found = largest(own.to(place.device)).cpu().numpy()
            self._found, self._read = found.view(np.uint64), found != unread

    def hashes(self) -> Hashes | None:
        """Sorted distinct hashes so far; None if those from before the run was resumed are not known."""
        return None if self.before is None else np.union1d(self.before, self._found[self._read])


def training_batches(
    dataset: Dataset,
    view: View,
    order: Order,
    steps: range,
    device: str,
    workers: int,
    ahead: int,
    trained: TrainedRows | None = None,
) -> Iterator[TrainingBatch]:
    """The batches of some steps, in order, with `ahead` batches prepared in advance; `trained` records their rows.

    Raises ImageReadError if an image cannot be read or decoded: training without it would be a different run.
    """
    labels, ids = torch.from_numpy(dataset.index.labels), dataset.index.ids

    def images(samples: Sequence[tuple[int, int]]) -> list[Batch]:
        return [image(row, epoch) for row, epoch in samples]

    def image(row: int, epoch: int) -> Batch:
        try:
            content = dataset.read(row)
            if trained is not None:
                trained.add(row, content)
            return view(dataset.decode(content, row), epoch, ids[row])
        except EncoderError:
            raise
        except Exception as error:  # decoders raise anything on damaged files
            raise ImageReadError(
                f"{dataset.name}/{dataset.split}: {ids[row]} cannot be read ({error}); repair or remove it"
            ) from error

    samples = ([(row, epoch) for row in rows.tolist()] for epoch, rows in map(order.rows, steps))
    for step, batch in zip(steps, worked_batches(images, samples, workers, ahead), strict=True):
        epoch, rows = order.rows(step)
        pixels, targets = torch.from_numpy(np.stack(batch)), labels[torch.from_numpy(rows)]
        if device.startswith("cuda"):
            pixels, targets = pixels.pin_memory(), targets.pin_memory()
        pixels, targets = pixels.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        yield TrainingBatch(step, epoch, rows, pixels, targets)
