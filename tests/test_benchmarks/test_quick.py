"""The quick benchmark's table: regressions are told from noise, and fail."""

import json
from pathlib import Path

import pytest

from benchmarks import quick

SPEED, TIME = "times faster", "time over that of the product"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = tmp_path / "quick.json"
    monkeypatch.setattr(quick, "RECORD", record)
    monkeypatch.setattr(quick, "RUNS", {"one": ("bench_one",)})

    def call(speed: float, time: float, *arguments: str) -> tuple[int, str]:
        bars = {
            SPEED: {"value": speed, "bar": 10.0, "met": speed >= 10},
            TIME: {"value": time, "bar": 1.3, "met": time <= 1.3},
        }
        monkeypatch.setattr(quick, "measured", lambda name: bars)
        return quick.main(list(arguments)), capsys.readouterr().out

    assert call(20.0, 1.1, "--update")[0] == 0
    assert json.loads(record.read_text())["ratios"]["one"][SPEED]["value"] == 20.0
    return call


def test_equal_and_slightly_worse_ratios_pass(run) -> None:
    for speed, time in ((20.0, 1.1), (18.0, 1.2), (40.0, 0.5)):
        status, out = run(speed, time)
        assert status == 0
        assert "WORSE" not in out


def test_a_missed_bar_is_reported_but_is_not_a_regression(run) -> None:
    run(9.0, 1.1, "--update")
    status, out = run(9.0, 1.1)
    assert status == 0
    assert out.count("missed") == 1


@pytest.mark.parametrize(("speed", "time", "name"), [(15.0, 1.1, SPEED), (20.0, 1.4, TIME)])
def test_a_ratio_that_fell_behind_fails(run, speed: float, time: float, name: str) -> None:
    status, out = run(speed, time)
    assert status == 1
    (line,) = [line for line in out.splitlines() if line.startswith("WORSE")]
    assert name in line


def test_every_bar_of_a_cpu_has_a_run() -> None:
    """Ridge's four, logistic's two, and one or more of every other benchmark that states a bar for speed."""
    runs = [" ".join(run) + " " for run in quick.RUNS.values()]
    others = (
        "moments",
        "nll",
        "store",
        "store_write",
        "precision",
        "preparation",
        "texts",
        "logistic",
        "one_c",
        "calls",
    )
    for needed in ("bench_ridge --alphas 20 ", "bench_ridge --alphas 100 ", *(f"bench_{name} " for name in others)):
        assert any(run.startswith(needed) for run in runs), needed


def test_every_run_is_a_benchmark_of_this_package() -> None:
    for module, *_ in quick.RUNS.values():
        assert (Path(quick.__file__).parent / f"{module}.py").is_file()
