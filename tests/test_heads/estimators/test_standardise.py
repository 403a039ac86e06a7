"""Heads on standardised features are scikit-learn's pipelines, and take features as they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.linear_model import Ridge as SkRidge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import heads
from featcache.errors import HeadError
from heads import HEADS
from heads.estimators.catalogue import make_head, parameters_of
from heads.estimators.standardise import Standardising
from heads.rows.scaling import Scaling

C, D, N = 4, 9, 300


def rows(seed: int = 0, n: int = N) -> tuple[Any, Any]:
    """Columns of very different means and spreads, one of them constant."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    X = (np.random.default_rng(9).normal(size=(C, D))[y] + rng.normal(size=(n, D))) * 10.0 ** np.arange(-3, D - 3)
    X += 3.0 * 10.0 ** np.arange(-3, D - 3)
    X[:, 4] = 0.3
    return X, y


def test_mean_and_deviation_are_those_of_scikit_learns_scaler() -> None:
    X, _ = rows()
    weights = np.random.default_rng(1).integers(0, 3, N).astype(float)
    for given in (None, weights):
        want = StandardScaler().fit(X, sample_weight=given)
        found = Scaling.of(((X[i : i + 70],) for i in range(0, N, 70)), D, given)
        np.testing.assert_allclose(found.mean, want.mean_, rtol=1e-12)
        np.testing.assert_allclose(found.deviation, want.scale_, rtol=1e-12)
        np.testing.assert_allclose(found.apply(X), want.transform(X), rtol=1e-9, atol=1e-12)


def test_the_deviation_of_a_column_far_from_zero_is_not_lost() -> None:
    x = 1e6 + np.random.default_rng(0).normal(size=(1000, 1))
    found = Scaling.of(((x[i : i + 7],) for i in range(0, 1000, 7)), 1)
    assert found.deviation[0] == pytest.approx(x.std(), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_a_pipeline_of_scaler_and_ridge(weighted: bool) -> None:
    X, y = rows()
    w = np.random.default_rng(1).uniform(0, 2, N) if weighted else None
    pipe = make_pipeline(StandardScaler(), SkRidge(alpha=3.0))
    pipe.fit(X, np.eye(C)[y], standardscaler__sample_weight=w, ridge__sample_weight=w)
    head = heads.Ridge([3.0], standardise=True).fit(X, y, sample_weight=w)
    np.testing.assert_allclose(head.scores(X), pipe.predict(X), atol=1e-6)
    plain = RidgeClassifier(alpha=3.0).fit(StandardScaler().fit_transform(X), y)
    if not weighted:
        np.testing.assert_array_equal(head.predict(X), plain.predict(StandardScaler().fit_transform(X)))


def test_ridges_alpha_and_errors_are_those_of_standardised_rows() -> None:
    X, y = rows()
    head = heads.Ridge(standardise=True, metric="nll").fit(X, y)
    want = heads.Ridge(metric="nll").fit(StandardScaler().fit_transform(X), y)
    assert head.alpha_ == want.alpha_
    np.testing.assert_allclose(head.cv_nll_, want.cv_nll_, rtol=1e-9)
    for ours, theirs in zip(head.path_heads(), want.path_heads(), strict=True):
        np.testing.assert_allclose(
            ours.predict_proba(X), theirs.predict_proba(StandardScaler().fit_transform(X)), atol=2e-4
        )


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_logistic_is_a_pipeline_of_scaler_and_regression(fit_intercept: bool) -> None:
    X, y = rows()
    want = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.7, solver="newton-cholesky", tol=1e-10, fit_intercept=fit_intercept)
    )
    head = heads.Logistic(0.7, standardise=True, fit_intercept=fit_intercept, tol=1e-13).fit(X, y)
    plain = heads.Logistic(0.7, fit_intercept=fit_intercept, tol=1e-13).fit(StandardScaler().fit_transform(X), y)
    want.fit(X, y)
    floor = np.abs(plain.predict_proba(want[0].transform(X)) - want.predict_proba(X)).max()  # the solver's float32
    assert floor < 3e-6
    np.testing.assert_allclose(head.predict_proba(X), want.predict_proba(X), atol=floor + 1e-9)


def test_discriminant_is_a_pipeline_of_scaler_and_discriminant() -> None:
    X, y = rows()
    want = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis("lsqr", shrinkage=0.2)).fit(X, y)
    head = heads.LinearDiscriminant([0.2, 0.21], standardise=True).fit(X, y)
    (chosen,) = [path for path in head.path_heads([0.2]) if path.provenance.params["shrinkage"] == 0.2]
    np.testing.assert_array_equal(chosen.predict(X), want.predict(X))
    scores = heads.LinearDiscriminant(0.2, standardise=True).fit(X, y).scores(X)
    np.testing.assert_allclose(
        scores - scores.mean(1, keepdims=True),
        want.decision_function(X) - want.decision_function(X).mean(1, keepdims=True),
        atol=1e-6,
    )


def test_multilabel_heads_are_pipelines() -> None:
    X, y = rows()
    Y = np.stack([y == 0, y > 1], axis=1).astype(int)
    want = make_pipeline(
        StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10))
    )
    head = heads.MultiLabelLogistic(0.5, standardise=True, tol=1e-14).fit(X, Y)
    np.testing.assert_allclose(head.predict_proba(X), want.fit(X, Y).predict_proba(X), atol=1e-6)
    ridge = heads.MultiLabelRidge([2.0], standardise=True).fit(X, Y)
    weights, intercepts = ridge.path()
    pipe = make_pipeline(StandardScaler(), SkRidge(alpha=2.0)).fit(X, Y)
    np.testing.assert_allclose(X @ weights[0].T + intercepts[0], pipe.predict(X), atol=1e-6)


STANDARDISING = sorted(name for name, kind in HEADS.items() if issubclass(kind, Standardising))
QUICK: dict[str, dict[str, Any]] = {"logistic": {"C": [0.1, 1.0]}, "multilabel_logistic": {"C": [0.1, 1.0]}}


def test_every_linear_head_that_fits_on_rows_alone_takes_the_option() -> None:
    assert {"ridge", "logistic", "adamw", "discriminant", "nearest_mean"} <= set(STANDARDISING)
    assert {"multilabel_ridge", "multilabel_logistic"} <= set(STANDARDISING)
    for name in STANDARDISING:
        assert parameters_of(name)["standardise"].check(True) is True
        with pytest.raises(HeadError, match=r"standardise is 1.5, expected true or false"):
            make_head(name, {"standardise": 1.5})


@pytest.mark.parametrize("name", STANDARDISING)
@pytest.mark.parametrize("split", [False, True])
def test_the_saved_head_and_the_path_take_features_as_they_are(name: str, split: bool, tmp_path: Path) -> None:
    """Everything that a head gives equals that of the head fitted on rows that were standardised beforehand."""
    (X, y), (V, v) = rows(), rows(seed=1, n=90)
    if HEADS[name].multilabel:
        y, v = (np.stack([labels == 0, labels > 1], axis=1).astype(int) for labels in (y, v))
    scaler = StandardScaler().fit(X)
    options = QUICK.get(name, {})
    given, plain = ({"selection": (V, v)}, {"selection": (scaler.transform(V), v)}) if split else ({}, {})
    head: Any = make_head(name, {**options, "standardise": True}).fit(X, y, **given)
    want: Any = make_head(name, options).fit(scaler.transform(X), y, **plain)
    np.testing.assert_allclose(head.predict_proba(V), want.predict_proba(scaler.transform(V)), atol=3e-4)
    assert len(head.path_heads()) == len(want.path_heads())
    for ours, theirs in zip(head.path_heads(), want.path_heads(), strict=True):
        np.testing.assert_allclose(ours.predict_proba(V), theirs.predict_proba(scaler.transform(V)), atol=3e-4)
    loaded = heads.load(head.save(tmp_path / "head.safetensors"))
    np.testing.assert_allclose(loaded.predict_proba(V), head.predict_proba(V), atol=3e-4)
    assert loaded.provenance.params["standardise"] is True
    assert "standardise" not in want.frozen().provenance.params


@pytest.mark.parametrize("name", ["ridge", "logistic", "discriminant", "adamw"])
def test_streams_and_stores_give_the_head_of_arrays(name: str, images: Any) -> None:
    store = images(noise=0.4)
    want = make_head(name, {**QUICK.get(name, {}), "standardise": True}).fit(
        *store.numpy(), classnames=store.classnames
    )

    def blocks() -> Iterator[Any]:
        yield from store.blocks()

    stream = heads.RowStream(blocks, dim=store.dim, classnames=store.classnames)
    for source in (store, stream):
        found = make_head(name, {**QUICK.get(name, {}), "standardise": True}).fit(source)
        np.testing.assert_allclose(found.predict_proba(store.X), want.predict_proba(store.X), atol=1e-5)
    assert found.frozen().provenance["encoder_key"] is None
    kept = make_head(name, {**QUICK.get(name, {}), "standardise": True}).fit(store).frozen().provenance
    assert (kept["encoder_key"], kept["fitted_on"][0]["name"]) == ("enc-1", "animals")


@pytest.mark.parametrize("name", ["ridge", "logistic", "adamw"])
def test_a_prior_is_converted_to_standardised_features(name: str) -> None:
    """With next to no data against it, the prior's logits on features as they are remain."""
    X, y = rows()
    prior = heads.Logistic(1.0, standardise=True).fit(*rows(seed=5), classnames=tuple("abcd")).linear()
    strong: dict[str, dict[str, Any]] = {"ridge": {"alphas": [1e9]}, "logistic": {"C": 1e-9}, "adamw": {"lr": 1e-9}}
    head: Any = make_head(name, {**strong[name], "standardise": True}, prior).fit(X, y, classnames=tuple("abcd"))
    found, want = head.scores(X), prior.logits(X).astype(float)
    if name != "adamw":  # intercepts are free
        found, want = found - found.mean(0), want - want.mean(0)
    found, want = (z - z.mean(axis=1, keepdims=True) for z in (found, want))
    scale = (found * want).sum() / (want**2).sum()
    np.testing.assert_allclose(found, scale * want, atol=1e-3 * np.abs(found).max())


def test_rows_that_are_not_finite_are_named() -> None:
    X, y = rows()
    X[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match=r"2 rows .*3, 8"):
        heads.Ridge(standardise=True).fit(X, y)
