"""Lipsum: three modes with one expectation."""

import itertools
from typing import Any

import clip_models
import pytest
import torch
from golden import SCALE, V0, V, sines

from featcache.encoding.banks import random_texts, second_moment
from featcache.errors import PromptError
from ft.regularizers.base import Step, unit
from ft.regularizers.lipsum import Lipsum, over_moment, over_texts

SOT, EOT = 4, 5
EMBEDDING = sines((6, 6), 2.0) + 0.5 * sines((6, 6), 0.3).T
DRAWS = 4000


def encode(ids: torch.Tensor) -> torch.Tensor:
    """A text tower small enough to know its mean: four ids, two places, 16 texts."""
    return EMBEDDING[ids[:, 1]] + 0.7 * EMBEDDING[ids[:, 2]].square()


def all_texts() -> torch.Tensor:
    ids = torch.tensor([[SOT, a, b, EOT] for a, b in itertools.product(range(4), repeat=2)])
    return unit(encode(ids))


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 2), (5, 80, 16), (33, 7, 64)])
def test_quadratic_form_equals_sum_over_texts(n: int, m: int, dim: int) -> None:
    v, v0, texts = (unit(sines((rows, dim), phase)) for rows, phase in ((n, 0.1), (n, 0.4), (m, 3.0)))
    inputs = [v.clone().requires_grad_() for _ in range(2)]
    values = [over_texts(inputs[0], v0, texts, SCALE), over_moment(inputs[1], v0, second_moment(texts).matrix, SCALE)]
    gradients = [torch.autograd.grad(value, x)[0] for value, x in zip(values, inputs, strict=True)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10 * gradients[0].abs().max().item())


@pytest.mark.parametrize("mode", ["random", "bank"])
def test_draws_are_unbiased_in_value_and_in_every_coordinate_of_the_gradient(mode: str) -> None:
    generator = torch.Generator().manual_seed(20)
    if mode == "random":
        sampled = Lipsum.random(encode, 5.0, sot=SOT, eot=EOT, m=3, length=2, generator=generator)
    else:
        sampled = Lipsum.bank(all_texts(), 5.0, m=3, generator=generator)
    expected = value_and_gradient(Lipsum.exact(all_texts(), 5.0))
    draws = torch.stack([value_and_gradient(sampled) for _ in range(DRAWS)])
    z = (draws.mean(0) - expected) / (draws.std(0) / DRAWS**0.5)
    assert draws.std(0).min() > 0
    assert z.abs().max() < 5


def value_and_gradient(lipsum: Lipsum) -> torch.Tensor:
    features = V.clone().requires_grad_()
    value = lipsum(Step(features=features, frozen_features=V0))
    return torch.cat([value.detach()[None], torch.autograd.grad(value, features)[0].reshape(-1)])


def test_biased_sampler_fails_the_unbiasedness_test() -> None:
    generator = torch.Generator().manual_seed(20)
    sampled = Lipsum.bank(all_texts()[1:], 5.0, m=3, generator=generator)  # one text of 16 never drawn
    expected = value_and_gradient(Lipsum.exact(all_texts(), 5.0))
    draws = torch.stack([value_and_gradient(sampled) for _ in range(DRAWS // 4)])
    assert ((draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)).abs().max() > 5


def test_random_mode_draws_anew_and_repeats_under_a_seed() -> None:
    first, again = (
        Lipsum.random(encode, 5.0, sot=SOT, eot=EOT, m=3, length=2, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    values = [value_and_gradient(first)[0].item() for _ in range(4)]
    assert len(set(values)) > 1
    assert values == [value_and_gradient(again)[0].item() for _ in range(4)]


def test_exact_takes_a_stored_second_moment() -> None:
    moment = second_moment(all_texts())
    step = Step(features=V, frozen_features=V0)
    assert Lipsum.exact(moment, 5.0)(step).item() == pytest.approx(
        Lipsum.exact(all_texts(), 5.0)(step).item(), rel=1e-12
    )


def test_second_moment_reports_its_error() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = second_moment(all_texts()).matrix
    sizes, errors, estimates = (50, 800), [], []
    for size in sizes:
        banks = [second_moment(all_texts()[torch.randint(0, 16, (size,), generator=generator)]) for _ in range(200)]
        actual = torch.stack([(bank.matrix - truth).norm() / truth.norm() for bank in banks])
        errors.append(actual.square().mean().sqrt().item())
        estimates.append(sum(bank.error for bank in banks) / len(banks))
        assert banks[0].size == size
    assert estimates == pytest.approx(errors, rel=0.1)
    assert second_moment(all_texts()[:1]).error == float("inf")


def test_random_texts_of_clips_vocabulary() -> None:
    texts = random_texts(500, 8, 49406, 49407, torch.Generator().manual_seed(0))
    assert texts.shape == (500, 10)
    assert texts.dtype == torch.int64
    assert (texts[:, 0] == 49406).all()
    assert (texts[:, -1] == 49407).all()
    assert (texts.argmax(1) == 9).all()  # where CLIP pools
    inner = texts[:, 1:-1]
    assert inner.min() >= 0
    assert inner.max() <= 49405
    assert abs(inner.double().mean() / 49405 - 0.5) < 5 / (12 * inner.numel()) ** 0.5


@pytest.mark.parametrize(("sot", "eot", "size"), [(4, 5, None), (5, 4, 6), (0, 1, 6), (2, 5, 6), (1, 3, 6)])
def test_random_texts_draw_every_other_id_equally_often(sot: int, eot: int, size: int | None) -> None:
    texts = random_texts(2000, 8, sot, eot, torch.Generator().manual_seed(0), vocab_size=size)
    counts = torch.bincount(texts[:, 1:-1].flatten(), minlength=6)
    others = [token for token in range(6) if token not in (sot, eot)]
    assert counts[[sot, eot]].sum() == 0
    assert (counts[others] - 4000).abs().max() < 5 * (16000 * 0.25 * 0.75) ** 0.5


def test_random_texts_are_padded_for_towers_of_fixed_length() -> None:
    short, padded = (
        random_texts(3, 2, 4, 5, torch.Generator().manual_seed(0), context_length=length) for length in (None, 7)
    )
    assert padded.shape == (3, 7)
    assert torch.equal(padded[:, :4], short)
    assert (padded[:, 4:] == 0).all()


def test_padding_does_not_reach_the_feature_of_a_causal_tower() -> None:
    model: Any = clip_models.make_model().eval()
    texts = random_texts(3, 8, 49406, 49407, torch.Generator().manual_seed(0), context_length=16)
    other = texts.clone()
    other[:, 10:] = 321
    with torch.no_grad():
        assert torch.equal(model.encode_text(texts), model.encode_text(other))
    lipsum = Lipsum.random(model.encode_text, 100.0, sot=49406, eot=49407, context_length=16)
    v, v0 = sines((4, 24), 0.1).float(), sines((4, 24), 0.5).float()
    assert lipsum(Step(features=v, frozen_features=v0)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 8, 4, 5), "at least"), ((1, 8, 4, 4), "two different"), ((1, 8, 0, 1), "an id beside")],
)
def test_random_texts_refuse_empty_vocabularies(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        random_texts(*arguments)


def test_random_texts_refuse_too_short_a_context() -> None:
    with pytest.raises(PromptError, match="use 6 ids"):
        random_texts(1, 8, 4, 5, context_length=8)
