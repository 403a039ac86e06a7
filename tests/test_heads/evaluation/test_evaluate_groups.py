"""Worst groups and worst domains, against plain loops over the rows."""

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from featcache.errors import HeadError
from heads import Ridge, ZeroShot, evaluate, interpolate, judge
from heads.evaluation.compare import compare
from heads.evaluation.groups import groups_of, over_domains
from heads.evaluation.metrics import METRICS, MULTILABEL


@pytest.fixture
def store(images: Any) -> Any:
    found = images(n=300, noise=0.7, split="test", dataset_key="data-2", seed=9)
    rng = np.random.default_rng(4)
    found.metadata = {
        "region": rng.integers(0, 4, 300),
        "light": np.array(["day", "night"], object)[rng.integers(0, 2, 300)],
    }
    return found


def logits_of(head: Any, store: Any) -> np.ndarray:
    linear = head.linear()
    return store.X.astype(np.float64) @ linear.weights.astype(np.float64).T + linear.bias


@pytest.mark.parametrize("columns", [["region"], ["label"], ["light", "label"]])
def test_groups_equal_a_loop_over_rows(store: Any, images: Any, texts: Any, columns: list[str]) -> None:
    path = interpolate(ZeroShot().fit(texts()), Ridge().fit(images()), [0.0, 0.4, 1.0])
    rows = evaluate(path, [store], groups=columns)
    values = [store.metadata.get(c, np.asarray(store.classnames, object)[store.y]) for c in columns]
    for head, row in zip(path, rows, strict=True):
        logits = logits_of(head, store)
        hit = logits.argmax(1) == store.y
        nll = -log_softmax(logits, axis=1)[np.arange(300), store.y]
        wanted: dict[str, list[int]] = {}
        for i in range(300):
            parts = [str(v[i]) for v in values]
            name = parts[0] if len(columns) == 1 else ", ".join(map("=".join, zip(columns, parts, strict=True)))
            wanted.setdefault(name, []).append(i)
        accuracy = {name: hit[members].mean() for name, members in wanted.items()}
        assert row["animals:group_top1"] == pytest.approx(accuracy)
        assert row["animals:group_rows"] == {name: len(members) for name, members in wanted.items()}
        assert row["animals:group_nll"] == pytest.approx({n: nll[m].mean() for n, m in wanted.items()}, rel=1e-4)
        assert row["animals:worst_group_top1"] == min(accuracy.values())
        assert accuracy[row["animals:worst_group"]] == min(accuracy.values())
        assert row["animals:worst_group_nll"] == max(row["animals:group_nll"].values())


def test_groups_do_not_change_the_rest(store: Any, images: Any) -> None:
    head = Ridge().fit(images())
    (plain,), (grouped,) = evaluate([head], [store]), evaluate([head], [store], groups=["light"])
    assert plain == {key: value for key, value in grouped.items() if "group" not in key}


def test_invalid_rows_belong_to_no_group(store: Any) -> None:
    store.valid = np.arange(300) % 3 > 0
    store.y = np.where(store.valid, store.y, -1)
    found = groups_of(store, ["region", "label"])
    assert len(found.codes) == 200
    row = int(np.flatnonzero(store.valid)[17])
    expected = f"region={store.metadata['region'][row]}, label={store.classnames[store.y[row]]}"
    assert found.names[found.codes[17]] == expected


def test_rows_with_an_empty_cell_are_never_the_worst_group(store: Any, images: Any) -> None:
    """Neither alone nor in a combination, in `evaluate` or in `compare`, however badly they are predicted."""
    heads = [Ridge().fit(images()), Ridge(1e3).fit(images())]
    missed = logits_of(heads[0], store).argmax(1) != store.y
    store.metadata["place"] = np.where(missed, "", np.where(np.arange(300) % 2, "north", "south")).astype(object)
    for columns in (["place"], ["place", "light"]):
        row = evaluate(heads, [store], groups=columns)[0]
        assert row["animals:worst_group_top1"] == 1.0
        assert min(row["animals:group_top1"].values()) == 0.0
        (found,) = compare(heads[0], heads[1], [store], groups=columns)
        assert found["worst_group_top1"]["a"][0] == 1.0


def test_nan_in_a_column_of_numbers_is_an_empty_cell(store: Any) -> None:
    store.metadata = {"year": np.where(np.arange(300) % 3 == 0, np.nan, 2000.0 + np.arange(300) % 3)}
    groups = groups_of(store, ["year"])
    assert sorted(groups.names) == ["", "2001.0", "2002.0"]
    assert [groups.names[code] for code in groups.known] == ["2001.0", "2002.0"]


def test_classes_of_one_name_are_two_groups(store: Any) -> None:
    store.classnames = ("crane", store.classnames[1], "crane", *store.classnames[3:])
    found = groups_of(store, ["label"])
    assert {"crane (0)", "crane (2)"} < set(found.names)
    assert (found.codes == found.names.index("crane (2)")).sum() == (store.y == 2).sum()


@pytest.mark.parametrize("order", [["a", "none", "b"], ["a", "b", "none"]])
def test_a_domain_with_an_undefined_metric_is_not_the_worst(order: list[str]) -> None:
    row = {f"{name}:{metric}": value for name, value in (("a", 0.9), ("b", 0.3)) for metric in MULTILABEL}
    row |= {f"none:{metric}": float("nan") for metric in MULTILABEL}
    found = over_domains(row, order)
    assert found["shifted_worst_domain"] == "b"
    assert np.isnan(found["shifted_worst_map_macro"])


def test_a_missing_column_is_reported_with_the_existing_ones(store: Any, images: Any) -> None:
    with pytest.raises(HeadError, match="no metadata column 'camera'; expected one of region, light, label"):
        evaluate([Ridge().fit(images())], [store], groups=["camera"])
    with pytest.raises(HeadError, match="no group column"):
        evaluate([Ridge().fit(images())], [store], groups=[])


def test_mean_and_worst_over_shifted_domains(images: Any) -> None:
    stores = [images(n=120, seed=s, noise=0.3 + 0.3 * s, name=f"d{s}", dataset_key=f"{s}") for s in range(4)]
    head = Ridge().fit(images())
    (row,) = evaluate([head], stores)
    for metric in METRICS:
        values = [row[f"d{s}:{metric}"] for s in (1, 2, 3)]
        assert row[f"shifted_mean_{metric}"] == pytest.approx(np.mean(values))
        worst = max if metric in ("nll", "nll_capped", "brier", "ece") else min
        assert row[f"shifted_worst_{metric}"] == worst(values)
    assert row[f"{row['shifted_worst_domain']}:top1"] == row["shifted_worst_top1"]
    (other,) = evaluate([head], stores, reference="d3")
    assert other["shifted_mean_top1"] == pytest.approx(np.mean([row[f"d{s}:top1"] for s in (0, 1, 2)]))
    assert not any("shifted" in key for key in evaluate([head], stores[:1])[0])
    with pytest.raises(HeadError, match="reference 'x' is not one of the stores d0, d1"):
        evaluate([head], stores[:2], reference="x")


def test_per_sample_values_and_confusion_counts_equal_numpys(store: Any, images: Any, texts: Any) -> None:
    """One pass gives every head's NLL and rank on every row, and who is taken for whom."""
    zero_shot, ridge = ZeroShot().fit(texts()), Ridge().fit(images())
    heads = [zero_shot, *interpolate(zero_shot, ridge, [0.3, 0.9]), ridge]
    found = judge(heads, [store], per_sample=True, confusion=True)
    table = found.samples["animals"]
    np.testing.assert_array_equal(table.labels, store.y)
    np.testing.assert_array_equal(table.rows, np.arange(300))
    for h, head in enumerate(heads):
        logits = logits_of(head, store)
        order = np.argsort(-logits, axis=1, kind="stable")
        np.testing.assert_array_equal(table.rank[h], (order == store.y[:, None]).argmax(1))
        np.testing.assert_allclose(
            table.nll[h], -log_softmax(logits, axis=1)[np.arange(300), store.y], rtol=1e-4, atol=1e-4
        )
        counts = np.zeros((5, 5), int)
        np.add.at(counts, (store.y, logits.argmax(1)), 1)
        np.testing.assert_array_equal(found.confusion["animals"][h], counts)
        assert found.rows[h]["animals:nll"] == pytest.approx(table.nll[h].mean(dtype=float), rel=1e-6)
    assert not judge(heads, [store]).samples


def test_samples_of_nonlinear_heads_are_evaluated(store: Any, images: Any) -> None:
    from heads import KNN

    head = KNN(n_neighbors=5).fit(images())
    found = judge([head, Ridge().fit(images())], [store], per_sample=True, confusion=True, groups=["light"])
    hits = head.predict(store.X) == store.y
    np.testing.assert_array_equal(found.samples["animals"].rank[0] == 0, hits)
    assert found.confusion["animals"].shape == (2, 5, 5)
    assert found.confusion["animals"][0].trace() == hits.sum()
    night = store.metadata["light"] == "night"
    assert found.rows[0]["animals:group_top1"]["night"] == pytest.approx(hits[night].mean())
