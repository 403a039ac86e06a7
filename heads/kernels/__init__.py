"""NLL, ranks and calibration of many linear heads without an array of logits (N, C).

`linear_nll` evaluates heads; `linear_cross_entropy` has gradients, for fitting them. `heads.kernels.plain` is the
reference in torch, against which every other implementation is tested. A new one is one file and one line in `IMPLS`: a
module with ``require(problem)``, which raises if it cannot run, and ``run(problem)``, which returns the `Tally`.
"""

from heads.kernels.dispatch import IMPLS, Implementation, available, linear_nll
from heads.kernels.gradient import linear_cross_entropy
from heads.kernels.problem import NLLOptions, Problem
from heads.kernels.tally import Tally

__all__ = [
    "IMPLS",
    "Implementation",
    "NLLOptions",
    "Problem",
    "Tally",
    "available",
    "linear_cross_entropy",
    "linear_nll",
]
