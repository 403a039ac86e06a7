"""LP++: its steps against autograd in float64, the choice of their number, refusals and odd cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import FeatcacheWarning, HeadError, MismatchError
from heads import LPPlusPlus, ZeroShot
from heads.estimators.few_shot import lp_plus_plus
from heads.solvers.folds import FoldAssigner


def reference(X: Any, y: Any, T: Any, steps: int) -> list[tuple[Any, Any]]:
    """Class weights and biases after every step, by torch's autograd and SGD in float64."""
    F, labels, n = torch.tensor(X, dtype=torch.float64), torch.tensor(y), len(y)
    T = torch.nn.functional.normalize(torch.tensor(T, dtype=torch.float64), dim=1)
    onehot = torch.nn.functional.one_hot(labels, len(T)).double()
    G = F @ T.T
    w = (onehot.T @ F).requires_grad_()
    b = torch.zeros(len(T), dtype=torch.float64, requires_grad=True)
    present = onehot.sum(0) > 0
    start = 250 * ((onehot * G).sum(0)[present] / onehot.sum(0)[present]).mean()
    blend = (start * torch.ones(len(T), dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.SGD([w, b], float(4 * n / torch.linalg.eigvalsh(F.T @ F)[-1]), momentum=0.9)
    found = []
    for step in range(1, steps + 1):
        loss = torch.nn.functional.cross_entropy(F @ w.T + b + blend * G, labels)
        blend.grad = None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            blend.data -= n / (4 * (G**2).sum(0).max()) * blend.grad
        found.append(((w + blend[:, None] * T).detach().numpy().copy(), b.detach().numpy().copy()))
    return found


def accuracy(state: tuple[Any, Any], X: Any, y: Any) -> float:
    return float(((X.astype(np.float64) @ state[0].T + state[1]).argmax(axis=1) == y).mean())


def test_steps_are_those_of_autograd(images: Any, texts: Any) -> None:
    X, y = images(n=60, noise=0.6).numpy()
    rows = np.flatnonzero(y != 3)  # a class without rows has text alone
    T = ZeroShot().fit(texts()).coef_
    head = LPPlusPlus(steps=25).fit(X[rows], y[rows], texts=texts())
    states = reference(X[rows], y[rows], T, 25)
    coef, bias = states[head.steps_ - 1]
    np.testing.assert_allclose(head.coef_, coef, atol=2e-3 * np.abs(coef).max())
    np.testing.assert_allclose(head.intercept_, bias, atol=2e-3 * np.abs(coef).max())
    one = LPPlusPlus(steps=1).fit(X, y, texts=texts())
    np.testing.assert_allclose(one.coef_, reference(X, y, T, 1)[0][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("split", [False, True])
def test_the_number_of_steps_is_chosen_on_held_out_rows(images: Any, texts: Any, split: bool) -> None:
    train, other = images(n=60, noise=0.7), images(n=100, seed=9, noise=0.7, split="val", dataset_key="data-9")
    X, y = train.numpy()
    T, wanted, n = ZeroShot().fit(texts()).coef_, np.zeros(12), 0
    head = LPPlusPlus(steps=12).fit(train, texts=texts(), selection=other if split else None)
    fold = FoldAssigner(5)(y)
    for k in range(1 if split else 5):
        fitting = np.ones(60, bool) if split else fold != k
        V, v = other.numpy() if split else (X[~fitting], y[~fitting])
        n += len(v)
        wanted += [accuracy(state, V, v) * len(v) for state in reference(X[fitting], y[fitting], T, 12)]
    np.testing.assert_allclose(head.top1_, wanted / n, atol=1.5 / n)  # float32 may turn one row
    assert head.top1_[head.steps_ - 1] == head.top1_.max()
    assert head.provenance_["params"]["selection"] == ("split" if split else "folds")
    assert len(head.provenance_["chosen_on"]) == split
    by_nll = LPPlusPlus(steps=12, metric="nll").fit(train, texts=texts())
    assert by_nll.steps_ == int(by_nll.nll_.argmin()) + 1


def test_as_many_folds_are_used_as_hold_out_enough_rows(
    images: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = images(n=60, noise=0.7).numpy()
    fold, T = FoldAssigner(5)(y), ZeroShot().fit(texts()).coef_
    first = int((fold == 0).sum())
    monkeypatch.setattr("heads.estimators.few_shot.lp_plus_plus.HELD_ROWS", first + 1)
    head = LPPlusPlus(steps=12).fit(X, y, texts=texts())
    wanted = np.zeros(12)
    for k in range(2):
        states = reference(X[fold != k], y[fold != k], T, 12)
        wanted += [accuracy(state, X[fold == k], y[fold == k]) * (fold == k).sum() for state in states]
    n = first + int((fold == 1).sum())
    np.testing.assert_allclose(head.top1_, wanted / n, atol=1.5 / n)


def test_bfloat16_products_leave_the_steps_where_they_were(
    images: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = images(n=60, noise=0.6).numpy()
    wide = LPPlusPlus(steps=25).fit(X, y, texts=texts())
    monkeypatch.setattr("heads.solvers.logistic.precision.LOW_WORK", 0)
    monkeypatch.setattr("heads.solvers.logistic.precision.has_bfloat16", lambda: True)
    narrow = LPPlusPlus(steps=25).fit(X, y, texts=texts())
    coef, _ = reference(X, y, ZeroShot().fit(texts()).coef_, 25)[narrow.steps_ - 1]
    assert not np.array_equal(narrow.coef_, wide.coef_)
    np.testing.assert_allclose(narrow.nll_, wide.nll_, rtol=1e-2)
    np.testing.assert_allclose(narrow.coef_, coef, atol=1e-2 * np.abs(coef).max())


def test_the_fitted_head_is_linear(images: Any, texts: Any, tmp_path: Path) -> None:
    train, test = images(n=60), images(n=100, seed=4, split="test", dataset_key="data-2")
    head = LPPlusPlus(steps=20).fit(train, texts=texts())
    loaded = heads.load(head.save(tmp_path / "lp.safetensors"))
    np.testing.assert_allclose(loaded.predict_proba(test), head.predict_proba(test), atol=1e-4)
    (row,) = heads.evaluate([head], [test])
    assert row["animals:top1"] > 0.9
    assert (loaded.provenance["encoder_key"], loaded.provenance["text_digest"]) == ("enc-1", "text-1")
    with pytest.raises(MismatchError):
        head.check(images(encoder_key="enc-2"))
    assert len(heads.interpolate(ZeroShot().fit(texts()), head, [0.0, 0.5, 1.0])) == 3


def test_one_row_per_class_takes_every_step(images: Any, texts: Any) -> None:
    X, y = images().numpy()
    rows = [int(np.flatnonzero(y == c)[0]) for c in range(5)]
    head = LPPlusPlus(steps=12).fit(X[rows], y[rows], texts=texts())
    assert head.steps_ == 12
    assert head.top1_.size == 0
    assert head.provenance_["params"]["selection"] == "none"
    assert head.score(X, y) > 0.8


def test_invalid_settings_and_rows_are_refused(images: Any, texts: Any) -> None:
    for params, message in (({"steps": 0}, "a whole number from 1"), ({"metric": "ece"}, "'top1' or 'nll'")):
        with pytest.raises(HeadError, match=message):
            LPPlusPlus(**params).fit(images(), texts=texts())
    X, y = images().numpy()
    X[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match="3, 8"):
        LPPlusPlus().fit(X, y, texts=texts())
    zero = ZeroShot().fit(texts()).linear()
    zero.weights[2] = 0.0
    with pytest.raises(HeadError, match="text vector for every class"):
        LPPlusPlus().fit(images(), texts=zero)


@pytest.mark.parametrize("length", [0.3, 5.0])
def test_rows_of_another_length_than_published_give_a_warning(images: Any, texts: Any, length: float) -> None:
    store, text = images(n=40), ZeroShot().fit(texts()).linear()
    with pytest.warns(FeatcacheWarning, match=f"a length of {length:g} .* scale the rows to length 1"):
        LPPlusPlus(steps=3).fit(length * store.X.astype(np.float32), store.y, texts=text)


def test_steps_take_denormal_numbers_as_zero(images: Any, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Well separated classes make denormal probabilities, with which sums took most of the time."""
    found, step = [], lp_plus_plus._Descent.step

    def recorded(descent: Any) -> None:
        step(descent)
        found.append(float(torch.tensor(1e-40) * 1.0))

    monkeypatch.setattr(lp_plus_plus._Descent, "step", recorded)
    LPPlusPlus(steps=2).fit(images(n=60), texts=texts())
    assert found
    assert not any(found)
    assert float(torch.tensor(1e-40) * 1.0) > 0
