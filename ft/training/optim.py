"""The optimiser, and learning-rate schedules as pure functions of the step."""

from collections.abc import Callable

import torch

from featcache.errors import TrainingError
from ft.training.layers import lr_factors
from ft.training.model import Trainable, part_of
from ft.training.options import FinetuneOptions
from heads.solvers.schedule import cosine, wise_ft_schedule


def lipsum_schedule(step: int, lr: float, n_iters: int) -> float:
    """Learning rate of Lipsum-FT (arXiv 2404.00860): linear warm-up over 10 % of the run, cosine over 90 %.

    With ``W = floor(0.1 n_iters)`` and ``K = floor(0.9 n_iters)``: ``lr t / W`` for step t < W, else
    ``lr (1 + cos(pi min(t - W, K) / K)) / 2``. The rate of the first update (t = 0) is exactly 0, and so are all rates
    from step ``W + K`` on. Raises TrainingError if the step is negative, or the run has fewer than two updates.

    >>> [lipsum_schedule(step, 1e-5, 5000) for step in (0, 250, 500, 5000)]
    [0.0, 5e-06, 1e-05, 0.0]
    """
    if step < 0 or n_iters < 2:
        raise TrainingError(f"step {step} of {n_iters}: expected step >= 0 and at least 2 updates")
    warmup, decay = n_iters // 10, 9 * n_iters // 10
    if step < warmup:
        return lr * step / warmup
    return lr * cosine(min(step - warmup, decay) / decay)


def rates(options: FinetuneOptions, total: int) -> Callable[[int], float]:
    """Learning rate of step 0, 1, ... of a run of `total` updates."""
    if options.schedule == "lipsum":
        return lambda step: lipsum_schedule(step, options.lr, total)
    if options.schedule == "wise_ft":
        return lambda step: wise_ft_schedule(step, options.lr, options.warmup, total)
    return lambda step: options.lr * min(1.0, (step + 1) / max(options.warmup, 1))


def make_optimizer(model: Trainable, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Optimiser of the trained parameters, with one group per learning-rate factor and weight decay on all.

    With ``layer_decay`` d the factor is d to the power of the distance from the tower's output; heads and logit scale
    keep the full rate.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = dict.fromkeys(names, 1.0)
    if options.layer_decay < 1:
        for part in ("image", "text"):
            tower = lr_factors(model.layers(part), options.layer_decay)
            factors |= {name: tower[name] for name in names if part_of(name) == part}
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names if factors[name] == factor], "factor": factor}
        for factor in sorted(set(factors.values()))
    ]
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    # fused: one pass over each tensor instead of ten
    return kind(groups, options.lr, options.betas, options.eps, options.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
