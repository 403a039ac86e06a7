"""The attentive probe: its formula in float64, training, files, and what pooling by attention is for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyDataset

import heads
from featcache import EncodeOptions, encode_dataset
from featcache.cli.main import main
from featcache.encoders.callables import CallableEncoder
from featcache.errors import HeadError, MismatchError
from featcache.store import ImageStore
from heads import Attentive, AttentiveHead, Ridge
from heads.estimators.dense.attentive import _Probe
from heads.fitted.attentive import attentive_logits
from heads.rows.scaling import Scaling


def needles(n: int, seed: int, tokens: int = 16, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class shows in one of 16 tokens alone, which a ninth dimension marks; token 0 never tells."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    X = rng.normal(size=(n, tokens, dim + 1))
    X[..., dim] = 0
    place = rng.integers(1, tokens, n)
    X[np.arange(n), place, :4] += 4 * np.eye(4)[y]
    X[np.arange(n), place, dim] = 4
    return X.astype(np.float32), y


def by_hand(head: AttentiveHead, X: np.ndarray) -> np.ndarray:
    """Logits in float64: values of every token first, then their attended mean."""
    queries, values, weights, bias = (
        np.asarray(array, np.float64) for array in (head.queries, head.values, head.weights, head.bias)
    )
    logits = np.tile(bias, (len(X), 1))
    for n, tokens in enumerate(X.astype(np.float64)):
        for q in range(len(queries)):
            scores = tokens @ queries[q]
            attention = np.exp(scores - scores.max())
            attention /= attention.sum()
            logits[n] += weights[:, q] @ (attention @ (tokens @ values[q].T))
    return logits


@pytest.mark.parametrize("pieces", [1, 3])
def test_logits_are_the_formula_in_float64(pieces: int) -> None:
    X, y = needles(40, 0)
    head: Any = Attentive(queries=4, heads=pieces, epochs=3, lr=1e-2).fit(X, y).frozen()
    np.testing.assert_allclose(head.logits(X), by_hand(head, X), atol=2e-5)
    assert head.queries.shape == (4 * pieces, 9)
    np.testing.assert_allclose(head.attention(X).sum(axis=2), 1, rtol=1e-5)
    assert head.attention(X).shape == (40, 4 * pieces, 16)
    if pieces > 1:  # each piece attends with its share of the dimensions
        assert (np.count_nonzero(head.queries, axis=1) == 3).all()


def test_standardising_is_folded_into_the_parameters() -> None:
    X, _ = needles(30, 1)
    X = 5 * X + np.arange(9, dtype=np.float32)
    estimator = Attentive(queries=3, heads=1)
    estimator.classnames_, estimator.n_features_in_ = ("a", "b", "c", "d"), 9
    scaling = Scaling(X.mean(axis=(0, 1)).astype(np.float64), X.std(axis=(0, 1)).astype(np.float64))
    probe = _Probe(estimator, scaling, torch.device("cpu"))
    with torch.no_grad():
        plain = attentive_logits(probe.standardised(torch.from_numpy(X)), *probe.parameters()).numpy()
    queries, values, weights, bias = probe.folded()
    folded = AttentiveHead(queries, values, weights, bias, ("a", "b", "c", "d")).logits(X)
    np.testing.assert_allclose(folded, plain, atol=1e-5)


def test_training_lowers_the_loss_and_is_seeded() -> None:
    X, y = needles(200, 0)
    first, second = (Attentive(queries=4, epochs=30, lr=1e-2, seed=1).fit(X, y) for _ in range(2))
    assert first.losses_[-1] < 0.7 * first.losses_[0]
    assert first.losses_[0] == pytest.approx(np.log(4), rel=0.2)  # it starts from equal chances
    np.testing.assert_array_equal(first.head_.weights, second.head_.weights)
    assert (Attentive(queries=4, epochs=30, lr=1e-2, seed=2).fit(X, y).head_.weights != first.head_.weights).any()
    with pytest.raises(HeadError, match="diverged"):
        Attentive(queries=4, epochs=5, lr=1e30).fit(X, y)


def test_the_most_accurate_of_several_learning_rates_is_chosen() -> None:
    (X, y), (V, w) = needles(300, 0), needles(200, 1)
    head = Attentive(queries=4, epochs=15, lr=[1e-6, 1e-2]).fit(X, y, selection=(V, w))
    assert head.lr_ == 1e-2
    assert [one.provenance.params["lr"] for one in head.path_heads()] == [1e-6, 1e-2]
    accuracies = [(one.predict(V) == w).mean() for one in head.path_heads()]
    assert accuracies[1] > accuracies[0]
    assert Attentive(queries=4, epochs=15, lr=[1e-6, 1e-2]).fit(X, y).lr_ == 1e-2  # by a held-out fifth


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    X, y = needles(60, 0)
    head = Attentive(queries=2, epochs=2).fit(X, y)
    loaded = heads.load(head.save(tmp_path / "head.safetensors"))
    assert isinstance(loaded, AttentiveHead)
    np.testing.assert_array_equal(loaded.logits(X), head.frozen().logits(X))
    half = loaded.restrict([3, 1])
    np.testing.assert_array_equal(half.logits(X), loaded.logits(X)[:, [3, 1]])
    np.testing.assert_allclose(loaded.with_temperature(2.0).logits(X), loaded.logits(X) / 2, rtol=1e-5)


def test_other_shapes_are_refused() -> None:
    X, y = needles(30, 0)
    head = Attentive(queries=2, epochs=1).fit(X, y)
    with pytest.raises(HeadError, match="8 features"):
        head.predict(X[..., :8])
    with pytest.raises(HeadError, match="2-D"):
        Ridge().fit(X, y)
    wrong: list[dict[str, Any]] = [{"queries": 0}, {"lr": 0.0}, {"lr": []}, {"weight_decay": -1.0}, {"batch_size": 0}]
    for bad in wrong:
        with pytest.raises(HeadError):
            Attentive(**bad).fit(X, y)
    X[3, 2, 1] = np.nan
    with pytest.raises(HeadError, match=r": 3;"):
        Attentive(queries=2, epochs=1).fit(X, y)


class Tiles(CallableEncoder):
    """Four tiles of 2 x 2 pixels as tokens of 12."""

    def __init__(self) -> None:
        super().__init__(self.cut, (4, 12), digest="tiles")

    @staticmethod
    def cut(images: np.ndarray) -> np.ndarray:
        tiles = images.reshape(-1, 2, 2, 2, 2, 3).swapaxes(2, 3).reshape(-1, 4, 12)
        return tiles.astype(np.float32) / 255


def stored(root: Path) -> ImageStore:
    return encode_dataset(NumpyDataset(60), Tiles(), root=root, options=EncodeOptions(taps=["patch"])).store


def test_a_store_is_streamed_and_gives_the_head_of_its_arrays(tmp_path: Path) -> None:
    store = stored(tmp_path)
    tap = store.tap("patch")
    X, y = tap.numpy()
    from_store = Attentive(queries=2, epochs=3).fit(tap)
    from_arrays = Attentive(queries=2, epochs=3).fit(X, y, classnames=tap.classnames)
    np.testing.assert_array_equal(from_store.head_.logits(X), from_arrays.head_.logits(X))
    shots = Attentive(queries=2, epochs=3).fit(heads.few_shot(tap, 3))
    assert shots.provenance_["fitted_on"][0]["sample"]["shots"] == 3
    (row,) = heads.evaluate([from_store], [tap])
    assert row["fake:top1"] == pytest.approx(from_store.score(X, y))
    with pytest.raises(MismatchError, match="was fitted on features of encoder"):
        heads.evaluate([from_store], [store])


def test_heads_of_one_vector_name_the_way_to_pool(tmp_path: Path) -> None:
    tap = stored(tmp_path).tap("patch")
    for kind in ("ridge", "logistic", "knn", "nearest_mean", "adamw"):
        with pytest.raises(HeadError, match=r"4 tokens of width 12 per image; pool them: --pool mean"):
            heads.HEADS[kind]().fit(tap)
    head = Ridge().fit(tap.pooled("mean"))
    with pytest.raises(HeadError, match=r"pool them: --pool mean"):
        heads.evaluate([head], [tap])
    with pytest.raises(MismatchError):
        heads.evaluate([head], [tap.pooled("max")])
    assert np.isfinite(heads.evaluate([head], [tap.pooled("mean")])[0]["fake:nll"])


def test_attention_finds_what_a_mean_dilutes_and_the_first_token_lacks() -> None:
    """The class shows in one token of 16: a linear head on token 0 guesses, on the mean it is better, not good."""
    (X, y), (V, w) = needles(800, 0), needles(600, 1)

    def accuracy(features: Any) -> float:
        return float((Ridge().fit(features(X), y).predict(features(V)) == w).mean())

    attentive = Attentive(queries=4, epochs=40, lr=1e-2).fit(X, y).score(V, w)
    mean, first = accuracy(lambda X: X.mean(axis=1)), accuracy(lambda X: X[:, 0])
    assert attentive > 0.9
    assert attentive > mean + 0.2
    assert mean > first + 0.2
    assert first < 0.35


def test_the_command_line_takes_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from small_pictures import write_pictures

    monkeypatch.chdir(tmp_path)
    source = write_pictures(tmp_path / "pictures")
    assert main(["encode", source, "--split", "all", "--tap", "patch", "--tap", "layer:-2:cls"]) == 0
    name = next(line for line in capsys.readouterr().out.splitlines() if "@tiny" in line).partition("@")[0]
    assert main(["fit", "attentive", f"{name}#patch", "--set", "queries=2", "--set", "epochs=2", "-o", "a"]) == 0
    assert main(["fit", "nearest_mean", f"{name}#patch", "--pool", "gem", "-o", "gem"]) == 0
    assert main(["fit", "nearest_mean", f"{name}#layer:-2:cls", "-o", "cls"]) == 0
    assert main(["fit", "nearest_mean", f"{name}#patch", "-o", "none"]) != 0
    assert "pool them: --pool mean" in capsys.readouterr().err
    assert main(["evaluate", "a", "--on", f"{name}#patch"]) == 0
    assert main(["evaluate", "gem", "--on", f"{name}#patch:gem"]) == 0
    predicted = []
    picture = str(next((tmp_path / "pictures").rglob("*.png"), None) or next((tmp_path / "pictures").rglob("*.jpg")))
    for head in ("a", "gem", "cls"):
        capsys.readouterr()
        assert main(["predict", head, picture]) == 0
        predicted.append(capsys.readouterr().out)
    assert all(picture in line for line in predicted)
