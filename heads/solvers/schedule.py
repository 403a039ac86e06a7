"""Learning rate schedules."""

import math

from featcache.errors import TrainingError


def cosine(fraction: float) -> float:
    """``(1 + cos(pi f)) / 2``: from 1 at f = 0 to 0 at f = 1."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def wise_ft_schedule(step: int, lr: float, warmup: int, total: int) -> float:
    """Learning rate of WiSE-FT (arXiv 2109.01903): linear warm-up, then cosine decay to zero.

    ``lr (t + 1) / warmup`` for t < warmup, else ``lr (1 + cos(pi (t - warmup) / (total - warmup))) / 2``. Unlike in
    Lipsum-FT's schedule, the first rate is positive, the peak is reached at the last warm-up step, and the last rate
    (t = total - 1) is still positive.

    Parameters
    ----------
    step : t, the number of updates before this one; the rate is 0 from `total` on
    lr : peak rate
    warmup : warm-up updates (500 in the paper), 0 for none
    total : length of the run in updates

    Raises
    ------
    TrainingError
        If the step or the warm-up is negative, or the run has no updates.

    >>> [f"{wise_ft_schedule(step, 3e-5, 500, 25020):.3g}" for step in (0, 249, 499, 500, 12760, 25019)]
    ['6e-08', '1.5e-05', '3e-05', '3e-05', '1.5e-05', '1.23e-13']
    """
    if step < 0 or warmup < 0 or total < 1:
        raise TrainingError(f"step {step}, warm-up {warmup}, total {total}: expected step, warm-up >= 0, total >= 1")
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.0 if step >= total else lr * cosine((step - warmup) / (total - warmup))
