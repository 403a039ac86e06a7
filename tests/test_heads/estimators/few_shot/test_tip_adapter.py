"""Tip-Adapter: its formula in float64, cross-validation by refits, evaluation, files, odd cases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError, MismatchError
from heads import LinearHead, TipAdapter, ZeroShot
from heads.solvers.folds import FoldAssigner


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def formula(text: LinearHead, K: Any, y: Any, V: Any, alpha: float, beta: float) -> Any:
    """The paper's logits in float64."""
    K, V = K.astype(np.float64), V.astype(np.float64)
    votes = np.exp(-beta * (1.0 - unit(V) @ unit(K).T)) @ np.eye(len(text.classnames))[y]
    return V @ text.weights.T.astype(np.float64) + text.bias + alpha * votes


def nll(logits: Any, y: Any) -> float:
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]).mean())


@pytest.fixture
def weak(texts: Any) -> LinearHead:
    """A text head that is often wrong, so that labelled rows help."""
    head = ZeroShot().fit(texts()).linear()
    noise = np.random.default_rng(5).normal(size=head.weights.shape)
    return LinearHead(
        head.weights + 10 * noise.astype(np.float32), head.bias, head.classnames, provenance=head.provenance
    )


def test_logits_are_the_papers(images: Any, texts: Any) -> None:
    train, test = images(n=70, noise=0.5), images(n=600, seed=4, noise=0.5)
    head = TipAdapter([1.7], [4.0]).fit(train, texts=texts())
    wanted = formula(ZeroShot().fit(texts()).linear(), train.X, train.y, test.X, 1.7, 4.0)
    np.testing.assert_allclose(head.frozen().logits(test.X), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(head.predict(test), wanted.argmax(axis=1))
    probabilities = np.exp(wanted) / np.exp(wanted).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.predict_proba(test), probabilities, atol=1e-5)
    assert head.provenance_["params"]["selection"] == "given"
    assert np.isnan(head.top1_).all()


@pytest.mark.parametrize("metric", ["top1", "nll"])
def test_cross_validation_is_that_of_refits(images: Any, weak: LinearHead, metric: str) -> None:
    train = images(n=120, noise=0.6)
    alphas, betas = (0.0, 1.0, 5.0, 20.0), (1.0, 5.0, 20.0)
    head = TipAdapter(alphas, betas, metric).fit(train, texts=weak)
    fold, logits = FoldAssigner(5)(train.y), np.empty((4, 3, 120, 5))
    for k in range(5):
        out = fold == k
        for a, alpha in enumerate(alphas):
            for b, beta in enumerate(betas):
                more = alpha * len(out) / (~out).sum()  # the head has more keys, so that its votes are larger
                logits[a, b, out] = formula(weak, train.X[~out], train.y[~out], train.X[out], more, beta)
    top1 = (logits.argmax(axis=-1) == train.y).mean(axis=-1)
    losses = np.array([[nll(cell, train.y) for cell in line] for line in logits])
    np.testing.assert_allclose(head.top1_, top1, atol=1e-9)
    np.testing.assert_allclose(head.nll_, losses, rtol=1e-4)
    a, b = alphas.index(head.alpha_), betas.index(head.beta_)
    if metric == "nll":
        assert losses[a, b] == losses.min()
    else:
        assert top1[a, b] == top1.max()
        assert losses[a, b] == losses[top1 == top1.max()].min()
    assert head.alpha_ > 0  # the rows do help here
    assert head.provenance_["params"]["selection"] == "folds"


def test_a_selection_split_chooses(images: Any, weak: LinearHead) -> None:
    train, selection = images(n=40, noise=0.6), images(n=150, seed=9, noise=0.6, split="val", dataset_key="data-9")
    head = TipAdapter((0.0, 2.0, 10.0), (2.0, 8.0)).fit(train, texts=weak, selection=selection)
    for a, alpha in enumerate((0.0, 2.0, 10.0)):
        for b, beta in enumerate((2.0, 8.0)):
            logits = formula(weak, train.X, train.y, selection.X, alpha, beta)
            assert head.top1_[a, b] == pytest.approx((logits.argmax(axis=1) == selection.y).mean())
            assert head.nll_[a, b] == pytest.approx(nll(logits, selection.y), rel=1e-4)
    assert head.provenance_["chosen_on"][0]["split"] == "val"
    with pytest.raises(HeadError, match="chosen on animals/val"):
        heads.evaluate([head], [selection])
    arrays = TipAdapter((0.0, 2.0, 10.0), (2.0, 8.0)).fit(*train.numpy(), texts=weak, selection=selection.numpy())
    np.testing.assert_allclose(arrays.nll_, head.nll_, rtol=1e-6)
    assert arrays.provenance_["chosen_on"] == []


def test_the_choice_is_never_worse_than_zero_shot_on_the_folds(images: Any, texts: Any) -> None:
    head = TipAdapter(metric="nll").fit(images(n=40, noise=1.5), texts=texts())
    assert np.nanmin(head.nll_) <= head.nll_[0, 0]  # alpha 0 is in the grid
    np.testing.assert_allclose(head.nll_[0], head.nll_[0, 0])


def test_evaluation_shares_affinities_and_masks_classes(
    images: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = images(n=60, noise=0.6), images(n=300, seed=4, noise=0.6, split="test", dataset_key="data-2")
    head = TipAdapter([2.0], [5.0]).fit(train, texts=texts())
    (row,) = heads.evaluate([head], [test])
    assert row["animals:top1"] == (head.predict(test) == test.y).mean()
    assert row["params"]["alpha"] == 2.0
    assert "alpha" not in row
    keep = np.isin(test.y, [3, 1])
    test.X, test.y = test.X[keep], test.y[keep]
    (row,) = heads.evaluate([head], [test], class_subset=[3, 1])
    logits = formula(ZeroShot().fit(texts()).linear(), train.X, train.y, test.X, 2.0, 5.0)[:, [3, 1]]
    assert row["animals:nll"] == pytest.approx(nll(logits, (test.y == 1).astype(int)), rel=1e-4)


def test_saved_and_loaded_is_the_same_head(images: Any, texts: Any, tmp_path: Path) -> None:
    test = images(n=50, seed=3)
    head = TipAdapter().fit(images(n=60), texts=texts())
    loaded = heads.load(heads.save(head, tmp_path / "tip.safetensors"))
    np.testing.assert_array_equal(loaded.logits(test.X), head.frozen().logits(test.X))
    assert loaded.provenance == head.provenance_ == json.loads(json.dumps(head.provenance_))
    restricted = head.frozen().restrict([4, 0])
    again = heads.load(restricted.save(tmp_path / "two.safetensors"))
    np.testing.assert_array_equal(again.logits(test.X), restricted.logits(test.X))
    np.testing.assert_array_equal(restricted.logits(test.X), head.frozen().logits(test.X)[:, [4, 0]])


def test_is_bound_to_encoder_and_text_tower(images: Any, texts: Any) -> None:
    head = TipAdapter().fit(images(), texts=texts())
    assert (head.provenance_["encoder_key"], head.provenance_["text_digest"]) == ("enc-1", "text-1")
    assert [entry["name"] for entry in head.provenance_["fitted_on"]] == ["animals", "texts"]
    for change in ({"encoder_key": "enc-2"}, {"text_digests": ("text-2",)}, {"classnames": tuple("abcde")}):
        with pytest.raises(MismatchError):
            head.check(images(**change))
        with pytest.raises(MismatchError):
            heads.evaluate([head], [images(**change)])
    with pytest.raises(MismatchError, match="text tower"):
        TipAdapter().fit(images(), texts=texts(text_digest="text-2"))
    with pytest.raises(MismatchError, match="7 features"):
        TipAdapter().fit(images().numpy()[0][:, :7], images().y, texts=texts())
    with pytest.raises(HeadError, match="not linear"):
        head.frozen().linear()


def test_one_row_per_class_takes_the_papers_pair(images: Any, texts: Any) -> None:
    X, y = images().numpy()
    rows = [int(np.flatnonzero(y == c)[0]) for c in range(5)]
    head = TipAdapter().fit(X[rows], y[rows], texts=texts())
    assert (head.alpha_, head.beta_) == (1.0, 5.5)
    assert head.provenance_["params"]["selection"] == "paper"
    two = TipAdapter().fit(X[[*rows, int(np.flatnonzero(y == 2)[1])]], np.append(y[rows], 2), texts=texts())
    assert two.provenance_["params"]["selection"] == "folds"  # by the two rows of class 2
    np.testing.assert_allclose(np.unique(two.top1_ * 2), np.unique((two.top1_ * 2).round()))


def test_classes_without_rows_and_unordered_rows(images: Any, texts: Any) -> None:
    store, test = images(), images(seed=3)
    keep = np.random.default_rng(0).permutation(np.flatnonzero(store.y != 2))
    head = TipAdapter([1.0], [5.5]).fit(store.X[keep], store.y[keep], texts=texts())
    zero = ZeroShot().fit(texts()).linear()
    np.testing.assert_allclose(head.frozen().logits(test.X)[:, 2], zero.logits(test.X)[:, 2])
    wanted = formula(zero, store.X[keep], store.y[keep], test.X, 1.0, 5.5)
    np.testing.assert_allclose(head.frozen().logits(test.X), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"alphas": [-1.0]}, "a list of numbers from 0"),
        ({"alphas": []}, "a list of numbers from 0"),
        ({"betas": [0.0, 1.0]}, "a list of numbers above 0"),
        ({"betas": [float("nan")]}, "a list of numbers above 0"),
        ({"metric": "ece"}, "'top1' or 'nll'"),
    ],
)
def test_invalid_parameters_are_refused(images: Any, texts: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        TipAdapter(**params).fit(images(), texts=texts())


def test_rows_that_are_not_finite_are_named(images: Any, texts: Any) -> None:
    X, y = images().numpy()
    head = TipAdapter([1.0], [5.5]).fit(X, y, texts=texts())
    X[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match="3, 8"):
        TipAdapter().fit(X, y, texts=texts())
    with pytest.raises(HeadError, match=r"\[3, 8\]"):
        head.predict(X)


def test_rows_of_other_lengths_vote_by_direction_and_enter_the_text_head_unscaled(images: Any, texts: Any) -> None:
    train, test, zero = images(n=70, noise=0.5), images(n=60, seed=4, noise=0.5), ZeroShot().fit(texts()).linear()
    X, y = train.numpy(np.float64)
    lengths = np.random.default_rng(0).uniform(0.2, 5.0, size=130)[:, None]
    K, V = X * lengths[:70], test.X * lengths[70:]
    head = TipAdapter([1.7], [4.0]).fit(K, y, texts=zero)
    votes = formula(zero, X, y, test.X, 1.7, 4.0) - formula(zero, X, y, test.X, 0.0, 4.0)
    base = V @ zero.weights.T.astype(np.float64) + zero.bias
    np.testing.assert_allclose(head.frozen().logits(V), base + votes, rtol=1e-4, atol=1e-4)
    nothing = TipAdapter([0.0], [4.0]).fit(K, y, texts=zero)
    np.testing.assert_array_equal(nothing.frozen().logits(V), zero.logits(V))
