"""Evaluation of many heads on many stores; class subsets; choosing without a leak; results files."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

import heads.evaluation.passes
from featcache.errors import HeadError, MismatchError
from heads import LinearHead, Ridge, ZeroShot, append_rows, choose, evaluate, interpolate

ALPHAS = np.linspace(0, 1, 11)


@pytest.fixture
def ends(images: Any, texts: Any) -> tuple[Any, Any]:
    return ZeroShot().fit(texts()), Ridge().fit(images())


def test_a_path_costs_two_products_and_equals_direct_evaluation(
    ends: tuple[Any, Any], images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = images(n=300, noise=0.6, split="test", dataset_key="data-2", block_rows=300)
    path = interpolate(*ends, ALPHAS)
    direct = evaluate([LinearHead(h.weights, h.bias, h.classnames, "h", h.provenance) for h in path], [store])
    products: list[tuple[int, int]] = []
    door = heads.evaluation.passes.linear_nll

    def counted(X: Any, weights: Any, *rest: Any, alphas: Any, **options: Any) -> Any:
        products.append((len(weights), len(alphas)))
        return door(X, weights, *rest, alphas=alphas, **options)

    monkeypatch.setattr(heads.evaluation.passes, "linear_nll", counted)
    rows = evaluate(path, [store])
    assert products == [(2, 11)]  # two products for 11 alphas and one block
    for row, wanted, alpha in zip(rows, direct, ALPHAS, strict=True):
        assert row["alpha"] == alpha
        assert isinstance(row["alpha"], float)
        for key in ("animals:top1", "animals:nll", "animals:ece", "animals:top5"):
            assert row[key] == pytest.approx(wanted[key], abs=1e-5)


def test_mixed_heads_keep_their_order(ends: tuple[Any, Any], images: Any) -> None:
    store = images(split="test", dataset_key="data-2", noise=0.6)
    path = interpolate(*ends, [0.0, 0.5])
    rows = evaluate([path[0], ends[1], path[1], ends[0], *interpolate(ends[1], ends[0], [0.5])], [store])
    assert [row["head"] for row in rows] == [
        "zero_shot+ridge",
        "ridge",
        "zero_shot+ridge",
        "zero_shot",
        "ridge+zero_shot",
    ]
    assert rows[0]["animals:nll"] == pytest.approx(rows[3]["animals:nll"], rel=1e-5)
    assert rows[2]["animals:nll"] == pytest.approx(rows[4]["animals:nll"], rel=1e-5)


def test_names_take_the_split_only_where_two_stores_share_one(ends: tuple[Any, Any], images: Any) -> None:
    stores = [images(split="val", dataset_key="2"), images(split="test", dataset_key="3"), images(name="noisy")]
    (row,) = evaluate([ends[1]], stores)
    assert {key.split(":")[0] for key in row if ":" in key} == {"animals/val", "animals/test", "noisy"}
    with pytest.raises(HeadError, match="given twice"):
        evaluate([ends[1]], [stores[0], stores[0]])


def test_class_subset_with_labels_in_either_index_space(ends: tuple[Any, Any], images: Any) -> None:
    """As ImageNet-R's 200 of 1000 classes: only their logits exist, and the softmax runs over them."""
    full, subset = images(noise=0.6, name="full"), [1, 3, 4]
    keep = np.isin(full.y, subset)
    full.X, full.y = full.X[keep], full.y[keep]
    names = tuple(full.classnames[i] for i in subset)
    own = images(name="own", classnames=names)
    own.X, own.y = full.X, np.searchsorted(subset, full.y)
    (row,) = evaluate([ends[1]], [full, own], class_subset=subset)
    X, y = own.numpy(np.float64)
    logits = (X @ ends[1].coef_.T + ends[1].intercept_)[:, subset] / ends[1].temperature_
    assert row["own:top1"] == row["full:top1"] == (logits.argmax(1) == y).mean()
    wanted = -log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()
    assert row["own:nll"] == pytest.approx(wanted, rel=1e-5)
    assert row["full:nll"] == pytest.approx(wanted, rel=1e-5)
    by_name = evaluate(interpolate(*ends, [0.5, 1.0]), [full, own], class_subset={"own": subset, "full": subset})
    assert by_name[1]["own:nll"] == pytest.approx(wanted, rel=1e-5)
    some = evaluate([ends[1]], [full, own], class_subset={"own": subset})[0]
    assert some["full:nll"] > some["own:nll"]  # without a subset, all five classes compete


def test_class_lists_that_differ_are_refused_with_the_remedy(ends: tuple[Any, Any], images: Any) -> None:
    few = images(classnames=("bee", "dog", "elk"))
    few.y = few.y % 3
    with pytest.raises(MismatchError, match=r"class_subset=heads\.subset_by_name"):
        evaluate([ends[1]], [few])
    with pytest.raises(MismatchError, match="class 1: 'cow' against 'dog'"):
        evaluate([ends[1]], [few], class_subset=[1, 2, 4])
    with pytest.raises(MismatchError, match=r"outside class_subset \(ant"):
        evaluate([ends[1]], [images()], class_subset=[1, 2, 4])


def test_nothing_to_do_is_an_error(ends: tuple[Any, Any], images: Any) -> None:
    for judged, stores in (([], [images()]), ([ends[0]], [])):
        with pytest.raises(HeadError, match="at least one"):
            evaluate(judged, stores)


@pytest.mark.parametrize("metric", ["top1", "nll"])
def test_chosen_on_one_split_reported_on_another(
    ends: tuple[Any, Any], images: Any, metric: str, tmp_path: Path
) -> None:
    val = images(n=400, seed=5, noise=0.6, split="val", dataset_key="val")
    test = images(n=400, seed=6, noise=0.6, split="test", dataset_key="test")
    path = interpolate(*ends, ALPHAS)
    best = choose(path, val, metric=metric)
    values = [row[f"animals:{metric}"] for row in evaluate(path, [val])]
    assert values[path.index(next(h for h in path if h.alpha == best.alpha))] == (
        max(values) if metric == "top1" else min(values)
    )
    entry = best.provenance["chosen_on"][-1]
    assert (entry["split"], entry["metric"], entry["candidates"]) == ("val", metric, 11)
    (row,) = evaluate([best], [test])
    assert row["chosen_on"] == [entry]
    with pytest.raises(HeadError, match=r"chosen on animals/val.*another split"):
        evaluate([best], [test, val])
    best.save(tmp_path / "best")
    from heads import load

    with pytest.raises(HeadError, match="chosen on"):
        evaluate([load(tmp_path / "best")], [val])
    assert evaluate([best], [val], allow_chosen=True)
    with pytest.raises(HeadError, match="chosen on"):  # and what is built from it stays bound
        evaluate(interpolate(best, ends[1], [0.5]), [val])


def test_choosing_on_the_fitted_split_or_an_unknown_metric_is_refused(ends: tuple[Any, Any], images: Any) -> None:
    with pytest.raises(HeadError, match="fitted on animals/train"):
        choose(interpolate(*ends, ALPHAS), images())
    with pytest.raises(HeadError, match="unknown metric 'acc'"):
        choose([ends[0]], images(split="val"), metric="acc")


def test_a_ridge_chosen_on_a_split_is_not_reported_on_it(images: Any) -> None:
    val = images(seed=5, split="val", dataset_key="val")
    head = Ridge().fit(images(), selection=val)
    with pytest.raises(HeadError, match="chosen on animals/val"):
        evaluate([head], [val])


def test_ties_go_to_the_lower_nll_then_to_the_first_head(ends: tuple[Any, Any], images: Any) -> None:
    val = images(noise=0.01, split="val", dataset_key="val")
    path = interpolate(*ends, ALPHAS)
    rows = evaluate(path, [val])
    assert {row["animals:top1"] for row in rows} == {1.0}
    nll = [row["animals:nll"] for row in rows]
    assert len(set(nll)) == len(nll)
    best = choose(path, val)
    assert best.alpha == ALPHAS[int(np.argmin(nll))]
    entry = best.provenance["chosen_on"][-1]
    assert (entry["value"], entry["tied"]) == (1.0, len(path))
    assert choose([path[3], path[7], path[3]], val, metric="nll").alpha == path[min(3, 7, key=nll.__getitem__)].alpha
    same = [head.with_provenance({**head.provenance, "place": place}) for place, head in enumerate([path[4]] * 3)]
    assert choose(same, val).provenance["place"] == 0
    assert "tied" not in choose([path[4]], val).provenance["chosen_on"][-1]


def test_results_grow_by_one_line_per_row(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "results.jsonl"
    rows = [{"head": "a", "x:nll": np.float32(0.5), "alphas": np.arange(2)}, {"head": "b", "x:nll": np.inf}]
    assert append_rows(path, rows) == 2
    assert append_rows(path, []) == 0
    with path.open("a") as file:
        file.write('{"head": "torn')
    append_rows(path, [{"head": "c", "path": Path("p")}])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["head"] for line in (lines[0], lines[1], lines[3])] == ["a", "b", "c"]
    assert json.loads(lines[0])["x:nll"] == 0.5
    assert json.loads(lines[1])["x:nll"] is None


def test_concurrent_writers_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"

    def write(name: int) -> None:
        for turn in range(20):
            append_rows(path, [{"head": name, "turn": turn, "filling": "x" * 5000}])

    writers = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["head"], row["turn"]) for row in rows) == [(n, t) for n in range(4) for t in range(20)]
