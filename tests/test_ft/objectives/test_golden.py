"""Published values, in float64, to all printed digits."""

import pytest
import torch
from golden import CE, LABELS, SCALE, SMOOTH_CE, TEXTS, V0, WEIGHTS, R, V, sines

from featcache.encoding.banks import second_moment
from ft.merging.interpolate import interpolate
from ft.objectives import cross_entropy
from ft.regularizers.base import Step
from ft.regularizers.lipsum import Lipsum, over_moment, over_texts
from ft.regularizers.variance_covariance import VarianceCovariance, variance_covariance
from ft.training.optim import lipsum_schedule, wise_ft_schedule


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-14, abs=1e-16)


def test_lipsum_as_sum_and_as_quadratic_form() -> None:
    assert over_texts(V, V0, TEXTS, SCALE).item() == exactly(R)
    assert over_moment(V, V0, second_moment(TEXTS).matrix, SCALE).item() == pytest.approx(R, rel=1e-13)


def test_lipsum_scales_with_the_squared_logit_scale() -> None:
    assert over_texts(V, V0, TEXTS, 1.0).item() == exactly(R * 1e-4)


def test_lipsum_of_a_step_normalises_features() -> None:
    step = Step(features=3 * V, frozen_features=0.2 * V0)
    assert Lipsum.exact(TEXTS, SCALE)(step).item() == pytest.approx(R, rel=1e-12)


def test_cross_entropy_and_total() -> None:
    logits = SCALE * V @ WEIGHTS.T
    assert cross_entropy(logits, LABELS).item() == exactly(CE)
    assert cross_entropy(logits, LABELS, 0.1).item() == exactly(SMOOTH_CE)
    total = cross_entropy(logits, LABELS) + over_texts(V, V0, TEXTS, SCALE)
    assert total.item() == exactly(23.384223849425616)


@pytest.mark.parametrize(
    ("scale", "variance", "covariance", "total"),
    [
        (0.5, 0.6219371917314857, 0.011022009088115558, 0.09973039085880002),
        (2.0, 0.0, 2.8216343265575827, 0.05643268653115165),
    ],
)
def test_variance_covariance(scale: float, variance: float, covariance: float, total: float) -> None:
    features = sines((5, 4), 0.3, scale)
    terms = variance_covariance(features)
    assert terms.variance.item() == exactly(variance)
    assert terms.covariance.item() == exactly(covariance)
    assert VarianceCovariance(0.16, 0.02)(Step(features=features)).item() == exactly(total)


def test_fisher_merge() -> None:
    one, three, half, two = ({"w": torch.tensor(value, dtype=torch.float64)} for value in (1.0, 3.0, 0.5, 2.0))
    assert interpolate(one, three, 0.3, half, two)["w"].item() == exactly(2.263157894736842)
    assert interpolate(one, three, 0.3)["w"].item() == exactly(1.6)


@pytest.mark.parametrize(
    ("fraction", "rate"),
    [(0, 0.0), (1, 2.0e-8), (250, 5.0e-6), (499, 9.98e-6), (500, 1.0e-5), (5000, 0.0), (6000, 0.0)],
)
@pytest.mark.parametrize("factor", [1, 10])
def test_lipsum_schedule(fraction: int, rate: float, factor: int) -> None:
    if fraction == 1 and factor == 10:
        rate = 1.0e-5 * 10 / 5000
    assert lipsum_schedule(fraction * factor, 1e-5, 5000 * factor) == exactly(rate)


def test_lipsum_schedule_on_the_cosine() -> None:
    assert lipsum_schedule(2500, 1e-5, 5000) == pytest.approx(5.86824e-6, abs=5e-12)


@pytest.mark.parametrize(
    ("step", "rate", "digits"),
    [
        (0, 6.0e-8, 1e-14),
        (249, 1.5e-5, 1e-14),
        (499, 3e-5, 1e-14),
        (500, 3e-5, 1e-14),
        (12760, 1.5e-5, 1e-14),
        (25019, 1.23e-13, 5e-3),
        (25020, 0.0, 1e-14),
    ],
)
def test_wise_ft_schedule(step: int, rate: float, digits: float) -> None:
    assert wise_ft_schedule(step, 3e-5, 500, 25020) == pytest.approx(rate, rel=digits, abs=1e-20)
