"""RegMean: merge linear layers so that their outputs on each model's data stay closest to that model's outputs.

For a linear layer with weights W_k (D, M) and inputs X_k (N_k, D) of model k, the merged weights minimise
``sum_k |X_k W - X_k W_k|^2``. With the Gram matrices ``G_k = X_k^T X_k``, which `ft.merging.moments` collects,

``W = (sum_k G_k)^-1 sum_k G_k W_k``

Off-diagonal entries of G_k are first multiplied by `off_diagonal`, which the paper finds necessary for transformers.
All other tensors (biases, norms, embeddings, convolutions) are averaged, as in the paper.

Paper: Jin et al., Dataless knowledge fusion by merging weights of language models (arXiv 2212.09849).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch

from featcache.errors import MismatchError
from featcache.parameters import Range
from ft.checkpoints.state import State, check_shapes, shapes_of
from ft.merging.tensors import merged_by_key


def regmean(
    states: Sequence[State],
    moments: Sequence[Mapping[str, torch.Tensor]],
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.9,
) -> dict[str, torch.Tensor]:
    """Merge linear layers by least squares over their inputs, and average all other tensors.

    In directions without any input, such as those of dead units, weights are averaged too. Raises MismatchError if the
    number of models differs, or layers or widths of the moments do.

    Parameters
    ----------
    states : K state dicts
    moments : K mappings of ``NAME@AXIS`` -> (D, D) Gram matrix of the inputs to the tensor NAME, along its axis AXIS
    off_diagonal : factor on off-diagonal entries; the paper uses 0.9 for most models, and 0.1 for T5

    >>> models = [{"w": torch.tensor([[1.0, 1.0]])}, {"w": torch.tensor([[3.0, 3.0]])}]
    >>> inputs = [{"w@1": torch.diag(torch.tensor([1.0, 3.0]))}, {"w@1": torch.diag(torch.tensor([1.0, 1.0]))}]
    >>> regmean(models, inputs)["w"].tolist()
    [[2.0, 1.5]]
    """
    if len(moments) != len(states):
        raise MismatchError(f"moments of {len(moments)} models for {len(states)}; expected one for each model")
    for number, found in enumerate(moments[1:], start=2):
        check_shapes(shapes_of(moments[0]), shapes_of(found), ("the moments of model 1", f"those of model {number}"))
    axes = {name: int(axis) for name, _, axis in (key.rpartition("@") for key in moments[0])}

    def rule(key: str, models: list[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        if key not in axes:
            return start
        axis = axes[key]
        grams = [_scaled(found[f"{key}@{axis}"].double(), off_diagonal) for found in moments]
        if grams[0].shape != (start.shape[axis],) * 2:
            raise MismatchError(
                f"{key} {tuple(start.shape)}: moments {tuple(grams[0].shape)} of another model's inputs"
            )
        moved = [(model - start).movedim(axis, 0) for model in models]
        right = torch.stack([gram @ part for gram, part in zip(grams, moved, strict=True)]).sum(dim=0)
        return start + _solve(torch.stack(grams).sum(dim=0), right).movedim(0, axis)

    return merged_by_key(states, None, rule)


def _scaled(gram: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Minimum-norm solution of ``gram x = right`` for a positive semidefinite matrix."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not failed and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        solution: torch.Tensor = torch.cholesky_solve(right, factor)
    else:
        solution = torch.linalg.pinv(gram, hermitian=True) @ right
    return solution
