"""Averages of the weights during training: exponential moving average and stochastic weight averaging.

Both are ``average += w (theta - average)``: EMA with a constant w = 1 - decay, SWA with w = 1 / (number of models).
Averages are kept in float32 or wider, since at a decay of 0.9999 a bfloat16 average would never move. Integer buffers
are copied from the latest model.
"""

from collections.abc import Callable

import torch

from featcache.errors import TrainingError
from ft.checkpoints.state import State, check_shapes, shapes_of
from ft.regularizers.carot import SelfDistillation

COUNT = "number of updates"


class _Average:
    """Average of state dicts, in float32 or wider."""

    def __init__(self, state: State, weight: Callable[[int], float]) -> None:
        self.count, self._weight = 0, weight
        self._dtypes = {key: value.dtype for key, value in state.items()}
        self._averages = {key: _wide(value).clone() for key, value in state.items()}

    @torch.no_grad()
    def update(self, state: State) -> None:
        """Add a model to the average; MismatchError if its keys or shapes differ from those of the average."""
        check_shapes(shapes_of(self._averages), shapes_of(state), ("the average", "the new model"))
        weight = self._weight(self.count)
        for key, value in state.items():
            average, wide = self._averages[key], _wide(value).to(self._averages[key].device)
            if average.is_floating_point() and weight < 1:
                average.lerp_(wide, weight)
            else:
                average.copy_(wide)
        self.count += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy of the average in the dtypes of the model."""
        return {key: value.to(self._dtypes[key], copy=True) for key, value in self._averages.items()}

    def resume_state(self) -> dict[str, torch.Tensor]:
        """State from which `resume` continues bit for bit, as tensors for a safetensors file."""
        return {COUNT: torch.tensor(self.count)} | {key: value.clone() for key, value in self._averages.items()}

    def resume(self, saved: State) -> None:
        """Continue from the result of `resume_state`.

        Raises TrainingError if the state is not a result of `resume_state`; MismatchError if the state belongs to
        another model.
        """
        if COUNT not in saved:
            raise TrainingError(f"no {COUNT!r} in the saved average; expected the result of resume_state()")
        averages = {key: value for key, value in saved.items() if key != COUNT}
        check_shapes(shapes_of(self._averages), shapes_of(averages), ("the average", "the saved one"))
        for key, value in averages.items():
            self._averages[key].copy_(value)
        self.count = int(saved[COUNT])


class EMA(_Average):
    """Exponential moving average: ``average = d average + (1 - d) theta`` after each update.

    Parameters
    ----------
    state : initial value of the average, usually the zero-shot weights
    decay : d in [0, 1)
    warmup : use ``min(d, (1 + t) / (10 + t))`` at update t = 0, 1, ...; short runs then forget the start sooner

    Raises
    ------
    TrainingError
        The decay is outside [0, 1).

    Examples
    --------
    >>> ema = EMA({"w": torch.tensor(0.0)}, decay=0.5)
    >>> for _ in range(3):
    ...     ema.update({"w": torch.tensor(8.0)})
    >>> ema.state_dict()["w"].item()
    7.0
    """

    def __init__(self, state: State, decay: float = 0.9999, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise TrainingError(f"EMA decay {decay!r}: expected a number in [0, 1)")
        super().__init__(state, lambda t: 1 - (min(decay, (1 + t) / (10 + t)) if warmup else decay))


class SWA(_Average):
    """Stochastic weight averaging: the plain mean of all models given to `update` (arXiv 1803.05407).

    Parameters
    ----------
    state : gives keys, shapes and dtypes; not part of the mean

    Examples
    --------
    >>> swa = SWA({"w": torch.tensor(0.0)})
    >>> for value in (1.0, 2.0, 6.0):
    ...     swa.update({"w": torch.tensor(value)})
    >>> swa.state_dict()["w"].item()
    3.0
    """

    def __init__(self, state: State) -> None:
        super().__init__(state, lambda t: 1 / (t + 1))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy of the mean in the dtypes of the model; TrainingError if `update` has not been called."""
        if not self.count:
            raise TrainingError("mean of no models; call update() at least once")
        return super().state_dict()


class Teacher(_Average):
    """The teacher of `SelfDistillation` in a run of `total` updates: a moving average that starts as the model."""

    def __init__(self, state: State, term: SelfDistillation, total: int) -> None:
        self._every = term.every
        super().__init__(state, lambda count: 1 - term.momentum(count * term.every, total))

    def follow(self, state: State, step: int) -> None:
        """Move towards the model after update `step` = 0, 1, ..., every so many updates."""
        if step % self._every == 0:
            self.update(state)


def _wide(value: torch.Tensor) -> torch.Tensor:
    detached = value.detach()
    return detached.float() if detached.is_floating_point() and detached.itemsize < 4 else detached
