"""L2-SP: weight decay towards the initial weights instead of zero.

``R = 1/2 sum_k |theta_k - theta0_k|^2 + beta/2 sum_h |theta_h|^2``

over parameters k with an initial value, and parameters h without one (a new head). Sums are over all elements, not
means.

Paper: Li et al., Explicit inductive bias for transfer learning with convolutional networks (arXiv 1802.01483).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from featcache.errors import MismatchError
from ft.checkpoints.state import check_shapes, shapes_of
from ft.regularizers.base import Regularizer, Step, wide


def l2sp(
    parameters: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor], beta: float = 0.0
) -> torch.Tensor:
    """R of trained `parameters` against `initial` ones, matched by name.

    Raises MismatchError if no parameter has an initial value, or one has another shape.

    >>> now, then = {"w": torch.tensor([1.0, 3.0]), "head": torch.tensor([2.0])}, {"w": torch.tensor([1.0, 1.0])}
    >>> l2sp(now, then).item(), l2sp(now, then, beta=0.5).item()
    (2.0, 3.0)
    """
    known = {name: value for name, value in parameters.items() if name in initial}
    if not known:
        raise MismatchError("no parameter has an initial value of that name; give initial_parameters of the same model")
    names = ("the initial model", "the model")
    check_shapes(shapes_of({name: initial[name] for name in known}), shapes_of(known), names)
    moved = [(wide(value) - wide(initial[name].detach())).square().sum() for name, value in known.items()]
    new = [beta * wide(value).square().sum() for name, value in parameters.items() if beta and name not in initial]
    return 0.5 * torch.stack(moved + new).sum()


@dataclass
class L2SP(Regularizer):
    """`l2sp` of the parameters of a step; `beta` weights the L2 term of new parameters.

    >>> step = Step(parameters={"w": torch.tensor([3.0])}, initial_parameters={"w": torch.tensor([1.0])})
    >>> L2SP()(step).item()
    2.0
    """

    needs = frozenset({"parameters", "initial_parameters"})
    separable = True

    beta: float = 0.0

    def __call__(self, step: Step) -> torch.Tensor:
        """R of the step."""
        return l2sp(step.need("parameters"), step.need("initial_parameters"), self.beta)
