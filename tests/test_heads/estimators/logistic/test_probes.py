"""Banks of trained probes: each probe is what plain torch makes of it alone; the cosine head's formula."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import FeatcacheWarning, HeadError
from heads import HEADS, AdamW, LinearHead
from heads.estimators.catalogue import make_head

Cosine, SGD = HEADS["cosine"], HEADS["sgd"]
N, D, C = 210, 7, 3


def rows(seed: int = 0, noise: float = 0.5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.arange(N) % C
    X = np.eye(C, D)[y] + noise * rng.normal(size=(N, D))
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def alone(X: Any, y: Any, kind: Any, lr: float, settings: dict[str, Any], **options: Any) -> torch.nn.Linear:
    """One probe by torch's own layer, loss, optimiser and schedule, in float64."""
    layer = torch.nn.Linear(D, C, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimiser = kind(layer.parameters(), lr=lr, **options)
    epochs, size = settings["epochs"], settings["batch_size"]
    total = epochs * math.ceil(N / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for epoch in range(epochs):
        order = np.random.default_rng([settings["seed"], epoch]).permutation(N)
        for batch in np.split(order, range(size, N, size)):
            loss = torch.nn.functional.cross_entropy(
                layer(torch.from_numpy(X[batch]).double()), torch.from_numpy(y[batch])
            )
            optimiser.zero_grad()
            loss.backward()
            if kind is torch.optim.AdamW:
                torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return layer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_probe_of_a_bank_is_one_that_torch_trains_alone(name: str) -> None:
    X, y = rows()
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 64, "seed": 3, "warmup": 0}
    rates, decays = [0.01, 0.3, 2.0], [0.0, 0.05]
    head = make_head(name, {**settings, "lr": rates, "weight_decay": decays}).fit(X, y)
    path = head.path_heads()
    assert [path.provenance.params["lr"] for path in path] == np.repeat(rates, 2).tolist()
    for member in path:
        lr, decay = (member.provenance.params[key] for key in ("lr", "weight_decay"))
        if name == "sgd":
            layer = alone(X, y, torch.optim.SGD, lr * 64 / 256, settings, momentum=0.9, weight_decay=decay)
        else:
            layer = alone(X, y, torch.optim.AdamW, lr, settings, weight_decay=decay)
        np.testing.assert_allclose(
            member.weights, layer.weight.detach(), atol=1e-5 * max(1, np.abs(member.weights).max())
        )
        np.testing.assert_allclose(member.bias, layer.bias.detach(), atol=1e-5 * max(1, np.abs(member.bias).max()))
    assert head.lr_ in rates
    assert head.weight_decay_ in decays


@pytest.mark.parametrize("name", ["sgd", "adamw", "cosine"])
@pytest.mark.parametrize("metric", ["top1", "nll", "squared_error"])
def test_the_metric_chooses_on_the_validation_split(name: str, metric: str) -> None:
    (X, y), (V, v) = rows(noise=0.8), rows(seed=1, noise=0.8)
    head = make_head(name, {"lr": [1e-4, 0.03, 1.0, 30.0], "metric": metric, "epochs": 30}).fit(X, y, selection=(V, v))
    losses = []
    for member in head.path_heads():
        p = member.predict_proba(V).astype(np.float64)
        nll = -np.log(np.maximum(p[np.arange(N), v], 1e-300)).mean()
        loss = {
            "top1": -(p.argmax(1) == v).mean(),
            "nll": nll,
            "squared_error": ((p - np.eye(C)[v]) ** 2).sum(1).mean(),
        }
        losses.append((loss[metric], nll))
    best = min(range(len(losses)), key=losses.__getitem__)
    assert head.path_heads()[best].provenance.params["lr"] == head.lr_
    np.testing.assert_allclose(head.linear().weights, head.path_heads()[best].weights)
    assert head.provenance_.params["metric"] == metric


def test_a_probe_that_diverges_is_left_out_of_its_bank() -> None:
    X, y = rows()
    head = SGD(lr=[1e-12, 1e30], epochs=5).fit(1e12 * X, y)
    assert head.lr_ == 1e-12
    assert len(head.path_heads()) in (1, 2)
    with pytest.raises(HeadError, match="metric is 'f1', expected 'top1', 'nll' or 'squared_error'"):
        AdamW(metric="f1").fit(X, y)
    with pytest.raises(HeadError, match=r"momentum is 1.0"):
        SGD(momentum=1.0).fit(X, y)


def test_the_cosine_head_begins_at_class_means_and_learns_one_scale() -> None:
    X, y = rows()
    start = Cosine(lr=1e-12, epochs=1).fit(X, y)
    means = np.stack([X[y == c].mean(axis=0, dtype=np.float64) for c in range(C)])
    np.testing.assert_allclose(start.coef_, 10 * means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-5)
    prior = LinearHead(np.eye(C, D) * [[1], [2], [3]], np.ones(C), tuple("abc"))
    held = Cosine(lr=1e-12, epochs=1, prior=prior).fit(X, y, classnames=tuple("abc"))
    np.testing.assert_allclose(held.coef_, 10 * np.eye(C, D), atol=1e-5)
    head = Cosine(lr=0.05, epochs=5, batch_size=70, seed=2).fit(X, y)
    # The same training in float64, by autograd through torch's cosine similarity.
    w = torch.from_numpy(means / np.linalg.norm(means, axis=1, keepdims=True)).requires_grad_()
    s = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([w, s], lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 15)
    for epoch in range(5):
        for batch in np.split(np.random.default_rng([2, epoch]).permutation(N), range(70, N, 70)):
            x = torch.from_numpy(X[batch]).double()
            cosines = torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=2)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(s.exp() * cosines, torch.from_numpy(y[batch])).backward()
            optimiser.step()
            schedule.step()
    want = (s.exp() * torch.nn.functional.normalize(w, dim=1)).detach()
    np.testing.assert_allclose(head.coef_, want, rtol=1e-3, atol=1e-4)
    assert np.ptp(np.linalg.norm(head.coef_, axis=1)) < 1e-4


def test_adamw_makes_enough_updates_of_few_rows() -> None:
    X, y = rows()
    few = AdamW(lr=0.01).fit(X, y)  # 2 batches of 128
    assert (few.provenance_["params"]["epochs"], len(few.losses_)) == (150, 150)
    np.testing.assert_array_equal(few.coef_, AdamW(lr=0.01, epochs=150).fit(X, y).coef_)
    assert AdamW(lr=0.01, epochs=10).fit(X, y).losses_[-1] > few.losses_[-1]
    assert AdamW(lr=0.01, batch_size=2).fit(X, y).provenance_["params"]["epochs"] == 10


def test_sgd_makes_enough_updates_of_few_rows() -> None:
    X, y = rows()
    few = SGD(lr=[1.0]).fit(X, y)  # 2 batches of 128
    assert few.provenance_["params"]["epochs"] == 150
    assert len(few.losses_) == 150
    one = SGD(lr=[1.0], batch_size=1, epochs=None).fit(X, y)
    assert one.provenance_["params"]["epochs"] == 10
    settings = {"epochs": 150, "batch_size": 128, "seed": 0}
    layer = alone(X, y, torch.optim.SGD, 1.0 * 128 / 256, settings, momentum=0.9)
    np.testing.assert_allclose(few.coef_, layer.weight.detach().numpy(), atol=1e-3)


@pytest.mark.parametrize("kind", [SGD, AdamW, Cosine])
def test_rows_too_short_for_the_learning_rates_get_a_warning(kind: Any) -> None:
    X, y = rows()
    with pytest.warns(FeatcacheWarning, match=r"length 0.0001 .*standardise=True"):
        kind(epochs=5).fit(1e-4 * X, y)
    noise = np.random.default_rng(0).permutation(y)  # not learnt either, but not for the rows' length
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(epochs=5).fit(X, y), kind(epochs=5, standardise=True).fit(1e-4 * X, y), kind(epochs=2).fit(X, noise)
