"""Heads fitted on rows that lie on a GPU, against the same heads fitted on the host.

Needs scikit-learn and what the stores need (zarr) beside torch, numpy and pytest.
"""

from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NAMES = tuple(f"class {c}" for c in range(20))


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("sklearn")
    pytest.importorskip("zarr")
    random = torch.Generator().manual_seed(0)
    y = torch.randint(len(NAMES), (20_000,), generator=random)
    noise = torch.randn(len(y), 64, generator=random) * torch.linspace(0, 1.5, 64).neg().exp()
    X = 0.4 * torch.randn(len(NAMES), 64, generator=random)[y] + noise
    return torch.nn.functional.normalize(X, dim=1).half(), y


@pytest.mark.parametrize("setting", [{}, {"cv": 4}])
def test_ridge_on_a_gpu_equals_the_cpu(rows: tuple[torch.Tensor, torch.Tensor], setting: dict[str, Any]) -> None:
    from heads import Ridge

    X, y = rows
    want, found = Ridge(**setting).fit(X, y), Ridge(**setting).fit(X.cuda(), y.cuda())
    assert found.alpha_ == want.alpha_
    np.testing.assert_allclose(found.cv_errors_, want.cv_errors_, rtol=1e-4)  # the host's pass may be float32
    np.testing.assert_allclose(found.coef_, want.coef_, rtol=1e-6, atol=1e-9)
    assert found.temperature_ == pytest.approx(want.temperature_, rel=1e-5)


def test_logistic_on_resident_stores(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    from heads import Logistic, ResidentStore, evaluate

    def stores(device: str) -> list[ResidentStore]:
        parts = ("train", slice(15_000)), ("val", slice(15_000, 18_000)), ("test", slice(18_000, None))
        return [ResidentStore(rows[0][s].to(device), rows[1][s].numpy(), NAMES, split=name) for name, s in parts]

    heads, judged = [], []
    for device in ("cpu", "cuda"):
        train, val, test = stores(device)
        heads.append(Logistic(C=[0.1, 1.0, 10.0, 100.0], tol=1e-7).fit(train, selection=val))
        judged.append(evaluate([heads[-1]], [test])[0])
    want, found = heads
    assert found.C_ == want.C_
    np.testing.assert_allclose(found.objectives_, want.objectives_, rtol=1e-5)
    np.testing.assert_allclose(found.cv_scores_, want.cv_scores_, rtol=1e-3)
    assert judged[1]["arrays:nll"] == pytest.approx(judged[0]["arrays:nll"], rel=1e-3)


def test_closed_form_heads_on_a_gpu_equal_the_cpu(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    from heads import LinearDiscriminant, NearestMean

    for kind in (LinearDiscriminant, NearestMean):
        want, found = kind().fit(*rows), kind().fit(rows[0].cuda(), rows[1].cuda())
        np.testing.assert_allclose(found.coef_, want.coef_, rtol=1e-6, atol=1e-9)


def test_neighbours_on_a_gpu_equal_the_cpu(rows: tuple[torch.Tensor, torch.Tensor], tmp_path: Any) -> None:
    from heads import KNN, load

    X, y = rows[0][:6000], rows[1][:6000]
    want, found = KNN().fit(X, y), KNN().fit(X.cuda(), y.cuda())
    assert found.head_.bank.features.is_cuda
    assert (want.provenance_["searched_on"], found.provenance_["searched_on"]) == ("cpu", "cuda:0")
    assert found.accuracies_ == pytest.approx(want.accuracies_, abs=2e-3)
    np.testing.assert_allclose(
        found.predict_proba(rows[0][6000:7000].cuda()), want.predict_proba(rows[0][6000:7000]), atol=1e-2
    )
    loaded = load(found.save(tmp_path / "knn.safetensors"))
    assert (loaded.predict(rows[0][6000:7000]) == found.predict(rows[0][6000:7000])).mean() > 0.99


def test_labels_and_selection_rows_may_be_on_a_gpu(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    from featcache.errors import HeadError
    from heads import NearestMean

    X, y = rows[0].cuda(), rows[1].cuda()
    head = NearestMean().fit(X[:15_000], y[:15_000], selection=(X[15_000:], y[15_000:]))
    assert head.score(X, y) == head.score(rows[0], rows[1].numpy()) > 0.3
    dirty = X[15_000:].clone()
    dirty[[7, 4000], 3] = torch.nan
    with pytest.raises(HeadError, match=r"selection split hold NaN .* 2 rows \(of 5000 valid ones, from 0\): 7, 4000"):
        NearestMean().fit(X[:15_000], y[:15_000], selection=(dirty, y[15_000:]))
