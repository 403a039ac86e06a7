"""Lipsum regularisation: preserve the similarities of images to random texts.

With unit image features v (trained) and v0 (frozen) of N images, unit features t_m of M random texts and the
exponentiated logit scale s:

``R = mean_n sum_m (s v_n.t_m - s v0_n.t_m)^2 / (2 M)``

This is a quadratic form, ``R = s^2 / 2 mean_n (v_n - v0_n)^T G (v_n - v0_n)`` with ``G = sum_m t_m t_m^T / M`` (D, D).
Three modes have the same expectation: new random texts in every step (`Lipsum.random`, as in the paper), rows drawn
from a bank of stored text features (`Lipsum.bank`), and the expectation over that bank (`Lipsum.exact`). The last needs
no text tower, and its only sampling noise is that of the bank, which `second_moment` reports.

Both similarities include the scale (about 100). The paper's formula omits it; without it, lambda has to be 10^4 times
larger.

Paper: Nam et al., Lipsum-FT: Robust fine-tuning of zero-shot models using random text guidance (arXiv 2404.00860).
"""

from collections.abc import Callable
from typing import Annotated, Self

import torch

from featcache.encoding.banks import SecondMoment, random_texts, second_moment
from featcache.errors import TrainingError
from featcache.parameters import Count, OneOf
from ft.regularizers.base import Constant, Regularizer, Setting, Step, unit, wide

M = 80
LENGTH = 8
BANK = 10_000


def over_texts(v: torch.Tensor, v0: torch.Tensor, texts: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """R as a sum over texts, for unit features `v`, `v0` (N, D) and `texts` (M, D), with an exponentiated scale.

    >>> v, v0 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> over_texts(v, v0, torch.eye(2), 1.0).item()  # (1 + 1) / (2 * 2)
    0.5
    """
    difference = logit_scale * (v - v0) @ texts.detach().to(v).T
    return difference.square().sum(-1).mean() / (2 * len(texts))


def over_moment(v: torch.Tensor, v0: torch.Tensor, moment: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """R as a quadratic form; equals `over_texts` for texts with second moment `moment` (D, D).

    >>> v, v0 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> over_moment(v, v0, second_moment(torch.eye(2)).matrix, 1.0).item()
    0.5
    """
    difference = v - v0
    return 0.5 * logit_scale**2 * (difference @ moment.detach().to(v) * difference).sum(-1).mean()


class Lipsum(Regularizer):
    """Lipsum regularisation; use `random`, `bank` or `exact` to make one.

    `term` computes R from unit features v and v0 (N, D), as `over_texts` and `over_moment` do.

    >>> lipsum = Lipsum.exact(torch.eye(2), logit_scale=1.0)
    >>> step = Step(features=torch.tensor([[3.0, 0.0]]), frozen_features=torch.tensor([[0.0, 2.0]]))
    >>> lipsum(step).item()
    0.5
    """

    needs = frozenset({"features", "frozen_features"})
    separable = True

    def __init__(self, term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._term = term

    @classmethod
    def random(
        cls,
        encode_text: Callable[[torch.Tensor], torch.Tensor],
        logit_scale: float,
        *,
        sot: int,
        eot: int,
        m: int = M,
        length: int = LENGTH,
        context_length: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """`m` new random texts in every step, as in the paper; see `random_texts`.

        `encode_text` maps token ids (M, L) on the CPU to text features (M, D), not normalised; it is called without
        gradients.
        """

        def term(v: torch.Tensor, v0: torch.Tensor) -> torch.Tensor:
            ids = random_texts(m, length, sot, eot, generator, context_length=context_length)
            with torch.no_grad():
                texts = unit(wide(encode_text(ids)))
            return over_texts(v, v0, texts, logit_scale)

        return cls(term)

    @classmethod
    def bank(
        cls, bank: torch.Tensor, logit_scale: float, *, m: int = M, generator: torch.Generator | None = None
    ) -> Self:
        """`m` rows of a bank of text features (K, D) per step, drawn with replacement by a CPU generator."""
        rows = Constant(unit(wide(bank)))

        def term(v: torch.Tensor, v0: torch.Tensor) -> torch.Tensor:
            drawn = torch.randint(0, len(bank), (m,), generator=generator)
            return over_texts(v, v0, rows.like(v)[drawn.to(v.device)], logit_scale)

        return cls(term)

    @classmethod
    def exact(cls, bank: torch.Tensor | SecondMoment, logit_scale: float) -> Self:
        """The expectation over a bank of text features (K, D), or over the texts of a `second_moment`."""
        moment = bank if isinstance(bank, SecondMoment) else second_moment(unit(wide(bank)))
        matrix = Constant(moment.matrix)
        return cls(lambda v, v0: over_moment(v, v0, matrix.like(v), logit_scale))

    @classmethod
    def from_setting(
        cls,
        setting: Setting,
        *,
        mode: Annotated[str, OneOf("random", "bank", "exact")] = "random",
        m: Count = M,
        length: Count = LENGTH,
        bank: str | Count | None = None,
    ) -> Self:
        """Lipsum regularisation in one of the three modes.

        Raises TrainingError if the mode is unknown, or ``random`` is given a bank.

        Parameters
        ----------
        mode : {"random", "bank", "exact"}
        m, length : texts per step, and random ids per text (``random``)
        bank : a stored bank, or the number of texts of a new one; default: 10,000 texts (``bank``, ``exact``)
        """
        if mode == "random" and bank is None:
            sot, eot, _, context = setting.special_tokens
            return cls.random(
                setting.encode_tokens,
                setting.logit_scale,
                sot=sot,
                eot=eot,
                m=m,
                length=length,
                context_length=context,
                generator=setting.generator,
            )
        if mode == "bank":
            rows = setting.bank(BANK if bank is None else bank)
            return cls.bank(rows, setting.logit_scale, m=m, generator=setting.generator)
        if mode == "exact":
            return cls.exact(setting.moment(BANK if bank is None else bank), setting.logit_scale)
        raise TrainingError(f"lipsum mode {mode!r}, bank {bank!r}: expected random (without a bank), bank, or exact")

    def __call__(self, step: Step) -> torch.Tensor:
        """R of the features of a step."""
        now, then = step.pair("features", "frozen_features")
        return self._term(unit(now), unit(then))
