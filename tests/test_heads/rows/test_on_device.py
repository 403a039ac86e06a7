"""Fits whose rows lie on a device: the same heads, and no pass over the rows on the host.

Here the CPU's own tensors are taken for another device's; `tests/test_gpu` does the same on a GPU.
"""

from typing import Any

import numpy as np
import pytest
import torch

from featcache.cli.main import main
from featcache.errors import HeadError
from heads import KNN, LinearDiscriminant, LinearHead, Logistic, NearestMean, ResidentStore, Ridge
from heads.rows.samples import Samples

NAMES = tuple("abcde")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors count as another device's, whose rows may not come to the host as a whole."""
    for module in ("heads.rows.samples", "heads.rows.device", "heads.estimators.logistic.classifier"):
        monkeypatch.setattr(f"{module}.is_on_device", lambda features: isinstance(features, torch.Tensor))

    def refused(rows: Any) -> Any:
        raise AssertionError("a pass over the rows on the host")

    monkeypatch.setattr(Samples, "blocks", refused)
    monkeypatch.setattr("heads.estimators.logistic.classifier.to_numpy", refused)


@pytest.fixture
def arrays(draw: Any) -> tuple[Any, Any]:
    X, y = draw(400, 24, 5)
    return X.astype(np.float16), y


@pytest.fixture
def prior() -> LinearHead:
    return LinearHead(np.random.default_rng(1).normal(size=(5, 24)), np.zeros(5), NAMES, name="texts")


def halves(arrays: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    (X, y), cut = arrays, 300
    return (X[:cut], y[:cut]), (X[cut:], y[cut:])


@pytest.mark.parametrize("cv", ["loo", 4])
@pytest.mark.parametrize("with_prior", [False, True])
def test_ridge_of_device_tensors_equals_that_of_arrays(
    arrays: tuple[Any, Any], prior: LinearHead, cv: Any, with_prior: bool, request: Any
) -> None:
    X, y = arrays
    make = lambda: Ridge(cv=cv, prior=prior if with_prior else None)  # noqa: E731 - two fits of one setting
    want = make().fit(X, y, classnames=NAMES)
    request.getfixturevalue("elsewhere")
    found = make().fit(torch.from_numpy(X), torch.from_numpy(y), classnames=NAMES)
    assert found.alpha_ == want.alpha_
    np.testing.assert_allclose(found.cv_errors_, want.cv_errors_, rtol=1e-7)
    np.testing.assert_allclose(found.coef_, want.coef_, rtol=1e-6, atol=1e-9)
    assert found.temperature_ == pytest.approx(want.temperature_, rel=1e-6)
    assert found.prior_scale_ == pytest.approx(want.prior_scale_)


def test_ridge_with_a_selection_split_and_labels_of_its_own(arrays: tuple[Any, Any], request: Any) -> None:
    (X, y), (X2, y2) = halves(arrays)
    labels, labels2 = np.array(list("vwxyz"))[y], np.array(list("vwxyz"))[y2]
    want = Ridge().fit(X, labels, selection=(X2, labels2))
    request.getfixturevalue("elsewhere")
    found = Ridge().fit(torch.from_numpy(X), labels, selection=(torch.from_numpy(X2), labels2))
    assert found.alpha_ == want.alpha_
    np.testing.assert_allclose(found.cv_errors_, want.cv_errors_, rtol=1e-7)
    assert found.temperature_ == pytest.approx(want.temperature_, rel=1e-6)
    assert found.classes_.tolist() == list("vwxyz")
    assert found.predict(X2[:3]).tolist() == want.predict(X2[:3]).tolist()


def test_ridge_of_weighted_or_grouped_rows_is_computed_on_the_host(arrays: Any, monkeypatch: Any) -> None:
    X, y = arrays
    for module in ("heads.rows.samples", "heads.rows.device"):
        monkeypatch.setattr(f"{module}.is_on_device", lambda features: isinstance(features, torch.Tensor))
    for kwargs in ({"groups": np.arange(400) // 2}, {"sample_weight": np.linspace(0.5, 2.0, 400)}):
        want, found = Ridge().fit(X, y, **kwargs), Ridge().fit(torch.from_numpy(X), y, **kwargs)
        np.testing.assert_array_equal(found.coef_, want.coef_)
    few = Ridge().fit(torch.from_numpy(X[:20]), y[:20])
    np.testing.assert_array_equal(few.coef_, Ridge().fit(X[:20], y[:20]).coef_)


@pytest.mark.parametrize("kind", [NearestMean, LinearDiscriminant])
def test_closed_form_heads_of_device_tensors_equal_those_of_arrays(
    arrays: tuple[Any, Any], kind: Any, request: Any
) -> None:
    X, y = arrays
    want = kind().fit(X, y)
    request.getfixturevalue("elsewhere")
    found = kind().fit(torch.from_numpy(X), y)
    np.testing.assert_allclose(found.coef_, want.coef_, rtol=1e-7, atol=1e-9)
    assert found.temperature_ == pytest.approx(want.temperature_, rel=1e-6)


@pytest.mark.parametrize("stored", [False, True])
def test_neighbours_of_device_tensors_equal_those_of_arrays(
    arrays: tuple[Any, Any], stored: bool, request: Any
) -> None:
    (X, y), (X2, y2) = halves(arrays)
    ks = [1, 5, 40]
    want, split = KNN(ks).fit(X, y), KNN(ks).fit(X, y, selection=(X2, y2))
    wanted = want.predict_proba(X2)
    request.getfixturevalue("elsewhere")
    rows: Any = (torch.from_numpy(X), torch.from_numpy(y))
    selection: Any = (torch.from_numpy(X2), torch.from_numpy(y2))
    if stored:
        rows, selection = (ResidentStore(*rows, NAMES),), ResidentStore(*selection, NAMES, split="val")  # type: ignore[call-arg,misc]
    found = KNN(ks).fit(*rows)
    assert isinstance(found.head_.bank.features, torch.Tensor)
    assert found.accuracies_ == want.accuracies_
    np.testing.assert_array_equal(found.predict_proba(X2), wanted)
    np.testing.assert_array_equal(found.predict_proba(torch.from_numpy(X2)), wanted)
    assert KNN(ks).fit(*rows, selection=selection).accuracies_ == split.accuracies_
    assert found.provenance_["searched_on"] == "cpu"


def close(found: Logistic, want: Logistic) -> None:
    """The same optima: the objective, which rounding of float32 moves less than weights, and the choice."""
    assert pytest.approx(want.C_) == found.C_
    np.testing.assert_allclose(found.objectives_, want.objectives_, rtol=2e-6)
    np.testing.assert_allclose(found.cv_scores_, want.cv_scores_, rtol=1e-3)
    np.testing.assert_allclose(found.coef_, want.coef_, rtol=0, atol=5e-3 * np.abs(want.coef_).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_logistic_by_folds(arrays: tuple[Any, Any], dtype: torch.dtype, request: Any) -> None:
    X, y = arrays
    want = Logistic(C=[0.01, 1.0, 100.0]).fit(X, y)
    request.getfixturevalue("elsewhere")
    close(Logistic(C=[0.01, 1.0, 100.0]).fit(torch.from_numpy(X).to(dtype), torch.from_numpy(y)), want)


@pytest.mark.parametrize("setting", [{}, {"refit": True}, {"metric": "top1"}, {"fit_intercept": False}])
def test_logistic_with_a_selection_split(arrays: Any, prior: LinearHead, setting: Any, request: Any) -> None:
    train, select = (ResidentStore(X, y, NAMES, split=name) for name, (X, y) in zip("ab", halves(arrays), strict=True))
    make = lambda: Logistic(C=[0.01, 1.0, 100.0], prior=prior, **setting)  # noqa: E731 - two fits of one setting
    want = make().fit(train, selection=select)
    request.getfixturevalue("elsewhere")
    close(make().fit(train, selection=select), want)


def test_logistic_refitted_on_rows_of_both_places(arrays: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (X, y), held_out = halves(arrays)
    want = Logistic(C=[0.01, 1.0], refit=True).fit(X, y, selection=held_out)
    for module in ("heads.rows.samples", "heads.rows.device"):
        monkeypatch.setattr(f"{module}.is_on_device", lambda features: isinstance(features, torch.Tensor))
    close(Logistic(C=[0.01, 1.0], refit=True).fit(torch.from_numpy(X), y, selection=held_out), want)


def test_logistic_by_the_paper_s_search(arrays: tuple[Any, Any], request: Any) -> None:
    X, y = arrays
    want = Logistic(C="search", tol=1e-5).fit(X, y)
    request.getfixturevalue("elsewhere")
    found = Logistic(C="search", tol=1e-5).fit(torch.from_numpy(X), y)
    assert pytest.approx(want.C_) == found.C_


@pytest.mark.parametrize("kind", [Ridge, Logistic, NearestMean, KNN])
def test_rows_that_are_not_finite_are_named(arrays: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("heads.rows.samples", "heads.rows.device"):
        monkeypatch.setattr(f"{module}.is_on_device", lambda features: isinstance(features, torch.Tensor))
    X = torch.from_numpy(arrays[0].copy())
    X[41] = torch.nan
    with pytest.raises(HeadError, match="41"):
        kind().fit(X, arrays[1])


@pytest.mark.parametrize("kind", [Ridge, Logistic])
def test_one_class_is_refused(arrays: tuple[Any, Any], kind: Any, elsewhere: None) -> None:
    with pytest.raises(HeadError, match="1 class"):
        kind().fit(torch.from_numpy(arrays[0]), np.zeros(400, np.int64))


def test_wrong_shapes_are_refused(arrays: tuple[Any, Any], elsewhere: None) -> None:
    with pytest.raises(HeadError, match=r"2-D, \(N, D\), got \(24,\)"):
        Ridge().fit(torch.from_numpy(arrays[0][0]), arrays[1][:1])
    with pytest.raises(HeadError, match="0 sample"):
        Ridge().fit(torch.zeros(0, 24), arrays[1][:0])
    with pytest.raises(HeadError, match="400 rows and y has 7"):
        Ridge().fit(torch.from_numpy(arrays[0]), arrays[1][:7])


def test_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`--device cpu` brings the features into memory; what comes out is what streaming gives."""
    root = ["--root", str(tmp_path)]
    for split in ("val", "test"):
        assert main(["encode", "digits", "--split", split, *root]) == 0
    rows = []
    for name, device in (("streamed", []), ("resident", ["--device", "cpu"])):
        head = str(tmp_path / f"{name}.safetensors")
        assert main(["fit", "ridge", "digits/val", "-o", head, *device, *root]) == 0
        results = ["--results", str(tmp_path / f"{name}.jsonl")]
        assert main(["evaluate", head, "--on", "digits/test", *results, *device, *root]) == 0
        rows.append((tmp_path / f"{name}.jsonl").read_text())
    first, second = ([part for part in row.split(", ") if "digits:top1" in part] for row in rows)
    assert first == second != []
    capsys.readouterr()
    wanted = ["fit", "ridge", "digits/val", "-o", str(tmp_path / "x.safetensors"), "--device", "abacus", *root]
    assert main(wanted) != 0
    assert "device 'abacus' cannot be used" in capsys.readouterr().err
