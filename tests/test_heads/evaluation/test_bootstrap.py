"""Intervals against the definition drawn row by row, scipy, and theory; paired tests against scipy's."""

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from featcache.errors import HeadError, MismatchError
from heads import Ridge, ZeroShot
from heads.evaluation.bootstrap import bootstrap, bootstrap_groups, sign_test
from heads.evaluation.compare import add_intervals, compare
from heads.evaluation.evaluate import judge


def by_definition(values: np.ndarray, draws: int, level: float, seed: int) -> tuple[float, float]:
    """Draw rows, take their mean, again and again; the order of draws is that of one generator."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, len(values), (draws, len(values)))
    means = np.array([values[row].mean() for row in places])
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_equals_the_definition_with_the_same_draws(level: float) -> None:
    values = np.random.default_rng(0).gamma(1.0, size=(3, 400))
    found = bootstrap(values, draws=300, level=level, seed=7)
    for row, interval in zip(values, found, strict=True):
        assert interval.value == pytest.approx(row.mean())
        assert interval[1:] == pytest.approx(by_definition(row, 300, level, 7), rel=1e-12)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(2, 50))
    whole = bootstrap(values, draws=101)
    monkeypatch.setattr(sys.modules["heads.evaluation.bootstrap"], "_CELLS", 50 * 7)
    for a, b in zip(bootstrap(values, draws=101), whole, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_agrees_with_scipy_and_with_theory() -> None:
    hits = (np.random.default_rng(2).random(2000) < 0.8).astype(float)
    [found] = bootstrap(hits, draws=4000)
    theirs = stats.bootstrap((hits,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3))
    error = np.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.15 * error)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.15 * error)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_a_seed_repeats_and_another_differs() -> None:
    values = np.random.default_rng(4).normal(size=300)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    """Rows that are copies of one another tell nothing new: the interval is that of the originals."""
    base = np.random.default_rng(5).normal(size=80)
    copies, clusters = np.repeat(base, 5), np.repeat(np.arange(80), 5)
    [alone], [together] = bootstrap(base, draws=500), bootstrap(copies, clusters=clusters, draws=500)
    assert together == pytest.approx(alone, rel=1e-12)
    [naive] = bootstrap(copies, draws=500)
    assert naive.high - naive.low < 0.6 * (together.high - together.low)


def test_clusters_of_several_sizes_equal_a_loop() -> None:
    rng = np.random.default_rng(6)
    values, clusters = rng.normal(size=60), rng.integers(0, 9, 60)
    counts = np.random.default_rng(0).integers(0, 9, (200, 9))
    members = [values[clusters == c] for c in range(9)]
    means = [np.concatenate([members[c] for c in draw]).mean() for draw in counts]
    [found] = bootstrap(values, clusters=clusters, draws=200)
    assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-9)


def test_groups_equal_a_loop_and_the_worst_is_the_smallest_of_each_draw() -> None:
    rng = np.random.default_rng(7)
    hits, codes = (rng.random(90) < 0.6).astype(float), np.sort(rng.integers(0, 3, 90))
    each, worst = bootstrap_groups(hits, codes, draws=150, seed=3)
    drawn, generator = [], np.random.default_rng(3)
    for group in range(3):
        rows = hits[codes == group]
        drawn.append([rows[p].mean() for p in generator.integers(0, len(rows), (150, len(rows)))])
    for found, means, group in zip(each, drawn, range(3), strict=True):
        assert found == pytest.approx((hits[codes == group].mean(), *np.quantile(means, [0.025, 0.975])), rel=1e-9)
    assert worst.value == min(interval.value for interval in each)
    assert worst[1:] == pytest.approx(np.quantile(np.min(drawn, axis=0), [0.025, 0.975]), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros(0), {}, "at least one row"),
        (np.zeros((2, 2, 2)), {}, "expected"),
        (np.array([0.0, np.inf]), {}, "not all finite"),
        (np.zeros(3), {"draws": 1}, "expected 2 to"),
        (np.zeros(3), {"level": 1.0}, "level"),
        (np.zeros(3), {"clusters": [0, 1]}, "one per row"),
        (np.zeros(3), {"clusters": [1, 1, 1]}, "one cluster"),
    ],
)
def test_invalid_bootstrap_inputs(values: Any, options: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        bootstrap(values, **options)


def test_group_codes_without_rows_are_refused() -> None:
    with pytest.raises(HeadError, match="each at least once"):
        bootstrap_groups(np.zeros(3), [0, 2, 2])


def test_the_exact_test_refuses_nan() -> None:
    with pytest.raises(HeadError, match="paired values hold NaN"):
        sign_test([1.0, np.nan, 1.0], [0.0, 0.0, 0.0])


def test_the_exact_test_counts_every_outcome() -> None:
    """Of all 2^n ways to split n rows that differ, the share that is at least as uneven."""
    for above, below in ((6, 1), (3, 3), (5, 0), (0, 8)):
        n = above + below
        ways = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        wanted = np.mean([abs(2 * heads - n) >= abs(above - below) for heads in ways])
        a = np.array([1] * above + [0] * below + [1, 0])
        b = np.array([0] * above + [1] * below + [1, 0])
        *counts, p = sign_test(a, b)
        assert counts == [above, below]
        assert p == pytest.approx(wanted)
    assert sign_test([1.0, 2.0], [1.0, 2.0]) == (0, 0, 1.0)
    with pytest.raises(HeadError, match="paired"):
        sign_test([1], [1, 2])


@pytest.fixture
def shifted(images: Any) -> Any:
    store = images(n=400, noise=0.6, split="test", dataset_key="data-2", seed=3)
    store.metadata = {"region": np.arange(400) % 3, "slide": np.arange(400) // 4}
    return store


def test_two_heads_row_by_row(images: Any, texts: Any, shifted: Any) -> None:
    a, b = ZeroShot().fit(texts()), Ridge().fit(images(n=60, noise=0.6))
    [found] = compare(a, b, [shifted], draws=500, groups=["region"])
    hits = [head.predict(shifted.X) == shifted.y for head in (a, b)]
    assert found["n"] == 400
    assert found["heads"] == ["zero_shot", "ridge"]
    for who, hit, head in zip("ab", hits, (a, b), strict=True):
        value, low, high = found["top1"][who]
        assert value == accuracy_score(shifted.y, head.predict(shifted.X))
        assert (low, high) == pytest.approx(by_definition(hit.astype(float), 500, 0.95, 0))
    difference = hits[1].astype(float) - hits[0]
    assert found["top1"]["difference"] == pytest.approx([difference.mean(), *by_definition(difference, 500, 0.95, 0)])
    assert found["nll"]["difference"][0] == pytest.approx(found["nll"]["b"][0] - found["nll"]["a"][0])
    only_a, only_b = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    assert found["mcnemar"] == {
        "only_a": only_a,
        "only_b": only_b,
        "p": pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue),
    }
    assert found["sign_nll"]["a_smaller"] + found["sign_nll"]["b_smaller"] == 400
    for region in range(3):
        inside = shifted.metadata["region"] == region
        group = found["groups"][str(region)]
        assert group["rows"] == inside.sum()
        assert group["top1_difference"][0] == pytest.approx(difference[inside].mean())
    worst = min(hits[1][shifted.metadata["region"] == region].mean() for region in range(3))
    assert found["worst_group_top1"]["b"][0] == pytest.approx(worst)


def test_a_head_against_itself_differs_by_nothing(images: Any, shifted: Any) -> None:
    head = Ridge().fit(images())
    [found] = compare(head, head, [shifted], draws=50, clusters=["slide"])
    assert found["top1"]["difference"] == found["nll"]["difference"] == [0.0, 0.0, 0.0]
    assert found["mcnemar"]["p"] == 1.0


def test_a_comparison_refuses_what_evaluation_refuses(images: Any, shifted: Any) -> None:
    head, foreign = Ridge().fit(images()), images(encoder_key="enc-2", text_digests=())
    with pytest.raises(MismatchError, match="encoder"):
        compare(head, head, [foreign])
    with pytest.raises(HeadError, match="was chosen on animals/test"):
        compare(Ridge().fit(images(), selection=shifted), head, [shifted])


def test_intervals_join_the_rows(images: Any, texts: Any, shifted: Any) -> None:
    heads = [ZeroShot().fit(texts()), Ridge().fit(images())]
    rows = add_intervals(judge(heads, [shifted], per_sample=True), draws=200)
    for row in rows:
        low, high = row["animals:top1_interval"]
        assert low <= row["animals:top1"] <= high
        assert row["animals:nll_interval"][0] <= row["animals:nll"] <= row["animals:nll_interval"][1]
    with pytest.raises(HeadError, match="per_sample=True"):
        add_intervals(judge(heads, [shifted]))
