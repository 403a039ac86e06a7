"""Paths of heads: each member is the head that a fit of its setting alone gives, and evaluation shares the work."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

import heads
from featcache.errors import HeadError
from heads import KNN, LinearDiscriminant, Logistic, Ridge, TipAdapter, TipAdapterF
from heads.fitted.tip_adapter import KeyBank
from heads.solvers.temperature import fit_temperature


def less_mean(logits: np.ndarray) -> np.ndarray:
    """What a softmax sees of logits (N, C)."""
    return np.asarray(logits - logits.mean(axis=1, keepdims=True))


def test_ridge_has_every_alpha_at_its_own_temperature(images: Any) -> None:
    store, test = images(n=150, noise=0.5), images(seed=5, split="test", dataset_key="data-2")
    X, y = store.numpy(np.float64)
    head = Ridge([100.0, 0.1, 1.0]).fit(store)
    path = head.path_heads()
    assert [member.name for member in path] == ["ridge alpha=0.1", "ridge alpha=1", "ridge alpha=100"]
    rows = heads.evaluate(path, [test])
    for alpha, member, row, temperature in zip(
        (0.1, 1.0, 100.0), path, rows, np.roll(head.temperatures_, -1), strict=True
    ):
        model = SklearnRidge(alpha).fit(X, np.eye(5)[y])
        scores = test.X.astype(np.float64) @ model.coef_.T + model.intercept_
        np.testing.assert_allclose(less_mean(member.logits(test.X)), less_mean(scores) / temperature, atol=1e-4)
        assert row["params"]["alpha"] == alpha
        assert row["params"]["temperature"] == pytest.approx(temperature, rel=1e-6)
        assert temperature == pytest.approx(Ridge([alpha]).fit(store).temperature_, rel=1e-6)
        assert row["animals:top1"] == pytest.approx((scores.argmax(axis=1) == test.y).mean(), abs=0.006)


def test_ridge_restricted_to_another_alpha_has_it_in_its_path(images: Any) -> None:
    some = Ridge([0.1, 1.0]).fit(images()).restrict([3, 1], alpha=7.0)
    assert [member.provenance["params"]["alpha"] for member in some.path_heads()] == [0.1, 1.0, 7.0]
    np.testing.assert_array_equal(some.path_heads()[-1].weights, some.linear().weights)


def test_discriminant_has_other_shrinkages(images: Any) -> None:
    store = images(n=120, noise=0.5)
    store.X, store.y = store.X[store.y != 2], store.y[store.y != 2]
    head = LinearDiscriminant(0.2).fit(store)
    path = head.path_heads([0.05, "auto", 0.9])
    found = [member.provenance["params"]["shrinkage"] for member in path]
    assert found == sorted([0.05, 12 / (len(store) - 1 + 12), 0.2, 0.9])
    spreads = []
    for shrinkage, member in zip(found, path, strict=True):
        alone = LinearDiscriminant(shrinkage).fit(store)
        temperature = member.provenance["params"]["temperature"]
        logits, present = member.logits(store.X).astype(np.float64), [0, 1, 3, 4]
        np.testing.assert_allclose(logits[:, 2], -1e4)
        np.testing.assert_allclose(
            less_mean(logits[:, present]) * temperature, less_mean(alone.scores(store.X)[:, present]), atol=1e-3
        )
        spreads.append(logits[:, present].std(axis=1) @ logits[:, present].std(axis=1))
        assert member.absent == (2,)
    np.testing.assert_allclose(spreads, spreads[found.index(0.2)], rtol=1e-3)
    assert path[found.index(0.2)].provenance == head.provenance_
    with pytest.raises(HeadError, match="from 0 to 1"):
        head.path_heads([2.0])


def test_discriminant_without_scatter_has_one_head(images: Any) -> None:
    rows = np.unique(images().y, return_index=True)[1]
    head = LinearDiscriminant().fit(images().X[rows], np.arange(5))
    assert [member.provenance["params"]["shrinkage"] for member in head.path_heads()] == [1.0]


def test_spread_keeps_the_likelihood_sane(images: Any) -> None:
    """The temperatures of a path are near those that held-out rows would give."""
    train, val = images(n=400, noise=0.6), images(n=2000, seed=9, noise=0.6, split="val", dataset_key="data-9")
    for member in LinearDiscriminant(0.1).fit(train).path_heads([0.01, 0.5, 1.0]):
        assert 0.5 < fit_temperature(member.logits(val.X), val.y) < 2.0, member.name


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_tip_adapter_has_the_grid_on_one_bank(
    images: Any, texts: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = images(n=60, noise=0.6), images(n=300, seed=4, noise=0.6, split="test", dataset_key="data-2")
    alphas, betas = (0.0, 2.0, 9.0), (1.0, 7.0)
    path = kind(alphas, betas).fit(train, texts=texts()).path_heads()
    pairs = [(member.strength, member.sharpness) for member in path]
    assert pairs == [(alpha, beta) for beta in betas for alpha in alphas]
    calls, own = {"affinities": 0, "votes": 0}, {"affinities": KeyBank.affinities, "votes": KeyBank.votes}
    for name in calls:

        def counted(self: Any, *args: Any, name: str = name, own: Any = own[name]) -> Any:
            calls[name] += 1
            return own(self, *args)

        monkeypatch.setattr(KeyBank, name, counted)
    rows = heads.evaluate(path, [test])
    assert calls == {"affinities": 9, "votes": 9 * len(betas)}  # blocks of 37 rows
    for (alpha, beta), row in zip(pairs, rows, strict=True):
        alone = kind([alpha], [beta]).fit(train, texts=texts())
        (wanted,) = heads.evaluate([alone], [test])
        assert row["animals:nll"] == pytest.approx(wanted["animals:nll"], rel=1e-6)
        assert (row["params"]["alpha"], row["params"]["beta"]) == (alpha, beta)
        assert "alpha" not in row
    keep = np.isin(test.y, [3, 1])
    test.X, test.y = test.X[keep], test.y[keep]
    masked = heads.evaluate(path, [test], class_subset=[3, 1])
    (wanted,) = heads.evaluate([path[4]], [test], class_subset=[3, 1])
    assert masked[4] == wanted


def test_knn_path_has_every_k(images: Any, tmp_path: Any) -> None:
    train, test = images(n=150, noise=0.6), images(n=80, seed=4, noise=0.6)
    path = KNN([30, 1]).fit(train).path_heads()
    assert [member.name for member in path] == ["knn k=1", "knn k=30"]
    for member, k in zip(path, (1, 30), strict=True):
        np.testing.assert_array_equal(member.logits(test.X), KNN(k).fit(train).frozen().logits(test.X))
    loaded = heads.load(path[0].save(tmp_path / "one.safetensors"))
    np.testing.assert_array_equal(loaded.logits(test.X), path[0].logits(test.X))


def test_logistic_path_heads_are_those_of_the_training_rows(images: Any) -> None:
    train, val = images(n=150, noise=0.6), images(n=80, seed=9, noise=0.6, split="val", dataset_key="data-9")
    head = Logistic([0.1, 10.0], refit=True).fit(train, selection=val)
    for member, C in zip(head.path_heads(), (0.1, 10.0), strict=True):
        np.testing.assert_allclose(member.logits(val.X), Logistic(C).fit(train).linear().logits(val.X), atol=1e-2)
        assert [entry["split"] for entry in member.provenance["fitted_on"]] == ["train"]
        assert "refit" not in member.provenance["params"]
        assert member.provenance["chosen_on"] == []
    assert [entry["split"] for entry in head.provenance_["fitted_on"]] == ["train", "val"]
    assert len(heads.evaluate(head.path_heads(), [val])) == 2
