"""Linear probes and metrics of other tools, on the same features: their numbers, by their own code where it runs."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyDataset, NumpyEncoder

import featcache
import heads
from featcache.encoding.texts import embed_prompts
from heads import KNN, AdamW, LinearHead, Logistic, ResidentStore
from heads.kernels import linear_cross_entropy

CLASSES = tuple("abcdef")


def split(name: str, rows: int, seed: int) -> ResidentStore:
    """Unit rows of six overlapping classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(CLASSES)
    X = np.eye(16)[labels] + rng.normal(scale=0.45, size=(rows, 16))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return ResidentStore(X.astype(np.float32), labels, CLASSES, name="made", split=name)


TRAIN, VAL, TEST = split("train", 300, 1), split("val", 120, 2), split("test", 180, 3)


def rows(store: ResidentStore) -> tuple[np.ndarray, np.ndarray]:
    return store.numpy(np.float64)


def metrics(head: Any) -> dict[str, Any]:
    (row,) = heads.evaluate([head], [TEST])
    return {key.partition(":")[2]: value for key, value in row.items() if key.startswith("made:")}


def test_dinov3s_grid_chooses_and_reports_what_scikit_learn_does() -> None:
    """45 values of C, chosen by accuracy on a validation split, then a fit on both splits."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    grid = np.logspace(-6, 5, 45)
    (X, y), (V, v), (T, t) = map(rows, (TRAIN, VAL, TEST))
    found = [LogisticRegression(C=C, tol=1e-12, max_iter=5000).fit(X, y).score(V, v) for C in grid]
    head = Logistic(grid, metric="top1", refit=True).fit(TRAIN, selection=VAL)
    assert found[int(np.argmin(abs(grid - head.C_)))] == max(found)
    model = LogisticRegression(C=head.C_, tol=1e-12, max_iter=5000).fit(np.r_[X, V], np.r_[y, v])
    assert metrics(head)["top1"] == model.score(T, t)
    assert metrics(head)["nll"] == pytest.approx(log_loss(t, model.predict_proba(T)), abs=1e-6)


@pytest.mark.parametrize("k", [10, 20, 100, 200])
def test_votes_of_neighbours_are_dinos(k: int) -> None:
    (X, y), (T, _) = rows(TRAIN), rows(TEST)
    X, T = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (X, T))
    cosines = T @ X.T
    near = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(T), len(CLASSES)))
    np.add.at(votes, (np.arange(len(T))[:, None], y[near]), np.exp(np.take_along_axis(cosines, near, 1) / 0.07))
    head = KNN(k, temperature=0.07, calibrate=False).fit(TRAIN)
    np.testing.assert_allclose(head.predict_proba(T), votes / votes.sum(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(head.predict(T), votes.argmax(axis=1))


@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_clip_benchmarks_own_probe_has_the_same_accuracy_and_nll(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are drawn differently, so figures agree up to the spread over seeds."""
    theirs = pytest.importorskip("clip_benchmark.metrics.linear_probe")
    for kind in (torch.nn.Module, torch.Tensor):  # it asks for a GPU
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    X, y, T, t = (torch.from_numpy(values) for store in (TRAIN, TEST) for values in store.numpy(np.float32))
    loader = torch.utils.data.DataLoader(theirs.FeatureDataset(X, y), batch_size=64, shuffle=True)
    figures = []
    for seed in range(3):
        with contextlib.redirect_stdout(io.StringIO()):
            logits = theirs.train(loader, 16, len(CLASSES), decay, 0.1, 10, False, "cpu", seed)(T).detach()
        right = (logits.argmax(dim=1) == t).float().mean()
        found = metrics(AdamW(0.1, weight_decay=decay, batch_size=64, epochs=10, warmup=0, seed=seed).fit(TRAIN))
        figures.append(
            [[float(right), float(torch.nn.functional.cross_entropy(logits, t))], [found["top1"], found["nll"]]]
        )
    one, other = np.mean(figures, axis=0)
    assert one == pytest.approx(other, abs=0.02)


def test_metrics_are_those_of_clip_benchmark_and_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

    zeroshot = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    head = Logistic(10.0).fit(TRAIN)
    (T, t), found = rows(TEST), metrics(head)
    logits = T @ head.coef_.T.astype(np.float64) + head.intercept_
    assert found["top5"] == top_k_accuracy_score(t, logits, k=5)
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(t, logits.argmax(axis=1)))
    targets = np.stack([t % 2 == 0, t > 2, t == 5], axis=1).astype(np.int8)
    ours = heads.multilabel_metrics(logits[:, :3], targets, CLASSES[:3])
    theirs = zeroshot.average_precision_per_class(torch.from_numpy(logits[:, :3]), torch.from_numpy(targets).long())
    assert ours["map_macro"] == pytest.approx(theirs.mean().item(), abs=1e-6)
    assert ours["map_macro"] == pytest.approx(average_precision_score(targets, logits[:, :3]))


def test_recall_is_clip_benchmarks(tmp_path: Any) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    images = featcache.encode(NumpyDataset(), model=NumpyEncoder(), root=tmp_path)
    prompts = {name: [f"{name} {'x' * place}" for place in range(1 + row % 3)] for row, name in enumerate(images.ids)}
    texts = embed_prompts(list(prompts), None, NumpyEncoder(), prompts=prompts, root=tmp_path).store
    owners = np.repeat(np.arange(len(texts)), np.asarray(texts.counts))
    captions = torch.from_numpy(np.concatenate([r[:n] for r, n in zip(texts.raw, texts.counts, strict=True)]))
    scores = captions @ torch.from_numpy(images.numpy(np.float32)[0]).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(owners)), torch.from_numpy(owners)] = True
    row = heads.retrieve(images, texts, (1, 5))
    for k in (1, 5):
        of_images, of_texts = (
            (theirs.batchify(theirs.recall_at_k, *pair, 64, "cpu", k=k) > 0).float().mean().item()
            for pair in ((scores, positive), (scores.T, positive.T))
        )
        assert row[f"fake:text_to_image_recall@{k}"] == pytest.approx(of_images, abs=1e-6)
        assert row[f"fake:image_to_text_recall@{k}"] == pytest.approx(of_texts, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_torchs_linear_cross_entropy(reduction: str) -> None:
    torchs = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if torchs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    X, y = (torch.from_numpy(values) for values in rows(TEST))
    W = torch.randn(len(CLASSES), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for function in (linear_cross_entropy, torchs):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        loss = function(x, w, y, reduction=reduction)
        loss.sum().backward()
        found.append((loss.detach(), x.grad, w.grad))
    torch.testing.assert_close(*found)


def test_a_head_of_weights_alone_is_evaluated() -> None:
    """Released linear heads, such as DINOv2's: weights, intercepts and class names."""
    head = Logistic(1.0).fit(TRAIN)
    assert metrics(LinearHead(head.coef_, head.intercept_, CLASSES))["nll"] == pytest.approx(metrics(head)["nll"])
