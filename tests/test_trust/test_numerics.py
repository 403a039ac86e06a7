"""Extreme inputs to every head: right against float64 (`head_references`), or refused by name in one line."""

import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import head_references as reference
import numpy as np
import pytest
from head_references import softmax

import heads
from featcache.errors import FeatcacheError, HeadError
from heads import HEADS, LinearHead

D = 12
Inputs = tuple[np.ndarray, np.ndarray]


def rows(n: int = 60, classes: int = 3, seed: int = 0) -> Inputs:
    chance = np.random.default_rng(seed)
    y = np.arange(n) % classes
    X = chance.standard_normal((n, D)) + 2 * np.eye(classes, D)[y]
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Inputs]:
    def make() -> Inputs:
        X, y = rows()
        return np.asarray(change(X)), y

    return make


SEVENTH = np.arange(60)[:, None] == 7
INPUTS: dict[str, Callable[[], Inputs]] = {
    "plain": rows,
    "float16 limits": changed(lambda X: (X * 60_000).astype(np.float16)),
    "float16 denormals": changed(lambda X: (X * 1e-6).astype(np.float16)),
    "float32 denormals": changed(lambda X: X * np.float32(1e-40)),
    "1e-30": changed(lambda X: X * np.float32(1e-30)),
    "1e18": changed(lambda X: X * np.float32(1e18)),
    "1e30": changed(lambda X: X * np.float32(1e30)),
    "3e38": changed(lambda X: X * np.float32(3e38)),
    "1e-200": changed(lambda X: X.astype(np.float64) * 1e-200),
    "1e200": changed(lambda X: X.astype(np.float64) * 1e200),
    "constant column": changed(lambda X: np.concatenate([X, np.ones((60, 1), X.dtype)], axis=1)),
    "large constant column": changed(lambda X: np.concatenate([X, np.full((60, 1), 1e4, X.dtype)], axis=1)),
    "common offset": changed(lambda X: X + np.float32(100)),
    "duplicate columns": changed(lambda X: np.concatenate([X, X, X], axis=1)),
    "columns of all sizes": changed(lambda X: X * np.logspace(-6, 6, D, dtype=np.float32)),
    "one column": changed(lambda X: X[:, :1]),
    "zeros": changed(np.zeros_like),
    "one row of zeros": changed(lambda X: np.where(SEVENTH, 0, X)),
    "one row many times": changed(lambda X: np.repeat(X[:1], len(X), axis=0)),
    "one row a class, many times": lambda: (np.eye(3, D, dtype=np.float32)[rows()[1]], rows()[1]),
    "nan": changed(lambda X: np.where(SEVENTH, np.nan, X)),
    "inf": changed(lambda X: np.where(SEVENTH, np.inf, X)),
    "one row": lambda: (rows(1)[0], np.zeros(1, int)),
    "one class": lambda: (rows()[0], np.zeros(60, int)),
    "one row a class": lambda: (rows(2, 2)[0], np.arange(2)),
    "more columns than rows": lambda: (rows(4, 2)[0], np.array([0, 1, 0, 1])),
    "a class in one row": lambda: (rows()[0], np.r_[2, np.arange(59) % 2]),
}

Logits = Callable[[np.ndarray], np.ndarray]
Truth = Callable[[Any, np.ndarray, np.ndarray, np.ndarray], Logits]


def linear(weights: np.ndarray, bias: np.ndarray) -> Logits:
    return lambda Z: Z @ weights.T + bias


def over(head: Any, scores: Logits) -> Logits:
    return lambda Z: scores(Z) / head.temperature_


def classes_of(y: np.ndarray) -> int:
    return int(y.max()) + 1


def ridge_truth(alpha: float) -> Truth:
    return lambda head, X, y, text: over(head, linear(*reference.ridge(X, np.eye(classes_of(y))[y], alpha)))


def probe_truth(head: Any, X: np.ndarray, y: np.ndarray, text: np.ndarray) -> Logits:
    steps, warmup = 20, 2
    rates = [(t + 1) / warmup if t < warmup else (1 + np.cos(np.pi * (t - warmup) / 18)) / 2 for t in range(steps)]
    return linear(*reference.linear_probe(X, y, classes_of(y), 1e-2 * np.array(rates), 0.1))


def keys_truth(head: Any, X: np.ndarray, y: np.ndarray, text: np.ndarray) -> Logits:
    keys, targets = reference.trained_keys(X, y, text, 5, 1e-3), np.eye(len(text))[y]
    return lambda Z: Z @ text.T + np.exp(-5.5 * (1 - reference.unit(Z) @ keys.T)) @ targets


HEAD_TABLE: dict[str, tuple[str, dict[str, Any], Truth]] = {
    **{f"ridge {alpha:g}": ("ridge", {"alphas": [alpha]}, ridge_truth(alpha)) for alpha in (1e-12, 1e-3, 1, 1e6, 1e12)},
    "nearest_mean": (
        "nearest_mean",
        {},
        lambda head, X, y, text: over(head, reference.nearest_mean(X, y, classes_of(y))),
    ),
    "nearest_mean, not normalised": (
        "nearest_mean",
        {"normalize": False},
        lambda head, X, y, text: over(head, reference.nearest_mean(X, y, classes_of(y), normalize=False)),
    ),
    "discriminant": (
        "discriminant",
        {},
        lambda head, X, y, text: over(head, reference.discriminant(X, y, classes_of(y))),
    ),
    "discriminant 1e-3": (
        "discriminant",
        {"shrinkage": 1e-3},
        lambda head, X, y, text: over(head, reference.discriminant(X, y, classes_of(y), 1e-3)),
    ),
    "gda": ("gda", {}, lambda head, X, y, text: over(head, reference.gda(X, y, text, head.alpha_))),
    "gda 1": ("gda", {"alpha": 1.0}, lambda head, X, y, text: reference.gda(X, y, text, 1.0)),
    "knn": (
        "knn",
        {"n_neighbors": 5, "calibrate": False},
        lambda head, X, y, text: reference.knn(X, y, classes_of(y), 5, 0.07),
    ),
    "tip_adapter": (
        "tip_adapter",
        {"alphas": [1.0], "betas": [5.5]},
        lambda head, X, y, text: reference.tip_adapter(X, y, text, 1.0, 5.5),
    ),
    "tip_adapter_f": ("tip_adapter_f", {"alphas": [1.0], "betas": [5.5], "epochs": 5}, keys_truth),
    "adamw": ("adamw", {"lr": 1e-2, "epochs": 20, "batch_size": 100}, probe_truth),
    "lp_plus_plus": (
        "lp_plus_plus",
        {"steps": 30},
        lambda head, X, y, text: linear(*reference.lp_plus_plus(X, y, text, head.steps_)),
    ),
}

RATES = np.r_[1e-5, [(1 + np.cos(np.pi * epoch / 10)) / 20 for epoch in range(9)]]
"""Learning rates of ten epochs of CLAP and TaskRes, from 0.1."""
HEAD_TABLE |= {
    "clap": (
        "clap",
        {"epochs": 10},
        lambda head, X, y, text: linear(reference.prototypes(X, y, text, RATES, clap=True), np.zeros(len(text))),
    ),
    "taskres": (
        "taskres",
        {"epochs": 10, "lr": 0.1},
        lambda head, X, y, text: linear(reference.prototypes(X, y, text, RATES, clap=False), np.zeros(len(text))),
    ),
    "prolip": (
        "prolip",
        {"epochs": 10, "lr": 1e-2},
        lambda head, X, y, text: reference.projected(reference.prolip(X, y, text, 1e-2, 10), text),
    ),
    "label_propagation": (
        "label_propagation",
        {"n_neighbors": 59},
        lambda head, X, y, text: lambda Z: reference.label_propagation(X, text, 59),
    ),
    "transclip": (
        "transclip",
        {"n_neighbors": 59},
        lambda head, X, y, text: lambda Z: reference.transclip(X, text, 59),
    ),
    "em_dirichlet": (
        "em_dirichlet",
        {"rounds": 2, "balance": 0.0, "scale": None, "match": False, "mm_steps": None},
        lambda head, X, y, text: lambda Z: reference.em_dirichlet(X, text, 2),
    ),
}

COSINE_RATES = (1 + np.cos(np.pi * np.arange(20) / 20)) / 2
"""Learning rates of 20 updates without warm-up, from 1."""


def standardised(truth: Truth) -> Truth:
    """Reference for a head that is fitted on standardised features."""

    def made(head: Any, X: np.ndarray, y: np.ndarray, text: np.ndarray) -> Logits:
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(X)
        scores = truth(head, scaler.transform(X), y, text)
        return lambda Z: scores(scaler.transform(Z))

    return made


HEAD_TABLE |= {
    "sgd": (
        "sgd",
        {"lr": 0.1, "epochs": 20, "batch_size": 256},
        lambda head, X, y, text: linear(*reference.sgd_probe(X, y, classes_of(y), 0.1 * COSINE_RATES, 0.9)),
    ),
    "cosine": (
        "cosine",
        {"lr": 1e-2, "epochs": 20, "batch_size": 256},
        lambda head, X, y, text: linear(reference.cosine_probe(X, y, classes_of(y), 1e-2 * COSINE_RATES), np.zeros(1)),
    ),
    "ridge, standardised": ("ridge", {"alphas": [1.0], "standardise": True}, standardised(ridge_truth(1.0))),
    "discriminant, standardised": (
        "discriminant",
        {"shrinkage": 0.1, "standardise": True},
        standardised(lambda head, X, y, text: over(head, reference.discriminant(X, y, classes_of(y), 0.1))),
    ),
    "sgd, standardised": (
        "sgd",
        {"lr": 0.1, "epochs": 20, "batch_size": 256, "standardise": True},
        standardised(
            lambda head, X, y, text: linear(*reference.sgd_probe(X, y, classes_of(y), 0.1 * COSINE_RATES, 0.9))
        ),
    ),
    "adamw, standardised": (
        "adamw",
        {"lr": 1e-2, "epochs": 20, "batch_size": 100, "standardise": True},
        standardised(probe_truth),
    ),
    "cosine, standardised": (
        "cosine",
        {"lr": 1e-2, "epochs": 20, "batch_size": 256, "standardise": True},
        standardised(
            lambda head, X, y, text: linear(
                reference.cosine_probe(X, y, classes_of(y), 1e-2 * COSINE_RATES), np.zeros(1)
            )
        ),
    ),
}


def deviations(wide: np.ndarray) -> np.ndarray:
    """Standard deviation of each column; 1 for constant columns."""
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit(wide).scale_)


BEYOND_FLOAT32 = "beyond what float32 holds"
TAKE_ONE_CLASS = (
    *("gda", "tip_adapter", "tip_adapter_f", "lp_plus_plus", "clap", "taskres", "prolip"),
    *("label_propagation", "transclip", "em_dirichlet"),
)
REFUSED: dict[tuple[str, str], str] = {
    **{(name, what): "hold NaN or infinity" for name in HEAD_TABLE for what in ("nan", "inf")},
    **{(name, "1e200"): "(squares|gradient) overflow" for name in HEAD_TABLE},
    **{
        (name, what): "expected at least 2"
        for name in HEAD_TABLE
        if name.partition(" ")[0].rstrip(",") not in TAKE_ONE_CLASS
        for what in ("one row", "one class")
    },
    **{(f"ridge {alpha:g}", "columns of all sizes"): "sums in float64 do not resolve" for alpha in (1e-12, 1e-3)},
    **{
        (name, "float32 denormals"): BEYOND_FLOAT32
        for name in (*(name for name in HEAD_TABLE if name.startswith(("nearest", "disc"))), "gda", "gda 1")
    },
    **{("lp_plus_plus", what): "rows of about length 1" for what in INPUTS if what[0].isdigit()},
    **{("lp_plus_plus", what): "rows of about length 1" for what in INPUTS if "denormals" in what or what == "zeros"},
    ("lp_plus_plus", "one column"): "a class with zero weights",
    ("lp_plus_plus", "1e200"): "squares overflow",
    ("gda", "3e38"): "overflow float32",
    ("gda 1", "3e38"): "overflow float32",
    ("tip_adapter", "3e38"): "overflow float32",
    ("tip_adapter_f", "3e38"): "overflow float32",
    **{(name, "3e38"): "logits overflow float32" for name in ("label_propagation", "transclip", "em_dirichlet")},
    **{(name, "one column"): "a class with zero weights" for name in ("clap", "taskres")},
    **{("clap", what): "training diverged" for what in ("1e30", "3e38")},
    **{("taskres", what): "gradient overflows|training diverged" for what in ("1e30", "3e38")},
    ("ridge, standardised", "float32 denormals"): BEYOND_FLOAT32,
    **{(f"{name}, standardised", "float32 denormals"): BEYOND_FLOAT32 for name in ("sgd", "adamw", "cosine")},
    ("sgd", "1e30"): "training at lr .* diverged",
    ("sgd", "3e38"): "training at lr .* diverged",
    ("cosine", "1e30"): "training at lr .* diverged",
    ("cosine", "3e38"): "gradient overflows float32",
    ("adamw", "1e30"): "gradient overflows float32",
    ("adamw", "3e38"): "gradient overflows float32",
}
"""Errors of each head on inputs that it refuses; on all others it must be right."""
CHAOTIC = {("adamw", "large constant column"), ("taskres", "common offset")}
"""Training that amplifies every rounding error: results only have to be finite."""
CHAOTIC |= {("sgd", "large constant column"), ("cosine", "common offset")}
CHAOTIC |= {("em_dirichlet", what) for what in ("float16 limits", "1e18", "1e30", "one row many times", "one row")}
"""Rows that are all equal, or certain: the Dirichlet likelihood has no maximum."""


def text_of(X: np.ndarray, y: np.ndarray) -> LinearHead:
    classes = max(classes_of(y), 2)
    return LinearHead(10 * np.eye(classes, X.shape[1]), np.zeros(classes), tuple(map(str, range(classes))))


def fitted(name: str, parameters: dict[str, Any], X: np.ndarray, y: np.ndarray, text: LinearHead) -> list[np.ndarray]:
    """The estimator, and probabilities of the training rows from it and from the saved head."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        head = HEADS[name](**parameters)
        head.fit(X, y, **({"texts": text} if head.takes_texts else {}))
        return [head, head.predict_proba(X), head.frozen().predict_proba(X)]


def check_refusal(error: HeadError, words: str = "", *, allowed: bool = True) -> None:
    """One line of error for inputs outside the range of a head."""
    assert allowed
    assert re.search(words, str(error))
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("case", HEAD_TABLE)
@pytest.mark.parametrize("what", INPUTS)
def test_every_head_is_right_or_refuses(case: str, what: str) -> None:
    name, parameters, truth = HEAD_TABLE[case]
    X, y = INPUTS[what]()
    text = text_of(X, y)
    if (case, what) in REFUSED:
        with pytest.raises(FeatcacheError, match=REFUSED[case, what]) as error:
            fitted(name, parameters, X, y, text)
        assert len(str(error.value).splitlines()) == 1
        return
    head, *found = fitted(name, parameters, X, y, text)
    with np.errstate(all="ignore"):
        logits = truth(head, X.astype(np.float64), y, text.weights.astype(np.float64))(X.astype(np.float64))
    same = np.ones(len(X), bool)
    if name == "knn":  # where float32 tells the fifth neighbour from the sixth
        cosines = np.sort(reference.unit(X.astype(np.float64)) @ reference.unit(X.astype(np.float64)).T, axis=1)
        if len(X) > 5:
            same = cosines[:, -5] - cosines[:, -6] > 1e-6
    for probabilities in found:
        assert np.isfinite(probabilities).all()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)
        if (case, what) not in CHAOTIC:
            np.testing.assert_allclose(probabilities[same], softmax(logits)[same], atol=4e-3)


@pytest.mark.parametrize("alpha", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize(
    "what",
    ["plain", "constant column", "duplicate columns", "float16 limits", "common offset", "more columns than rows"],
)
def test_ridge_regression_is_right_at_every_alpha(what: str, alpha: float) -> None:
    X, y = INPUTS[what]()
    targets = np.stack([X[:, 0].astype(np.float64) * 3 + y, y * 1e6 + 1e9, y * 1e-6], axis=1).astype(np.float64)
    weights, bias = reference.ridge(X.astype(np.float64), targets, alpha)
    try:
        model = heads.RidgeRegression([alpha], cv=2).fit(X, targets)
    except HeadError as error:
        check_refusal(error, "no alpha has a finite error")
        return
    truth = X.astype(np.float64) @ weights.T + bias
    spread = np.abs(targets - targets.mean(axis=0)).max(axis=0)
    np.testing.assert_allclose((model.predict(X) - truth) / spread, 0, atol=1e-5)


@pytest.mark.parametrize("alpha", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("low", [1e-30, 1e-12, 1e12])
def test_weights_of_all_sizes(low: float, alpha: float) -> None:
    """Weights from `low` to 1e30 / low together: the same as rows scaled by their square roots."""
    X, y = rows()
    weights = np.where(np.arange(60) % 2 > 0, low, 1.0)
    head = HEADS["ridge"](alphas=[alpha], cv=3).fit(X, y, sample_weight=weights)
    W, b = reference.ridge(X.astype(np.float64), np.eye(3)[y], alpha, weights)
    scores = X.astype(np.float64) @ W.T + b
    np.testing.assert_allclose(head.scores(X), scores, atol=1e-4)
    np.testing.assert_allclose(head.frozen().predict_proba(X), softmax(scores / head.temperature_), atol=2e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_equal_weights_of_any_size_change_nothing_but_the_penalty(scale: float) -> None:
    """Row weights s with alpha s give the same head as weights 1 with alpha."""
    X, y = rows()
    plain = HEADS["ridge"](alphas=[1.0], cv=3).fit(X, y)
    scaled = HEADS["ridge"](alphas=[scale], cv=3).fit(X, y, sample_weight=np.full(len(y), scale))
    np.testing.assert_allclose(scaled.coef_, plain.coef_, rtol=1e-6, atol=1e-9)
    with pytest.raises(FeatcacheError, match="sample_weight"):
        HEADS["ridge"]().fit(X, y, sample_weight=np.full(len(y), np.inf))


@pytest.mark.parametrize("name", ["ridge", "logistic", "nearest_mean", "discriminant", "knn", "adamw", "gda"])
def test_labels_missing_in_folds(name: str) -> None:
    """Classes of one row are in a single fold, and one class has no rows."""
    X, y = rows(40, 2)
    y = y.copy()
    y[:3] = [2, 3, 5]  # 4 is missing
    parameters = {"epochs": 2} if name == "adamw" else {}
    options: dict[str, Any] = {"texts": LinearHead(np.eye(6, D), np.zeros(6), tuple("abcdef"))} if name == "gda" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = HEADS[name](**parameters).fit(X, y, **(options or {"classnames": tuple("abcdef")}))
    for found in (head.predict_proba(X), head.frozen().predict_proba(X)):
        assert found.shape == (40, 6)
        assert np.isfinite(found).all()
        assert (found[3:].argmax(axis=1) < 2).mean() > 0.6
        if name != "gda":
            assert not (found.argmax(axis=1) == 4).any()


def test_a_missing_class_never_wins_however_far_the_row_is() -> None:
    X, y = rows(40, 2)
    head = HEADS["nearest_mean"](normalize=False).fit(X + 100, y, classnames=("a", "b", "c"))
    for found in (head.predict(-100 * X - 1e4), head.frozen().predict(-100 * X - 1e4)):
        assert set(found.tolist()) <= {0, 1}


@pytest.mark.parametrize("C", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize(
    "what", ["plain", "constant column", "common offset", "float16 limits", "float16 denormals", "1e18", "1e30"]
)
@pytest.mark.parametrize("standardise", [False, True])
def test_logistic_is_no_worse_than_float64(what: str, C: float, standardise: bool) -> None:
    """The penalised objective in float64 against that of L-BFGS from several starts; or refused."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    X, _ = INPUTS[what]()
    y = np.random.default_rng(2).integers(0, 3, len(X))  # not separable
    wide, mean = X.astype(np.float64), X.astype(np.float64).mean(axis=0)
    size = deviations(wide) if standardise else np.abs(wide - mean).max()
    rows_of_one = (wide - mean) / size
    scaled = C if standardise else float(C * size**2)  # the same problem, on rows of the size of one

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        W, b = flat[: 3 * X.shape[1]].reshape(3, -1), flat[3 * X.shape[1] :]
        logits = rows_of_one @ W.T + b
        away = softmax(logits) - np.eye(3)[y]
        value = (logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).sum()
        slope = np.concatenate([(away.T @ rows_of_one + W / scaled).ravel(), away.sum(axis=0)])
        return float(value + (W**2).sum() / 2 / scaled), slope

    start = np.zeros(3 * X.shape[1] + 3)
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            head = HEADS["logistic"](C=C, standardise=standardise).fit(X, y)
        except HeadError as error:
            check_refusal(error, "features reach .* scale them", allowed=what in ("1e18", "1e30"))
            return
    ours = objective(np.r_[(head.coef_ * size).ravel(), head.intercept_ + head.coef_ @ mean])[0]
    assert ours <= best.fun * (1 + 1e-4) + 1e-6
    assert np.isfinite(head.frozen().predict_proba(X)).all()


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted({name for name, _, _ in HEAD_TABLE.values()}))
def test_21843_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, dim = 21_843, 32
    chance = np.random.default_rng(3)
    centres = reference.unit(chance.standard_normal((classes, dim))).astype(np.float32)
    y = np.arange(2 * classes) % classes
    X = centres[y] + 0.01 * chance.standard_normal((2 * classes, dim)).astype(np.float32)
    few: dict[str, dict[str, Any]] = {
        "ridge": {"alphas": [1e-3], "cv": 2},
        "knn": {"n_neighbors": 2, "calibrate": False},
        "tip_adapter": {"alphas": [1.0], "betas": [5.5]},
        "tip_adapter_f": {"alphas": [1.0], "betas": [5.5], "epochs": 0},
        "adamw": {"epochs": 1, "lr": 0.1, "batch_size": 4096},
        "lp_plus_plus": {"steps": 1},
        "gda": {"alpha": 1.0},
        "sgd": {"epochs": 1, "lr": 0.1, "batch_size": 4096},
        "cosine": {"epochs": 1, "lr": 1e-3, "batch_size": 4096},
        "clap": {"epochs": 1},
        "taskres": {"epochs": 1},
        "prolip": {"epochs": 1},
    }
    text = LinearHead(20 * centres, np.zeros(classes), tuple(map(str, range(classes))))
    head = HEADS[name](**few.get(name, {}))
    if name in ("label_propagation", "transclip", "em_dirichlet"):
        X, y = X[:2048], y[:2048]  # their heads hold the logits of all rows
    if name == "em_dirichlet":  # a Dirichlet over all classes for each of them
        monkeypatch.setattr("heads.estimators.transductive.em_dirichlet.machine_memory", lambda: 24 * 10**9)
        with pytest.raises(HeadError, match="21,843 classes need about 46 GB"):
            head.fit(X, y, texts=text)
        return
    head.fit(X, y, **({"texts": text} if head.takes_texts else {}))
    some = slice(0, 256)
    found = head.frozen().predict_proba(X[some])
    assert np.isfinite(found).all()
    if name not in ("ridge", "adamw", "sgd"):
        assert (found.argmax(axis=1) == y[some]).mean() > 0.95


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:no convergence:sklearn.exceptions.ConvergenceWarning")  # three iterations
@pytest.mark.filterwarnings("ignore:17747 of 21843 classes have no positive:UserWarning")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("logistic", {"C": 1e3, "max_iter": 3}),
        ("multilabel_ridge", {"alphas": [1.0]}),
        ("multilabel_logistic", {"C": 1.0}),
    ],
)
def test_21843_classes_or_labels_of_solvers(name: str, given: dict[str, Any]) -> None:
    classes, dim = 21_843, 32
    chance = np.random.default_rng(3)
    rows = classes if name == "logistic" else 4096
    centres = reference.unit(chance.standard_normal((classes, dim))).astype(np.float32)
    X, y = centres[:rows] + 0.01 * chance.standard_normal((rows, dim)).astype(np.float32), np.arange(rows)
    targets = y if name == "logistic" else (np.arange(classes) == y[:, None]).astype(np.int8)
    found = HEADS[name](**given).fit(X, targets).frozen().predict_proba(X[:256])
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == y[:256]).mean() > 0.95


@pytest.mark.nightly
def test_21843_classes_of_the_attentive_probe() -> None:
    chance = np.random.default_rng(3)
    centres = reference.unit(chance.standard_normal((21_843, 32)))
    tokens = (centres[:, None, :] + 0.01 * chance.standard_normal((21_843, 3, 32))).astype(np.float32)
    head = HEADS["attentive"](queries=2, epochs=1, lr=1e-2, batch_size=4096).fit(tokens, np.arange(21_843))
    found = head.frozen().predict_proba(tokens[:256])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-4)


@pytest.mark.nightly
def test_21843_classes_of_zero_shot() -> None:
    raw = reference.unit(np.random.default_rng(3).standard_normal((21_843, 32)))[:, None, :]
    head = HEADS["zero_shot"]().fit(texts_of(raw))
    found = head.frozen().predict_proba(raw[:256, 0].astype(np.float32))
    cosines = 100.0 * raw[:256, 0] @ raw[:, 0].T
    np.testing.assert_allclose(found, np.exp(cosines) / np.exp(cosines).sum(axis=1, keepdims=True), atol=1e-4)


def texts_of(raw: np.ndarray, scale: float = 100.0) -> Any:
    return SimpleNamespace(
        name="t",
        raw=raw.astype(np.float32),
        counts=np.full(len(raw), raw.shape[1]),
        classnames=tuple(map(str, range(len(raw)))),
        templates=None,
        dim=raw.shape[2],
        text_key="k",
        text_digest="d",
        logit_scale=scale,
        logit_bias=None,
        encoder_name="tiny",
        provenance={},
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1e-30, 1e30], [1e300, 1e300], [5e-324, 0.0]])
def test_zero_shot_ensembles(scale: float, weights: list[float]) -> None:
    raw = np.random.default_rng(0).standard_normal((2, 4, 3, D))
    raw /= np.linalg.norm(raw, axis=3, keepdims=True)
    head = HEADS["zero_shot"](weights=weights).fit([texts_of(part, scale) for part in raw])
    X = reference.unit(np.random.default_rng(1).standard_normal((20, D)))
    shares = np.array(weights) / max(weights)
    unit = [reference.unit(part.astype(np.float32).astype(np.float64).mean(axis=1)) for part in raw]
    truth = scale * X @ reference.unit(shares[0] * unit[0] + shares[1] * unit[1]).T
    for found in (head.predict_proba(X), head.frozen().predict_proba(X)):
        np.testing.assert_allclose(found, softmax(truth), atol=1e-3 if scale < 1e6 else 0.2)


def test_zero_shot_refuses_prompts_that_cancel() -> None:
    raw = np.random.default_rng(0).standard_normal((3, 1, D))
    with pytest.raises(FeatcacheError, match="average to zero"):
        HEADS["zero_shot"]().fit(texts_of(np.concatenate([raw, -raw], axis=1)))


def two_heads(size: float, dim: int = D) -> list[LinearHead]:
    chance = np.random.default_rng(0)
    return [
        LinearHead(size * chance.standard_normal((4, dim)), size * chance.standard_normal(4), tuple("abcd"), name=name)
        for name in ("one", "two")
    ]


def logits_of(head: LinearHead, X: np.ndarray) -> np.ndarray:
    return np.asarray(X @ head.weights.astype(np.float64).T + head.bias.astype(np.float64))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e10, 1e30, 3e37])
@pytest.mark.parametrize("alpha", [-1e3, 0.0, 1e-12, 0.5, 1.0, 1e3])
def test_interpolations_are_right_or_refused(size: float, alpha: float) -> None:
    first, second = two_heads(size)
    X = rows()[0]
    truth = (1 - alpha) * logits_of(first, X) + alpha * logits_of(second, X)
    try:
        (head,) = heads.interpolate(first, second, [alpha])
        found = head.logits(X)
        assert np.isfinite(head.predict_proba(X)).all()
    except HeadError as error:
        check_refusal(error, "overflow|infinite", allowed=size == 3e37 and abs(alpha) > 1)
        return
    np.testing.assert_allclose(
        found, truth, atol=2e-6 * max(np.abs(truth).max(), abs(alpha) * size) + 1e-42 * max(1, abs(alpha))
    )
    np.testing.assert_allclose(
        head.finish(head.prepare(X)),
        truth,
        atol=1e-5 * max(np.abs(truth).max(), abs(alpha) * size) + 1e-42 * max(1, abs(alpha)),
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("weights", [None, [1e-30, 1.0], [1e6, -1e6], [0.0, 0.0], [np.nan, 1.0], [1e30, 1.0]])
def test_ensembles_are_right_or_refused(size: float, weights: Sequence[float] | None) -> None:
    members, X = two_heads(size), rows()[0].astype(np.float64)
    shares = [0.5, 0.5] if weights is None else weights
    truth = sum(w * logits_of(head, X) for w, head in zip(shares, members, strict=True))
    for combine, features in ((heads.blend, X), (heads.ensemble, np.concatenate([X, X], axis=1))):
        try:
            found = combine(members, weights).logits(features)
        except HeadError as error:
            check_refusal(error, allowed=not np.isfinite(truth).all() or np.abs(truth).max() > 1e35)
            continue
        np.testing.assert_allclose(found, truth, atol=1e-5 * size * np.abs(shares).max())


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_calibration_finds_the_temperature_of_float64(size: float) -> None:
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    head = two_heads(size)[0]
    chance = np.random.default_rng(5)
    X = chance.standard_normal((4000, D)).astype(np.float32)
    logits = logits_of(head, X)
    y = (logits / size + chance.gumbel(size=logits.shape)).argmax(axis=1)

    def nll(log_inverse: float) -> float:
        scaled = logits / size * np.exp(log_inverse)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]).mean())

    best = np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x)
    found = heads.calibrate(head, (X, y)).predict_proba(X)
    np.testing.assert_allclose(found, softmax(logits / size * best), atol=2e-3)


@pytest.mark.parametrize("what", ["constant scores", "one row", "all right", "all wrong"])
def test_calibration_without_information_is_finite(what: str) -> None:
    head = two_heads(1.0)[0]
    X = rows()[0]
    y = head.predict(X) if what != "all wrong" else (head.predict(X) + 1) % 4
    if what == "constant scores":
        X = np.zeros_like(X)
    if what == "one row":
        X, y = X[:1], y[:1]
    found = heads.calibrate(head, (X, y))
    assert np.isfinite(found.predict_proba(X)).all()
    assert 0 < found.provenance["params"]["temperature_after"] < np.inf


MULTILABEL_REFUSED = {"nan": "hold NaN or infinity", "inf": "hold NaN or infinity"}


def targets_of(y: np.ndarray) -> np.ndarray:
    """Three targets: the class, its parity, and one that is known for half of the rows."""
    third = np.where(np.arange(len(y)) % 4 > 1, np.arange(len(y)) % 2, -1)
    return np.stack([y == 0, y % 2, third], axis=1).astype(np.int8)


@pytest.mark.parametrize("alpha", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("standardise", [False, True])
def test_multilabel_ridge_is_right_or_refuses(what: str, alpha: float, standardise: bool) -> None:
    X, y = INPUTS[what]()
    Y, wide = targets_of(y), X.astype(np.float64)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            head = HEADS["multilabel_ridge"](alphas=[alpha], standardise=standardise).fit(X, Y)
            assert np.isfinite(head.predict_proba(X)).all()
        except HeadError as error:
            check_refusal(error, "NaN or infinity|overflow|do not resolve|no valid row|beyond what float32 holds")
            assert what in (*MULTILABEL_REFUSED, "1e200", "3e38", "1e30", "float32 denormals", "columns of all sizes")
            return
    (weights,), (bias,) = head.path()
    seen = (wide - wide.mean(axis=0)) / deviations(wide) if standardise else wide
    for column in range(3):
        known = Y[:, column] >= 0
        if len(set(Y[known, column].tolist())) < 2:
            assert abs(head.intercept_[column]) == 10_000
            continue
        W, b = reference.ridge(seen[known], Y[known, column : column + 1].astype(np.float64), alpha)
        truth = seen @ W[0] + b[0]
        np.testing.assert_allclose(wide @ weights[column] + bias[column], truth, atol=1e-4)
        np.testing.assert_allclose(
            head.predict_proba(X)[:, column],
            1 / (1 + np.exp(-(truth * head.slopes_[column] + head.offsets_[column]))),
            atol=4e-3,
        )


@pytest.mark.parametrize("C", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("standardise", [False, True])
def test_multilabel_logistic_is_no_worse_than_float64(what: str, C: float, standardise: bool) -> None:
    from scipy.optimize import minimize

    X, y = INPUTS[what]()
    Y = targets_of(np.random.default_rng(2).integers(0, 3, len(y)))  # not separable
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            head = HEADS["multilabel_logistic"](C=C, standardise=standardise).fit(X, Y)
            assert np.isfinite(head.predict_proba(X)).all()
        except HeadError as error:
            check_refusal(error, "NaN or infinity|overflow|scale them")
            assert what in (*MULTILABEL_REFUSED, "1e200", "1e18", "1e30", "3e38") or (
                standardise and what == "float32 denormals"
            )
            return
    wide, mean = X.astype(np.float64), X.astype(np.float64).mean(axis=0)
    size = deviations(wide) if standardise else np.abs(wide - mean).max() or 1.0
    for column in range(3):
        known = Y[:, column] >= 0
        signs = np.where(Y[known, column] == 1, 1.0, -1.0)
        if abs(signs.sum()) == len(signs):
            continue
        unit = (wide[known] - mean) / size
        looser = C if standardise else min(C * size * size, 1e300)
        unit, scaled = (unit, looser) if looser else (0 * unit, 1.0)  # weights beyond all sizes, or no weights

        def objective(
            flat: np.ndarray, unit: np.ndarray = unit, signs: np.ndarray = signs, scaled: Any = scaled
        ) -> tuple[float, np.ndarray]:
            margins = signs * (unit @ flat[:-1] + flat[-1])
            pull = -signs / (1 + np.exp(np.minimum(margins, 700)))
            value = np.logaddexp(0, -margins).sum() + (flat[:-1] ** 2).sum() / 2 / scaled
            return float(value), np.r_[pull @ unit + flat[:-1] / scaled, pull.sum()]

        options = {"maxiter": 5000, "ftol": 1e-15}
        best = minimize(objective, np.zeros(X.shape[1] + 1), jac=True, method="L-BFGS-B", options=options)
        ours = objective(np.r_[head.coef_[column] * size, head.intercept_[column] + head.coef_[column] @ mean])[0]
        assert ours <= best.fun * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e6])
def test_multilabel_zero_shot_is_cosines(scale: float) -> None:
    raw = np.random.default_rng(0).standard_normal((4, 3, D))
    head = HEADS["multilabel_zero_shot"]().fit(texts_of(raw / np.linalg.norm(raw, axis=2, keepdims=True), scale))
    X = reference.unit(np.random.default_rng(1).standard_normal((20, D)))
    unit = (raw / np.linalg.norm(raw, axis=2, keepdims=True)).astype(np.float32).astype(np.float64)
    truth = scale * X @ reference.unit(unit.mean(axis=1)).T
    np.testing.assert_allclose(head.decision_function(X), truth, atol=1e-6 * scale)
    wanted = 1 / (1 + np.exp(-np.clip(truth, -700, 700)))
    np.testing.assert_allclose(head.predict_proba(X), wanted, atol=1e-3 + 1e-7 * scale)


@pytest.mark.parametrize("what", INPUTS)
def test_the_attentive_probe_is_its_formula_or_refuses(what: str) -> None:
    """Tokens of all magnitudes: the fitted head's logits in float64, and finite probabilities."""
    X, y = INPUTS[what]()
    tokens = np.stack([X, X[::-1]], axis=1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            head: Any = HEADS["attentive"](queries=2, epochs=2, lr=1e-2).fit(tokens, y).frozen()
            found = head.predict_proba(tokens)
        except HeadError as error:
            check_refusal(error, "NaN or infinity|overflow|expected at least 2|training|fold|beyond what float32")
            return
    assert np.isfinite(found).all()
    wide = tokens.astype(np.float64)
    scores = np.einsum("npd,qd->nqp", wide, head.queries.astype(np.float64))
    attended = np.einsum("nqp,npd->nqd", np.exp(scores - scores.max(axis=2, keepdims=True)), wide)
    attended /= np.exp(scores - scores.max(axis=2, keepdims=True)).sum(axis=2)[..., None]
    values = np.einsum("nqd,qed->nqe", attended, head.values.astype(np.float64))
    logits = np.einsum("nqe,cqe->nc", values, head.weights.astype(np.float64)) + head.bias
    np.testing.assert_allclose(found, softmax(logits), atol=4e-3)


def test_a_linear_head_beyond_float32_is_refused() -> None:
    with pytest.raises(FeatcacheError, match="NaN or infinite"):
        LinearHead(np.full((2, 3), np.inf, np.float32), np.zeros(2, np.float32), ("a", "b"))
