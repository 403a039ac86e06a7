"""Frozen prior v0: the initial tower's features of the augmented batch, computed online or read from a store.

Lipsum, distillation and CAR-FT compare every batch with the initial tower on the same augmented pixels, which costs a
forward pass, a quarter of the step. Views are deterministic (`featcache.encoding.augment`): with `StoredPrior`, a
second run with the same seed, tower, precision and augmentation reads the float32 features of the first, and follows
the same trajectory bit for bit. A store holds one row per sample; there is one per epoch, or a single one if all epochs
show the same view. Rows are first written to a journal, see `ft.prior.journal`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from featcache.errors import TrainingError
from featcache.processes import rank_and_size, wait
from featcache.store import content_key, resolve_root
from featcache.store.columns import STAMPS, read_stamps, write_stamps
from featcache.store.key import checksum
from featcache.store.reading.texts import PriorStore
from ft.prior.journal import PriorViews, Rows

Tower: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class OnlinePrior:
    """v0 from a forward pass of the frozen tower, images to features (B, D), in every step."""

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def features(self, rows: Rows, epoch: int, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) float32 of a batch under the frozen tower, not normalised, without gradient.

        Parameters
        ----------
        rows : (B,) int64, rows of the data set
        epoch : epoch of the views
        images : input of the trained tower
        """
        with torch.no_grad():
            return self._tower(images).float()

    def settle(self) -> None:
        """Write pending features, of which there are none here."""

    def close(self) -> None:
        """Store the recorded features; called once, after training."""


class StoredPrior(OnlinePrior):
    """v0 from a store. If rows of a batch are missing, the whole batch is computed, and those rows are recorded.

    `read` and `computed` count the rows so far. Raises TrainingError if the root is not on a local disk.

    Parameters
    ----------
    identity : ``tower`` (with its precision), ``view`` (with its seed) and ``dataset``, from which the key is computed
    n_rows, dim : samples of the data set, and D
    one_view : whether all epochs show the same view; they then share the store of epoch 0
    stamps : (N,) int64 modification times of the samples; files whose times have changed get another store
    """

    def __init__(
        self,
        tower: Tower,
        identity: Mapping[str, object],
        n_rows: int,
        dim: int,
        root: str | Path | None = None,
        *,
        one_view: bool = False,
        stamps: Rows | None = None,
    ) -> None:
        super().__init__(tower)
        self._shape = n_rows, dim
        self._one_view, self._epoch, self._stamps = one_view, -1, stamps
        self._encoder = {"tower": identity["tower"], "stored": "float32"}
        self._dataset = {key: value for key, value in identity.items() if key not in self._encoder} | {"rows": n_rows}
        folder = resolve_root(root) / PriorStore.kind / content_key(self._encoder)
        if not isinstance(folder, Path):
            raise TrainingError(f"{folder}: stored priors need a local disk; give a local --root")
        self._folder = folder
        self._epochs: dict[int, PriorViews] = {}
        self._waiting: list[tuple[PriorViews, Rows, torch.Tensor]] = []
        self.read = self.computed = 0

    def features(self, rows: Rows, epoch: int, images: torch.Tensor) -> torch.Tensor:
        """See `OnlinePrior.features`."""
        self._record()
        views = self._views(0 if self._one_view else epoch)
        if self._one_view and epoch != self._epoch and rank_and_size()[1] > 1:
            wait()  # each epoch starts with the rows that all processes have recorded
            views.journal.scan()
        self._epoch = epoch
        known = views.known(rows)
        if known.all():
            self.read += len(rows)
            return torch.from_numpy(views.gather(rows)).to(images.device, non_blocking=True)
        features = super().features(rows, epoch, images)
        self.computed += len(rows)
        new = torch.from_numpy(~known).to(features.device)
        self._waiting.append((views, rows[~known], features[new]))
        if known.any():  # use the stored rows, as later runs will
            features[~new] = torch.from_numpy(views.gather(rows[known])).to(features.device)
        return features

    def settle(self) -> None:
        """Write pending features; with several processes, call it before the barrier that precedes `close`."""
        self._record()
        for views in self._epochs.values():
            views.journal.flush()

    def close(self) -> None:
        """Turn journals into stores; with several processes, call it in all of them after all have settled."""
        self.settle()
        for views in self._epochs.values() if rank_and_size()[0] == 0 else ():
            views.tidy()
        self._epochs.clear()

    def _record(self) -> None:
        """Write the features of the previous step, which a GPU will have finished by now."""
        for views, rows, features in self._waiting:
            views.record(rows, features.cpu().numpy())
            if self._stamps is not None and not (views.path / STAMPS).exists():
                write_stamps(views.path, self._stamps)
        self._waiting.clear()

    def _views(self, epoch: int) -> PriorViews:
        if epoch not in self._epochs:
            alone = rank_and_size()[1] == 1
            if alone:
                self.close()
            dataset = {**self._dataset, "epoch": epoch}
            path = self._folder / content_key(dataset)
            if self._stamps is not None and not _same_times(path, self._stamps):
                dataset["times"] = checksum(self._stamps.astype("<i8").data)
                path = self._folder / content_key(dataset)
            identity = {"encoder": self._encoder, "dataset": dataset}
            self._epochs[epoch] = PriorViews(path, identity, self._shape, f"prior-epoch{epoch}", tidy=alone)
        return self._epochs[epoch]


def _same_times(path: Path, stamps: Rows) -> bool:
    """Whether modification times equal those recorded with a store; a store without times records the current ones."""
    if not path.exists():
        return True
    if not (path / STAMPS).exists():
        write_stamps(path, stamps)
    return bool((read_stamps(path, len(stamps)) == stamps).all())
