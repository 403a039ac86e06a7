"""Logits, NLL and counts of many linear heads without an array of logits (N, C).

`linear_nll` is the one door to judge heads; `linear_cross_entropy` is for fitting them, with gradients.
`heads.kernels.reference` says in a few lines of torch what the first computes; every other implementation of `IMPLS` is
held to it. A new one is one file and one line there: a module with ``require(problem)``, which raises where it cannot
run, and ``run(problem)``, which gives the `Tally`.
"""

from heads.kernels.dispatch import IMPLS, Implementation, available, linear_nll
from heads.kernels.gradient import linear_cross_entropy
from heads.kernels.problem import Problem
from heads.kernels.tally import Tally

__all__ = ["IMPLS", "Implementation", "Problem", "Tally", "available", "linear_cross_entropy", "linear_nll"]
