"""Losses of the updates since the last log line, looked at together: one wait for the device instead of one a step."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ft.distributed import total
from ft.errors import DivergedError
from ft.step import Update

__all__ = ["Ledger"]

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
