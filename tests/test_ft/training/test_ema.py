import pytest
import torch

from featcache.errors import MismatchError, TrainingError
from ft.training.averages import EMA, SWA


def states(n: int, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(3, generator=generator, dtype=torch.float64).to(dtype), "count": torch.tensor(k)}
        for k in range(n)
    ]


def test_ema_follows_its_closed_form() -> None:
    models, decay = states(9), 0.8
    ema = EMA(models[0], decay)
    for model in models[1:]:
        ema.update(model)
    weights = [decay**8] + [(1 - decay) * decay ** (8 - k) for k in range(1, 9)]
    expected = sum(weight * model["w"] for weight, model in zip(weights, models, strict=True))
    torch.testing.assert_close(ema.state_dict()["w"], expected)
    assert ema.state_dict()["count"].item() == 8


def test_ema_warm_up_forgets_the_start_sooner() -> None:
    start, later = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    ema = EMA(start, 0.999, warmup=True)
    ema.update(later)
    assert ema.state_dict()["w"].item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    ema.update(start)
    assert ema.state_dict()["w"].item() == pytest.approx(0.9 * 2 / 11)


def test_swa_is_the_mean_and_excludes_its_initial_state() -> None:
    template, *models = states(7)
    swa = SWA(template)
    for model in models:
        swa.update(model)
    torch.testing.assert_close(swa.state_dict()["w"], torch.stack([model["w"] for model in models]).mean(0))


def test_half_precision_weights_are_averaged_in_float32() -> None:
    ema = EMA({"w": torch.zeros(1, dtype=torch.bfloat16)}, 0.999)
    for _ in range(1000):
        ema.update({"w": torch.ones(1, dtype=torch.bfloat16)})
    average = ema.state_dict()["w"]
    assert average.dtype == torch.bfloat16
    assert average.item() == pytest.approx(1 - 0.999**1000, rel=4e-3)


@pytest.mark.parametrize("make", [lambda state: EMA(state, 0.9, warmup=True), SWA])
def test_resumed_equals_uninterrupted_bit_for_bit(make: type[SWA]) -> None:
    models = states(8, torch.float32)
    whole, first, second = make(models[0]), make(models[0]), make(models[0])
    for model in models:
        whole.update(model)
    for model in models[:3]:
        first.update(model)
    second.resume(first.resume_state())
    for model in models[3:]:
        second.update(model)
    assert torch.equal(whole.state_dict()["w"], second.state_dict()["w"])
    assert second.count == 8


def test_average_shares_no_memory_with_the_model() -> None:
    model = torch.nn.Linear(2, 2)
    ema = EMA(model.state_dict(), 0.5)
    before = ema.state_dict()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(ema.state_dict()["weight"], before["weight"])


def test_refuses_other_models_and_bad_settings() -> None:
    ema = EMA({"w": torch.zeros(2)})
    with pytest.raises(MismatchError, match="new model lacks w"):
        ema.update({"v": torch.zeros(2)})
    with pytest.raises(TrainingError, match="resume_state"):
        ema.resume({"w": torch.zeros(2)})
    with pytest.raises(TrainingError, match="decay 1"):
        EMA({"w": torch.zeros(2)}, 1)
    with pytest.raises(TrainingError, match="at least once"):
        SWA({"w": torch.zeros(2)}).state_dict()
