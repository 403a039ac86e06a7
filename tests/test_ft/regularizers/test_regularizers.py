"""Contract tests of regularisers; one in REGULARIZERS without a case in MAKE fails."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import sines

from featcache.errors import FeatcacheError, MismatchError, TrainingError
from ft.regularizers import REGULARIZERS
from ft.regularizers.base import Regularizer, Step
from ft.regularizers.car import ContextDistillation
from ft.regularizers.carot import Orthogonality, SelfDistillation
from ft.regularizers.distill import FeatureDistillation, LogitDistillation, cosine_distance
from ft.regularizers.l2sp import L2SP, l2sp
from ft.regularizers.lipsum import Lipsum
from ft.regularizers.variance_covariance import VarianceCovariance, variance_covariance

N, D, C = 4, 6, 3
TEXTS = sines((7, D), 3.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MAKE: dict[str, list[Callable[[], Regularizer]]] = {
    "lipsum": [
        lambda: Lipsum.random(lambda ids: sines((20, D), 0.6)[ids].sum(1), 5.0, sot=18, eot=19, m=9, length=3),
        lambda: Lipsum.bank(TEXTS, 5.0, m=9),
        lambda: Lipsum.exact(TEXTS, 5.0),
    ],
    "variance_covariance": [VarianceCovariance],
    "l2sp": [L2SP],
    "feature_distillation": [FeatureDistillation, lambda: FeatureDistillation("cosine")],
    "logit_distillation": [LogitDistillation, lambda: LogitDistillation(3.0)],
    "orthogonality": [Orthogonality],
    "self_distillation": [SelfDistillation],
    "car": [lambda: ContextDistillation(sines((5, D), 1.5), 5.0)],
}
CASES = [pytest.param(name, make, id=f"{name}-{i}") for name, makes in MAKE.items() for i, make in enumerate(makes)]


def start(dtype: torch.dtype = torch.float64) -> Step:
    """A step of a model that equals the initial one."""
    features, logits, weight = (t.to(dtype) for t in (sines((N, D), 0.1), sines((N, C), 0.9, 4.0), sines((C, D), 2.2)))
    step = Step(features, features.clone(), logits, logits.clone(), {"w": weight}, {"w": weight.clone()})
    return replace(step, teacher_logits=logits.clone(), projection=weight)


def moved(step: Step, by: float = 0.1) -> Step:
    assert step.features is not None
    assert step.logits is not None
    assert step.parameters is not None
    weight = step.parameters["w"] + by * sines((C, D), 5.0).to(step.features)
    return replace(
        step,
        features=step.features + by * sines((N, D), 5.0).to(step.features),
        logits=step.logits + by * sines((N, C), 5.0).to(step.logits),
        parameters={"w": weight},
        projection=weight,
    )


def trained(step: Step) -> list[torch.Tensor]:
    assert step.parameters is not None
    return [value for value in (step.features, step.logits, step.parameters["w"]) if value is not None]


def doubled(step: Step) -> Step:
    assert step.parameters is not None
    assert step.initial_parameters is not None
    names = ("features", "frozen_features", "logits", "frozen_logits", "teacher_logits", "projection")
    tensors = {name: getattr(step, name).double() for name in names}
    parameters = {"w": step.parameters["w"].double()}
    return Step(**tensors, parameters=parameters, initial_parameters={"w": step.initial_parameters["w"].double()})


def value_and_gradients(term: Regularizer, step: Step) -> tuple[torch.Tensor, list[torch.Tensor]]:
    inputs = [value.requires_grad_() for value in trained(step)]
    value = term(step)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value, [gradient for gradient in gradients if gradient is not None]


def test_every_regulariser_has_contract_tests() -> None:
    assert MAKE.keys() == REGULARIZERS.keys()
    for name, makes in MAKE.items():
        assert all(isinstance(make(), REGULARIZERS[name]) for make in makes)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_zero_for_the_initial_model_with_zero_gradient(name: str, make: Callable[[], Regularizer]) -> None:
    value, gradients = value_and_gradients(make(), start())
    assert len(gradients) == 1
    if name not in ("orthogonality", "variance_covariance"):
        assert value.item() == 0
        assert gradients[0].abs().max() < 1e-15
    else:
        assert value.item() > 0


@pytest.mark.parametrize(("name", "make"), CASES)
def test_positive_after_a_change_with_a_gradient_that_undoes_it(name: str, make: Callable[[], Regularizer]) -> None:
    value, gradients = value_and_gradients(make(), moved(start()))
    assert value.ndim == 0
    assert value.item() > 0
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(("name", "make"), CASES)
def test_gradients_are_those_of_finite_differences(name: str, make: Callable[[], Regularizer]) -> None:
    term, step = make(), moved(start())

    def of(features: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the random modes draw the same texts every time
        return term(replace(step, features=features, logits=logits, parameters={"w": weight}, projection=weight))

    assert torch.autograd.gradcheck(of, [value.requires_grad_() for value in trained(step)])


@pytest.mark.parametrize(("name", "make"), CASES)
def test_frozen_side_gets_no_gradient(name: str, make: Callable[[], Regularizer]) -> None:
    step = moved(start())
    assert step.initial_parameters is not None
    frozen = [step.frozen_features, step.frozen_logits, step.teacher_logits, step.initial_parameters["w"]]
    for value in [*frozen, *trained(step)]:
        assert value is not None
        value.requires_grad_()
    make()(step).backward()
    assert all(value is not None and value.grad is None for value in frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_computes_in_float32_or_wider(name: str, make: Callable[[], Regularizer], dtype: torch.dtype) -> None:
    step = moved(start(dtype), 0.5)
    torch.manual_seed(0)
    value = make()(step)
    torch.manual_seed(0)
    exact = make()(doubled(step))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_needs_lists_the_fields_in_use(name: str, make: Callable[[], Regularizer]) -> None:
    needs, full = REGULARIZERS[name].needs, moved(start())
    make()(Step(**{field: getattr(full, field) for field in needs}))
    for field in needs:
        with pytest.raises(TrainingError, match=field):
            make()(replace(full, **{field: None}))


def test_shapes_must_agree() -> None:
    step = replace(start(), frozen_features=sines((N + 1, D), 0.1))
    with pytest.raises(TrainingError, match=r"\(4, 6\).*\(5, 6\)"):
        FeatureDistillation()(step)


def test_variance_covariance_uses_numpys_covariance() -> None:
    features = sines((9, 5), 0.4, 0.7)
    covariance = torch.cov(features.T)
    off = covariance[~torch.eye(5, dtype=torch.bool)]
    terms = variance_covariance(features)
    torch.testing.assert_close(terms.covariance, off.square().mean())
    torch.testing.assert_close(terms.variance, (1 - (covariance.diagonal() + 1e-7).sqrt()).clamp(min=0).mean())


def test_variance_covariance_needs_two_rows() -> None:
    with pytest.raises(TrainingError, match="at least 2"):
        variance_covariance(torch.ones(1, 5))


def test_l2sp_sums_and_decays_new_parameters_only_with_beta() -> None:
    now = {"w": torch.full((2, 2), 3.0), "head": torch.full((4,), 2.0)}
    then = {"w": torch.ones(2, 2), "unused": torch.ones(1)}
    assert l2sp(now, then).item() == 0.5 * 16
    assert l2sp(now, then, beta=0.01).item() == pytest.approx(0.5 * 16 + 0.005 * 16)


def test_l2sp_refuses_another_model() -> None:
    with pytest.raises(MismatchError, match="no parameter"):
        l2sp({"w": torch.ones(2)}, {"v": torch.ones(2)})
    with pytest.raises(MismatchError, match=r"w \(3,\) against \(2,\)"):
        l2sp({"w": torch.ones(2)}, {"w": torch.ones(3)})


def test_feature_distillation_equals_torch() -> None:
    step = moved(start())
    now, then = step.features, step.frozen_features
    assert now is not None
    assert then is not None
    torch.testing.assert_close(FeatureDistillation()(step), torch.nn.functional.mse_loss(now, then))
    cosine = torch.nn.functional.cosine_similarity(now, then).mean()
    torch.testing.assert_close(FeatureDistillation("cosine")(step), 1 - cosine)
    torch.testing.assert_close(cosine_distance(now, then), cosine_distance(9 * now, then / 7))


def test_logit_distillation_is_kl_times_temperature_squared() -> None:
    step, T = moved(start()), 2.5
    assert step.logits is not None
    assert step.frozen_logits is not None
    p, q = (step.frozen_logits / T).softmax(-1), (step.logits / T).softmax(-1)
    expected = T**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(LogitDistillation(T)(step), expected)


def test_orthogonality_is_numpys_frobenius_norm() -> None:
    projection = sines((7, D), 0.3)
    gram = projection.numpy().T @ projection.numpy() - np.eye(D)
    assert Orthogonality()(Step(projection=projection)).item() == pytest.approx(np.sqrt((gram**2).sum()), rel=1e-6)


def test_self_distillation_of_pairs_has_both_directions() -> None:
    now, then = sines((N, N), 0.2, 3.0), sines((N, N), 1.1, 3.0)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1).mean()

    rows, columns = (kl(t.softmax(-1), s.softmax(-1)) for t, s in ((then, now), (then.T, now.T)))
    step = Step(logits=now, teacher_logits=then)
    torch.testing.assert_close(SelfDistillation()(step), rows)
    torch.testing.assert_close(SelfDistillation()(replace(step, paired=True)), rows + columns)


def test_car_is_kl_of_context_distributions() -> None:
    ctx, step = sines((5, D), 1.5, 3.0), moved(start())
    assert step.features is not None
    assert step.frozen_features is not None

    def contexts(features: torch.Tensor) -> torch.Tensor:
        return (5 * torch.nn.functional.cosine_similarity(features[:, None], ctx[None], dim=-1)).softmax(-1)

    p, q = contexts(step.frozen_features), contexts(step.features)
    torch.testing.assert_close(ContextDistillation(ctx, 5.0)(step), (p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureDistillation("l1"), "'mse' or 'cosine'"),
        (lambda: LogitDistillation(0.0), "positive"),
        (lambda: ContextDistillation(torch.ones(1, 4), 100.0), "two templates"),
        (lambda: Lipsum.exact(torch.ones(4), 100.0), r"\(K, D\)"),
    ],
)
def test_refuses_bad_settings(make: Callable[[], Regularizer], message: str) -> None:
    with pytest.raises(FeatcacheError, match=message):
        make()
