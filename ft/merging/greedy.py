"""Greedy soups: the mean of those fine-tuned models that do not make it worse (Wortsman et al., arXiv 2203.05482)."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ft.checkpoints.folder import write_model_folder
from ft.checkpoints.parents import Parent
from ft.merging.interpolate import soup
from ft.merging.wise import read_tuned, weights_of


def greedy(n: int, value: Callable[[list[int]], float]) -> list[int]:
    """Indices of the models in a greedy soup of `n`, in the order they were added.

    Starting from the best single model, each next best is kept if it does not lower ``value`` of the soup.

    >>> quality = {(0,): 0.7, (1,): 0.9, (2,): 0.8, (1, 2): 0.95, (0, 1, 2): 0.9}
    >>> greedy(3, lambda chosen: quality[tuple(sorted(chosen))])
    [1, 2]
    """
    alone = [value([k]) for k in range(n)]
    order = sorted(range(n), key=lambda k: -alone[k])
    chosen, best = order[:1], alone[order[0]]
    for k in order[1:]:
        with_it = value([*chosen, k])
        if with_it >= best:
            chosen, best = [*chosen, k], with_it
    return chosen


def greedy_soup(
    parent: Parent, tuned: Sequence[str | Path], folder: Path, value: Callable[[list[int]], float]
) -> list[int]:
    """Sorted indices of the fine-tuned models in a greedy soup; each soup is written to `folder` for `value`."""
    theta0 = parent.state()
    states = [read_tuned(weights_of(parent, name), theta0) for name in tuned]

    def of_soup(chosen: list[int]) -> float:
        write_model_folder(parent.source, soup([states[k] for k in chosen]), folder, overwrite=True)
        return value(chosen)

    try:
        return sorted(greedy(len(tuned), of_soup))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
