import pytest

from featcache.errors import TrainingError
from ft.training.optim import lipsum_schedule, wise_ft_schedule


@pytest.mark.parametrize("n_iters", [2, 9, 10, 15, 4999])
def test_lipsum_schedule_ends_at_zero_for_any_length(n_iters: int) -> None:
    rates = [lipsum_schedule(step, 1.0, n_iters) for step in range(n_iters + 1)]
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert rates.index(max(rates)) == n_iters // 10
    assert max(rates) == 1.0


def test_wise_ft_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert wise_ft_schedule(0, 0.1, 0, 10) == 0.1


def test_wise_ft_schedule_of_warm_up_alone() -> None:
    assert [wise_ft_schedule(step, 1.0, 2, 2) for step in range(4)] == [0.5, 1.0, 0.0, 0.0]


def test_schedules_refuse_invalid_runs() -> None:
    with pytest.raises(TrainingError, match="at least 2 updates"):
        lipsum_schedule(0, 1.0, 1)
    with pytest.raises(TrainingError, match="step -1"):
        lipsum_schedule(-1, 1.0, 10)
    with pytest.raises(TrainingError, match="total 0"):
        wise_ft_schedule(0, 1.0, 0, 0)
