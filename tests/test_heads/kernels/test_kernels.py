"""NLL and counts: every implementation against numpy and scikit-learn in float64, and the checks of `linear_nll`.

Integer logits are exact in every implementation and often tie, so that ranks must agree for every row.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from threadpoolctl import threadpool_limits
from torch.utils._python_dispatch import TorchDispatchMode

from featcache.errors import HeadError, MissingExtraError
from heads import Metrics
from heads.kernels import IMPLS, Tally, available, dispatch, linear_nll
from heads.kernels.problem import pose
from heads.kernels.tally import RowStats, _in_one_copy, row_stats

ON_CPU = ("reference", "chunked", "cpu")
SHAPES = [(1, 3, 2), (257, 16, 65), (130, 8, 2), (70, 5, 1000), (9, 4, 2049), (400, 6, 64)]

Array = NDArray[Any]


def whole(seed: int, n: int, dim: int, n_classes: int, n_heads: int = 2) -> tuple[Array, Array, Array, Array]:
    """Features, weights (H, C, D), biases and labels, with integer logits."""
    rng = np.random.default_rng(seed)
    X = rng.integers(-2, 3, (n, dim)).astype(np.float32)
    W = rng.integers(-2, 3, (n_heads, n_classes, dim)).astype(np.float32)
    b = rng.integers(-3, 4, (n_heads, n_classes)).astype(np.float32)
    return X, W, b, rng.integers(0, n_classes, n)


def unit(seed: int, n: int, dim: int, n_classes: int, n_heads: int = 2) -> tuple[Array, Array, Array]:
    """Unit rows, unit class weights, labels: logits at scale 100 are saturated."""
    rng = np.random.default_rng(seed)
    X, W = rng.normal(size=(n, dim)), rng.normal(size=(n_heads, n_classes, dim))
    X, W = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (X, W))
    return X.astype(np.float32), W.astype(np.float32), rng.integers(0, n_classes, n)


def logits_of(X: Array, W: Array, b: Array | None = None, scale: float = 1.0) -> Array:
    z = scale * (X.astype(np.float64) @ W.astype(np.float64).T)
    return z if b is None else z + b


def check(tally: Tally, head: int, z: Array, y: Array, tolerance: float = 2e-5) -> None:
    """Everything in a tally for one head, against logits (N, C) in float64."""
    rows = np.arange(len(y))
    log_p = log_softmax(z, axis=1)
    p, order = np.exp(log_p), np.argsort(-z, axis=1, kind="stable")
    rank, confidence = (order == y[:, None]).argmax(axis=1), p.max(axis=1)
    assert tally.row_nll is not None
    assert tally.row_rank is not None
    np.testing.assert_allclose(tally.row_nll[head], -log_p[rows, y], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(tally.row_rank[head], rank)
    n, onehot = len(y), np.eye(z.shape[1])[y]
    row = tally.results()[head]
    edges = np.linspace(0, 1, tally.bin_rows.shape[1] + 1)
    inside = (confidence[:, None] > edges[:-1] + 1e-9) & (confidence[:, None] <= edges[1:] + 1e-9)
    expected = {
        "nll": -log_p[rows, y].mean(),
        "nll_capped": -np.log(p[rows, y] + 1e-8).mean(),
        "top1": (rank == 0).mean(),
        "top5": (rank < 5).mean(),
        "mean_per_class_recall": np.mean([(rank[y == c] == 0).mean() for c in np.unique(y)]),
        "brier": ((p - onehot) ** 2).sum(axis=1).mean(),
        "ece": np.abs((inside * ((rank == 0) - confidence)[:, None]).sum(axis=0)).sum() / n,
    }
    assert set(row) == set(expected)
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance), key
    np.testing.assert_array_equal(tally.bin_rows[head], inside.sum(axis=0))
    if tally.confusion is not None:
        np.testing.assert_array_equal(
            tally.confusion[head], confusion_matrix(y, order[:, 0], labels=np.arange(z.shape[1]))
        )


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize(("n", "dim", "n_classes"), SHAPES)
def test_every_implementation_finds_what_numpy_finds(impl: str, n: int, dim: int, n_classes: int) -> None:
    X, W, b, y = whole(n, n, dim, n_classes)
    y[0] = n_classes - 1
    tally = linear_nll(X, W, y, bias=b, logit_scale=[0.5, 2.0], impl=impl, per_sample=True, confusion=n_classes < 100)
    for head, scale in enumerate((0.5, 2.0)):
        check(tally, head, logits_of(X, W[head], b[head], scale), y)


@pytest.mark.parametrize("impl", ON_CPU)
def test_results_are_scikit_learns(impl: str) -> None:
    X, W, y = unit(0, 500, 12, 23, 1)
    row = linear_nll(X, W[0], y, logit_scale=7.0, impl=impl).results()[0]
    p = softmax(logits_of(X, W[0], scale=7.0), axis=1)
    assert row["nll"] == pytest.approx(log_loss(y, p, labels=np.arange(23)), rel=1e-5)
    assert row["top5"] == top_k_accuracy_score(y, p, k=5, labels=np.arange(23))
    assert row["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(y, p.argmax(axis=1)), rel=1e-12)


@pytest.mark.parametrize("impl", ON_CPU)
def test_results_are_those_of_streamed_logits(impl: str) -> None:
    X, W, y = unit(1, 800, 16, 37, 1)
    metrics = Metrics(37)
    metrics.update(logits_of(X, W[0], scale=20.0), y)
    row = linear_nll(X, W[0], y, logit_scale=20.0, impl=impl).results()[0]
    for key, value in metrics.result().items():
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("impl", ON_CPU)
def test_large_logits_do_not_overflow(impl: str) -> None:
    X, W, y = unit(2, 300, 8, 50, 1)
    W[0, 7] = 40 * X[3]  # a logit of 4000, where exp of anything overflows
    tally = linear_nll(X, W, y, logit_scale=100.0, impl=impl, per_sample=True)
    truth = -log_softmax(logits_of(X, W[0], scale=100.0), axis=1)[np.arange(300), y]
    assert tally.row_nll is not None
    np.testing.assert_allclose(tally.row_nll[0], truth, rtol=1e-5, atol=1e-3)
    assert np.isfinite(tally.nll).all()


@pytest.mark.parametrize("impl", ON_CPU)
def test_ties_rank_by_class_and_a_constant_head_is_not_right(impl: str) -> None:
    X, y = np.zeros((30, 4), np.float32), np.arange(30) % 10
    tally = linear_nll(X, np.ones((10, 4), np.float32), y, impl=impl, per_sample=True)
    assert tally.row_rank is not None
    np.testing.assert_array_equal(tally.row_rank[0], y)
    row = tally.results()[0]
    assert (row["top1"], row["top5"]) == (0.1, 0.5)
    assert row["nll"] == pytest.approx(np.log(10), abs=1e-6)


@pytest.mark.parametrize("impl", ON_CPU)
def test_interpolations_are_those_of_the_weights(impl: str) -> None:
    X, W, b, y = whole(3, 200, 7, 70)
    alphas = [0.0, 0.5, 1.0, 1.5, -0.25]
    kw: Any = {"bias": b, "logit_scale": [1.0, 2.0], "impl": impl, "per_sample": True, "confusion": True}
    tally = linear_nll(X, W, y, alphas=alphas, **kw)
    ends = [logits_of(X, W[h], b[h], h + 1.0) for h in range(2)]
    for k, alpha in enumerate(alphas):
        check(tally, k, (1 - alpha) * ends[0] + alpha * ends[1], y)
    alone = linear_nll(X, W, y, **kw)
    np.testing.assert_allclose(tally.nll[[0, 2]], alone.nll, rtol=1e-12)


@pytest.mark.parametrize("impl", ON_CPU)
def test_interpolations_of_heads_that_disagree_do_not_underflow(impl: str) -> None:
    """Both heads are certain of different classes: the maximum at one alpha is useless at another."""
    X, y = np.eye(3, dtype=np.float32), np.array([0, 1, 2])
    W = 5000 * np.stack([np.eye(3), np.roll(np.eye(3), 1, axis=0)]).astype(np.float32)
    alphas = np.linspace(0, 1, 21)
    tally = linear_nll(X, W, y, alphas=list(alphas), impl=impl, per_sample=True)
    z = (1 - alphas[:, None, None]) * W[0].T.astype(np.float64) + alphas[:, None, None] * W[1].T.astype(np.float64)
    truth = logsumexp(z, axis=2) - z[:, np.arange(3), y]
    assert tally.row_nll is not None
    np.testing.assert_allclose(tally.row_nll, truth, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_ensembles_of_templates(impl: str) -> None:
    X, W, b, y = whole(4, 150, 6, 40, 4)  # a mean of four is exact
    z = np.stack([logits_of(X, W[t], b[t], 0.5) for t in range(4)])
    kw: Any = {"bias": b, "logit_scale": 0.5, "impl": impl, "per_sample": True}
    check(linear_nll(X, W, y, ensemble="logits", **kw), 0, z.mean(axis=0), y, 1e-4)
    mean = np.log(softmax(z, axis=2).mean(axis=0))
    tally = linear_nll(X, W, y, ensemble="probabilities", **kw)
    assert tally.row_nll is not None
    np.testing.assert_allclose(tally.row_nll[0], -mean[np.arange(150), y], rtol=1e-4)
    far = linear_nll(X, W, y, logit_scale=1000.0, ensemble="probabilities", impl=impl)
    assert np.isfinite(far.nll).all()  # probabilities underflow, their logarithms do not


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_rounds(impl: str, dtype: torch.dtype) -> None:
    features, weights, labels = unit(5, 200, 16, 90, 1)
    X, W, y = torch.from_numpy(features).to(dtype), torch.from_numpy(weights[0]).to(dtype), torch.from_numpy(labels)
    tally = linear_nll(X, W, y, logit_scale=100.0, impl=impl, per_sample=True)
    z = logits_of(X.float().numpy(), W.float().numpy(), scale=100.0)
    assert tally.row_nll is not None
    np.testing.assert_allclose(tally.row_nll[0], -log_softmax(z, axis=1)[np.arange(200), labels], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_float64_stays_float64(impl: str) -> None:
    X, W, y = unit(6, 100, 8, 30, 1)
    tally = linear_nll(X.astype(np.float64), W[0], y, logit_scale=100.0, impl=impl, per_sample=True)
    truth = -log_softmax(logits_of(X, W[0], scale=100.0), axis=1)[np.arange(100), y]
    assert tally.row_nll is not None
    np.testing.assert_allclose(tally.row_nll[0], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ON_CPU)
def test_class_subset_is_a_head_of_these_classes(impl: str) -> None:
    X, W, b, y = whole(7, 120, 5, 80)
    subset = np.array([70, 3, 5, 41, 0])
    y = subset[y % 5]
    tally = linear_nll(X, W, y, bias=b, class_subset=subset, impl=impl, per_sample=True)
    positions = np.array([subset.tolist().index(label) for label in y])
    for head in range(2):
        check(tally, head, logits_of(X, W[head], b[head])[:, subset], positions)
    with pytest.raises(HeadError, match=r"\[1\] lie outside class_subset"):
        linear_nll(X, W, np.where(y == 3, 1, y), class_subset=subset, impl=impl)


@pytest.mark.parametrize("impl", ON_CPU)
def test_masked_classes_take_no_part_and_a_masked_label_is_impossible(impl: str) -> None:
    X, W, b, _ = whole(8, 40, 5, 67, 1)
    y = np.arange(40) % 60
    b[0, 60:] = -np.inf
    masked = linear_nll(X, W, y, bias=b, impl=impl)
    kept = linear_nll(X, W[:, :60], y, bias=b[:, :60], impl=impl)
    np.testing.assert_allclose(masked.nll, kept.nll, rtol=1e-6)
    np.testing.assert_array_equal(masked.top5, kept.top5)
    assert linear_nll(X, W, np.full(40, 61), bias=b, impl=impl).nll[0] == np.inf
    with pytest.raises(HeadError, match="all masked"):
        linear_nll(X, W, y, bias=np.full((1, 67), -np.inf, np.float32), impl=impl)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_by_row(impl: str, value: float) -> None:
    X, W, _, y = whole(9, 50, 5, 70)
    X[17, 2] = value
    with pytest.raises(HeadError, match=r"infinity in rows \[17\]"):
        linear_nll(X, np.abs(W) + 1, y, impl=impl)


@pytest.mark.parametrize("impl", ON_CPU)
def test_blocks_add_up_and_runs_repeat(impl: str) -> None:
    X, W, b, y = whole(10, 700, 9, 33)
    kw: Any = {"bias": b, "impl": impl, "per_sample": True, "confusion": True}
    at_once, again = linear_nll(X, W, y, **kw), linear_nll(X, W, y, **kw)
    parts = [linear_nll(X[i : i + 300], W, y[i : i + 300], **kw) for i in range(0, 700, 300)]
    for total in (sum(parts[1:], start=parts[0]), Tally.joined(parts)):
        for name, value in vars(at_once).items():
            np.testing.assert_allclose(getattr(total, name), value, rtol=1e-6, err_msg=name)
    for name, value in vars(at_once).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    with pytest.raises(HeadError, match="do not add up"):
        at_once + linear_nll(X, W[:1], y)
    with pytest.raises(HeadError, match="no rows"):
        Tally.joined([])


def test_threads_do_not_change_a_bit() -> None:
    X, W, y = unit(11, 3000, 16, 300)
    one: dict[str, Any] = {}
    two: dict[str, Any] = {}
    for threads, found in ((1, one), (2, two)):
        with threadpool_limits(threads, user_api="blas"):
            found.update(vars(linear_nll(X, W, y, logit_scale=30.0, impl="cpu", per_sample=True)))
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value)


def test_any_kind_of_array_is_accepted(tmp_path: Any) -> None:
    X, W, b, y = whole(12, 64, 6, 11)
    expected = linear_nll(X, W, y, bias=b).nll
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for features in (mapped, torch.from_numpy(X), np.asfortranarray(X), X[::-1].copy()[::-1], np.repeat(X, 2, 0)[::2]):
        for weights in (W, list(W), torch.from_numpy(W), [torch.from_numpy(W[0]), W[1]]):
            found = linear_nll(features, weights, y.tolist(), bias=[b[0], torch.from_numpy(b[1])])
            np.testing.assert_allclose(found.nll, expected, rtol=1e-7)
    one = linear_nll(X.astype(np.float16), W[0], y.astype(np.int32), bias=b[0]).nll
    np.testing.assert_allclose(one, expected[:1], rtol=1e-7)


X, W, B, Y = whole(13, 8, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": X[0]}, "expected \\(N, D\\)"),
        ({"features": X[:0], "labels": Y[:0]}, "at least one row"),
        ({"features": X.astype(int)}, "expected float16"),
        ({"weights": W[:0]}, "got no head"),
        ({"weights": []}, "got no head"),
        ({"weights": W[:, :, :3]}, "expected \\(C, 4\\)"),
        ({"weights": W[:, :1]}, "at least 2"),
        ({"weights": [W[0], W[1, :4]]}, "one C"),
        ({"labels": Y[:-1]}, "expected \\(8,\\)"),
        ({"labels": Y.astype(float)}, "class indices"),
        ({"labels": np.full(8, 5)}, "expected \\[0, 4\\]"),
        ({"labels": np.full(8, -1)}, "expected \\[0, 4\\]"),
        ({"bias": B[:1]}, "for each of 2 heads"),
        ({"logit_scale": [1.0, 2.0, 3.0]}, "one for each of 2"),
        ({"logit_scale": np.nan}, "finite number"),
        ({"alphas": []}, "0 alphas"),
        ({"alphas": [np.inf]}, "finite alphas"),
        ({"alphas": [0.5], "weights": W[0]}, "exactly two heads"),
        ({"alphas": [0.5], "bias": np.full(5, -np.inf)}, "mask classes with class_subset"),
        ({"ensemble": "max"}, "'logits' or 'probabilities'"),
        ({"ensemble": "logits", "alphas": [0.5]}, "no alphas"),
        ({"class_subset": [0, 0]}, "two different"),
        ({"class_subset": [0, 5]}, "classes 0 to 4"),
        ({"n_bins": 0}, "at least 1"),
        ({"impl": "fast"}, "expected auto or one of reference"),
        ({"impl": "cpu", "features": X.astype(np.float64)}, "use impl='chunked'"),
        ({"impl": "cpu", "ensemble": "probabilities"}, "use impl='chunked'"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"features": X, "weights": W, "labels": Y} | change
    with pytest.raises(HeadError, match=message):
        linear_nll(arguments.pop("features"), arguments.pop("weights"), arguments.pop("labels"), **arguments)


def test_the_numba_pass_is_chosen_if_available_and_reported_if_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = pose(X, W, Y)
    assert set(ON_CPU) <= set(available(problem)) <= set(IMPLS)
    assert "cpu" not in available(pose(X.astype(np.float64), W, Y))
    expected = linear_nll(X, W, Y).nll
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "heads.kernels.cpu")
    assert "cpu" not in available(problem)
    with pytest.raises(MissingExtraError, match="pip install numba"):
        linear_nll(X, W, Y, impl="cpu")
    np.testing.assert_allclose(linear_nll(X, W, Y).nll, expected, rtol=1e-6)


WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::index.Tensor"}


def test_a_tally_is_summed_without_waiting_for_a_gpu() -> None:
    """The host never needs the shape or value of a result: on a GPU it only waits for the final copy."""
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    labels = torch.arange(12) % 3
    rows = RowStats.stack([row_stats(torch.randn(12, 3), labels, predicted=True)] * 2)
    with Watch():
        Tally.of_rows(rows, labels, 3)
    assert called
    assert not WAITS & set(called)


def test_confidences_add_up_to_the_bit_in_any_order() -> None:
    rng = np.random.default_rng(0)
    confidence = torch.from_numpy(rng.uniform(0.0, 1.0, (1, 5000)).astype(np.float32))
    labels, order = torch.zeros(5000, dtype=torch.int64), torch.from_numpy(rng.permutation(5000))

    def tally(some: torch.Tensor) -> Tally:
        zeros = torch.zeros(1, 5000)
        return Tally.of_rows(RowStats(zeros, zeros.long(), some, zeros), labels, 2)

    found = tally(confidence).bin_confidence
    assert np.array_equal(found, tally(confidence[:, order]).bin_confidence)
    exact = confidence.double().numpy()[0]
    places = np.clip(np.ceil(exact * 15).astype(int) - 1, 0, 14)
    np.testing.assert_allclose(found[0], np.bincount(places, weights=exact, minlength=15), rtol=1e-12)


def test_sums_that_leave_a_gpu_in_one_copy_are_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 7
    rows = RowStats.stack([row_stats(of_head, labels, predicted=True) for of_head in z])
    plain = Tally.of_rows(rows, labels, 7).sums
    monkeypatch.setattr("heads.kernels.tally._on_host", _in_one_copy)
    for name, values in Tally.of_rows(rows, labels, 7).sums.items():
        np.testing.assert_array_equal(values, plain[name])
        assert values.dtype == plain[name].dtype


@pytest.mark.parametrize(
    ("device", "kinds", "expected"),
    [
        ("cuda", (torch.float16, torch.bfloat16), "triton"),
        ("cuda", (torch.float16, torch.float32), "cuda"),  # features of a store, weights of a head
        ("cuda", (torch.float32, torch.float32), "cuda"),
        ("cpu", (torch.float16, torch.float16), "cpu"),
        ("mps", (torch.float16, torch.float16), "chunked"),
    ],
)
def test_auto_depends_on_device_and_type(
    device: str, kinds: tuple[torch.dtype, torch.dtype], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_why_not", lambda name, problem: None)
    monkeypatch.setattr(dispatch, "_load", lambda name: name)
    features = SimpleNamespace(device=SimpleNamespace(type=device), dtype=kinds[0])
    problem: Any = SimpleNamespace(features=features, weights=[SimpleNamespace(dtype=kinds[1])])
    found: Any = dispatch._implementation("auto", problem)
    assert found == expected
