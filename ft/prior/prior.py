"""Frozen prior v0: the initial tower's features of the augmented batch, computed online or remembered.

Lipsum, distillation and CAR-FT compare every batch with the initial tower on the same augmented pixels: a forward pass,
a quarter of the step. Views are deterministic (`featcache.encoding.augment`), so a second run with the same seed,
tower,
precision and augmentation meets the same views; with `StoredPrior` it reads what the first one computed, in float32,
and follows the same trajectory bit for bit.

There is one store an epoch (one for all where they show the same view), with one row a sample. Rows come in the order
of training, chunks are rows in the order of the data set, so rows are written to a journal first: a sparse file of
features and one of checksums, shared by all processes of a machine. A row counts if its checksum fits, so a kill or a
power cut loses the rows in flight and nothing else. When the epoch is over its rows become chunks with markers and a
manifest, as in every store.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from featcache.errors import TrainingError
from featcache.store import content_key, resolve_root
from featcache.store.texts import PriorStore
from ft.prior.journal import PriorViews

Tower: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Rows: TypeAlias = npt.NDArray[np.int64]


class Prior(Protocol):
    """Where a training loop gets v0 from."""

    def features(self, rows: Rows, epoch: int, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) float32 of a batch under the frozen tower, not normalised, without gradient.

        Parameters
        ----------
        rows : (B,) int64
            Which samples of the data set the batch shows.
        epoch : int
            Whose views they are.
        images : tensor
            What the trained tower gets.
        """

    def settle(self) -> None:
        """Write down what is still in flight."""

    def close(self) -> None:
        """Keep what was recorded; called once, after training."""


class OnlinePrior:
    """The frozen tower, every time.

    Parameters
    ----------
    tower : callable
        Images to features (B, D).
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def features(self, rows: Rows, epoch: int, images: torch.Tensor) -> torch.Tensor:
        """See `Prior.features`."""
        with torch.no_grad():
            return self._tower(images).float()

    def settle(self) -> None:
        """Nothing is in flight."""

    def close(self) -> None:
        """Nothing was recorded."""


class StoredPrior:
    """Rows that the store has are read; a batch with others goes through the tower, whole, and those are recorded.

    Parameters
    ----------
    tower : callable
        Images to features (B, D); not called for batches that the store has.
    identity : mapping
        JSON-able: ``tower`` (with its precision), ``view`` (with its seed) and ``dataset``; the key of the store.
    n_rows, dim : int
        Samples of the data set, and D.
    root : str or Path, optional
        Folder of all stores.
    name : str
        What listings call it; the epoch is put behind.
    one_view : bool
        All epochs show the same view: they share the store of epoch 0, and the second reads what the first recorded.

    Attributes
    ----------
    read, computed : int
        Rows that came from the store and from the tower.
    """

    def __init__(
        self,
        tower: Tower,
        identity: Mapping[str, Any],
        n_rows: int,
        dim: int,
        root: str | Path | None = None,
        name: str = "prior",
        *,
        one_view: bool = False,
    ) -> None:
        self._tower, self._shape, self._name = tower, (n_rows, dim), name
        self._one_view, self._epoch = one_view, -1
        self._encoder = {"tower": identity["tower"], "stored": "float32"}
        self._dataset = {key: value for key, value in identity.items() if key not in self._encoder} | {"rows": n_rows}
        folder = resolve_root(root) / PriorStore.kind / content_key(self._encoder)
        if not isinstance(folder, Path):
            raise TrainingError(f"{folder}: stored priors are journals on a local disk; give a local --root")
        self._folder = folder
        self._epochs: dict[int, PriorViews] = {}
        self._waiting: list[tuple[PriorViews, Rows, torch.Tensor]] = []
        self.read = self.computed = 0

    def features(self, rows: Rows, epoch: int, images: torch.Tensor) -> torch.Tensor:
        """See `Prior.features`."""
        self._record()
        views = self._shared_views(epoch) if self._one_view else self._views(epoch)
        known = views.known(rows)
        if known.all():
            self.read += len(rows)
            return torch.from_numpy(views.gather(rows)).to(images.device, non_blocking=True)
        with torch.no_grad():
            features = self._tower(images).float()
        self.computed += len(rows)
        new = torch.from_numpy(~known).to(features.device)
        self._waiting.append((views, rows[~known], features[new]))
        if known.any():  # a later run will read them: it must see the same digits
            features[~new] = torch.from_numpy(views.gather(rows[known])).to(features.device)
        return features

    def settle(self) -> None:
        """Write down what is still in flight; with several processes, before the barrier that `close` needs."""
        self._record()
        for views in self._epochs.values():
            views.flush()

    def close(self) -> None:
        """Keep what was recorded; with several processes call it on all, after `settle` on all: the first tidies up."""
        self.settle()
        for views in self._epochs.values():
            if _rank() == 0:
                views.tidy()
        self._epochs.clear()

    def _record(self) -> None:
        """Write down the features of the last step: by now a GPU has finished them."""
        for views, rows, features in self._waiting:
            views.record(rows, features.cpu().numpy())
        self._waiting.clear()

    def _shared_views(self, epoch: int) -> PriorViews:
        """The one view of all epochs; each begins with what all processes recorded in those before it."""
        views = self._views(0)
        if epoch != self._epoch and _n_processes() > 1:
            _wait()
            views.refresh()
        self._epoch = epoch
        return views

    def _views(self, epoch: int) -> PriorViews:
        if epoch not in self._epochs:
            alone = _n_processes() == 1
            if alone:
                self.close()
            dataset = {**self._dataset, "epoch": epoch}
            path = self._folder / content_key(dataset)
            identity = {"encoder": self._encoder, "dataset": dataset}
            self._epochs[epoch] = PriorViews(path, identity, self._shape, f"{self._name}-epoch{epoch}", tidy=alone)
        return self._epochs[epoch]


PRIORS = ("online", "store")
"""Every kind of prior by the name that recipes and the command line use."""


def make_prior(
    kind: str,
    tower: Tower,
    identity: Mapping[str, Any],
    n_rows: int,
    dim: int,
    root: str | Path | None = None,
    name: str = "prior",
    *,
    one_view: bool = False,
) -> Prior:
    """The prior of that kind; see `OnlinePrior` and `StoredPrior`.

    Raises
    ------
    TrainingError
        There is none of that kind.
    """
    if kind not in PRIORS:
        raise TrainingError(f"prior {kind!r}: expected one of {', '.join(PRIORS)}")
    if kind == "online":
        return OnlinePrior(tower)
    return StoredPrior(tower, identity, n_rows, dim, root, name, one_view=one_view)


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _wait() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
