from pathlib import Path

import pytest
import torch
from golden import sines

from featcache.errors import MismatchError, TrainingError
from ft.checkpoints.folder import write_state
from ft.merging.interpolate import interpolate, soup

State = dict[str, torch.Tensor]


def model(phase: float, dtype: torch.dtype = torch.float32) -> State:
    return {
        "visual.weight": sines((3, 4), phase).to(dtype),
        "visual.bias": torch.tensor([-0.0, phase]).to(dtype),
        "text.weight": sines((2, 2), 0.3).to(dtype),  # the same in every model
        "logit_scale": torch.tensor(phase, dtype=dtype),
        "visual.positions": torch.arange(4),
    }


def equal(one: State, two: State) -> bool:
    """Bit for bit, including the sign of zero."""
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype
        and torch.equal(one[key], two[key])
        and torch.equal(one[key].signbit(), two[key].signbit())
        for key in one
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_alpha_0_and_1_give_the_models_bit_for_bit(dtype: torch.dtype, weighted: bool) -> None:
    zero, one = model(0.1, dtype), model(2.0, dtype)
    fishers = [{"visual.weight": sines((3, 4), phase).abs()} for phase in (0.4, 1.2)] if weighted else []
    for alpha, end in ((0.0, zero), (1.0, one)):
        merged = interpolate(zero, one, alpha, *fishers)
        assert equal(merged, end)
        assert all(merged[key].data_ptr() != end[key].data_ptr() for key in end)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.25, 0.5, -0.5, 1.7])
def test_every_key_follows_the_formula_and_keeps_its_dtype(dtype: torch.dtype, alpha: float) -> None:
    zero, one = model(0.1, dtype), model(2.0, dtype)
    merged = interpolate(zero, one, alpha)
    assert list(merged) == list(zero)
    for key in ("visual.weight", "visual.bias", "logit_scale"):
        expected = (1 - alpha) * zero[key].double() + alpha * one[key].double()
        assert merged[key].dtype == dtype
        assert torch.equal(merged[key], expected.to(dtype)), key  # rounded once
    assert torch.equal(merged["visual.positions"], zero["visual.positions"])


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1 / 3])
def test_shared_tensors_are_kept_bit_for_bit(alpha: float) -> None:
    zero, one = model(0.1, torch.float64), model(2.0, torch.float64)
    fisher = {"text.weight": sines((2, 2), 1.0).abs()}
    for merged in (
        interpolate(zero, one, alpha),
        interpolate(zero, one, alpha, fisher, fisher),
        soup([zero, one, zero]),
    ):
        assert torch.equal(merged["text.weight"], zero["text.weight"])


def test_mixed_dtypes_give_the_wider() -> None:
    merged = interpolate({"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([2.0])}, 0.5)
    assert merged["w"].dtype == torch.float32
    assert merged["w"].item() == 1.5


def test_inputs_are_not_modified() -> None:
    zero, one = model(0.1), model(2.0)
    one["visual.weight"].requires_grad_()
    merged = interpolate(zero, one, 0.5)
    merged["visual.weight"].zero_()
    assert not merged["visual.weight"].requires_grad
    assert torch.equal(zero["visual.weight"], model(0.1)["visual.weight"])


def test_fisher_weights_each_element_with_a_floor() -> None:
    zero, one = {"w": torch.tensor([1.0, 1.0, 1.0]).double()}, {"w": torch.tensor([3.0, 3.0, 3.0]).double()}
    f0, f1 = {"w": torch.tensor([0.5, 0.0, 1.0])}, {"w": torch.tensor([2.0, 0.0, 0.0])}
    merged = interpolate(zero, one, 0.3, f0, f1)["w"].tolist()
    assert merged[0] == pytest.approx(2.263157894736842, rel=1e-14)
    assert merged[1] == pytest.approx(1.6, rel=1e-14)  # both at the floor: plain
    assert merged[2] == pytest.approx((0.7 * 1 + 0.3e-8 * 3) / (0.7 + 0.3e-8), rel=1e-14)
    assert interpolate(zero, one, 0.3, f0, f1, floor=10.0)["w"].tolist() == pytest.approx([1.6] * 3)


def test_keys_without_fisher_are_interpolated_plainly() -> None:
    zero, one = model(0.1), model(2.0)
    fisher = {"logit_scale": torch.tensor(2.0)}
    merged, plain = interpolate(zero, one, 0.3, fisher, {"logit_scale": torch.tensor(1.0)}), interpolate(zero, one, 0.3)
    assert torch.equal(merged["visual.weight"], plain["visual.weight"])
    assert merged["logit_scale"] != plain["logit_scale"]


def test_refuses_a_fisher_of_one_side_or_of_another_model() -> None:
    zero, one = model(0.1), model(2.0)
    fisher = {"logit_scale": torch.tensor(2.0)}
    with pytest.raises(MismatchError, match="Fisher of theta1 lacks logit_scale"):
        interpolate(zero, one, 0.5, fisher)
    with pytest.raises(MismatchError, match="the model lacks head"):
        interpolate(zero, one, 0.5, {"head": torch.ones(1)}, {"head": torch.ones(1)})
    with pytest.raises(MismatchError, match=r"logit_scale \(\) against \(2,\)"):
        interpolate(zero, one, 0.5, *[{"logit_scale": torch.ones(2)}] * 2)
    with pytest.raises(TrainingError, match=r"in \[0, 1\]"):
        interpolate(zero, one, 1.1, fisher, fisher)
    with pytest.raises(TrainingError, match="floor"):
        interpolate(zero, one, 0.5, fisher, fisher, floor=0.0)


def test_refuses_other_keys_and_shapes_by_name() -> None:
    zero, one = model(0.1), model(2.0)
    one["visual.extra"] = one.pop("visual.bias")
    with pytest.raises(MismatchError, match=r"theta1 lacks visual\.bias; theta0 lacks visual\.extra"):
        interpolate(zero, one, 0.5)
    with pytest.raises(MismatchError, match=r"model 2 lacks visual\.bias"):
        soup([zero, one])
    with pytest.raises(MismatchError, match=r"logit_scale \(\) against \(1,\)"):
        interpolate(zero, zero | {"logit_scale": torch.ones(1)}, 0.5)
    many = {f"layer{n}": torch.ones(1) for n in range(9)}
    with pytest.raises(MismatchError, match="layer4 and 4 more"):
        interpolate(many, {}, 0.5)


def test_integer_buffers_except_batch_counters_must_agree() -> None:
    zero, one = model(0.1), model(2.0)
    one["visual.positions"] = one["visual.positions"] + 1
    with pytest.raises(MismatchError, match=r"visual\.positions differs"):
        interpolate(zero, one, 0.5)
    with pytest.raises(MismatchError, match=r"visual\.positions differs"):
        soup([zero, one])
    assert torch.equal(interpolate(zero, one, 1.0)["visual.positions"], one["visual.positions"])
    counters = [{"bn.num_batches_tracked": torch.tensor(n)} for n in (0, 5000)]
    assert interpolate(counters[0], counters[1], 0.5)["bn.num_batches_tracked"].item() == 5000


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_refuses_alpha_that_is_not_finite(alpha: float) -> None:
    with pytest.raises(TrainingError, match="finite"):
        interpolate(model(0.1), model(2.0), alpha)


def test_soup_is_the_mean_and_of_two_an_interpolation() -> None:
    models = [model(phase) for phase in (0.1, 1.0, 2.0)]
    mean = torch.stack([one["visual.weight"].double() for one in models]).mean(0).float()
    torch.testing.assert_close(soup(models)["visual.weight"], mean, rtol=1e-7, atol=1e-8)
    for weights in ([0.75, 0.25], [3, 1]):
        weighted, path = soup(models[:2], weights), interpolate(models[0], models[1], 0.25)
        assert all(torch.equal(weighted[key], path[key]) for key in path)
    assert equal(soup(models, [0, 1, 0]), models[1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [float("nan"), 1.0]])
def test_refuses_bad_soup_weights(weights: list[float]) -> None:
    with pytest.raises(TrainingError, match="as many finite numbers"):
        soup([model(0.1), model(2.0)], weights)


def test_refuses_an_empty_soup() -> None:
    with pytest.raises(TrainingError, match="no models"):
        soup([])


def test_checkpoints_are_named_in_place_of_state_dicts(tmp_path: Path) -> None:
    one, two = model(0.1), model(0.9)
    first, second = str(tmp_path / "one.safetensors"), tmp_path / "two.safetensors"
    write_state(one, first)
    write_state(two, second)
    assert equal(interpolate(first, second, 0.25), interpolate(one, two, 0.25))
    assert equal(soup([first, two]), soup([one, two]))


def test_several_alphas_are_for_wise() -> None:
    with pytest.raises(TrainingError, match=r"ft\.wise takes several"):
        interpolate(model(0.1), model(0.9), [0.0, 0.5])
