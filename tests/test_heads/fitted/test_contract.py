"""What every head promises. A head in HEADS is tested here without another line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import heads
from featcache.errors import FeatcacheError, HeadError, MismatchError
from heads.fitted.file_format import read_head, write_head


def test_linear_has_the_shapes_and_types_of_the_interface(fitted: Any, images: Any) -> None:
    if not isinstance(fitted, heads.LinearClassifier):
        with pytest.raises(HeadError, match="not linear"):
            fitted.frozen().linear()
        return
    linear, store = fitted.linear(), images()
    assert linear.weights.shape == (len(store.classnames), store.dim)
    assert linear.bias.shape == (len(store.classnames),)
    assert linear.weights.dtype == linear.bias.dtype == np.float32
    assert linear.classnames == store.classnames
    assert linear.alpha is None
    assert linear.linear() is linear


def test_the_frozen_heads_logits_are_the_heads_own_probabilities(fitted: Any, images: Any) -> None:
    X, _ = images(seed=5).numpy()
    np.testing.assert_allclose(fitted.frozen().predict_proba(X), fitted.predict_proba(X), atol=2e-5)
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(fitted.frozen().predict(X), fitted.predict(X))
    store = images(seed=5)
    np.testing.assert_array_equal(fitted.frozen().predict(store), fitted.predict(store))
    assert fitted.frozen().score(store) == fitted.frozen().score(X, store.y) == fitted.score(store)
    np.testing.assert_array_equal(fitted.predict(X), fitted.predict_proba(X).argmax(axis=1))


def test_score_is_accuracy_on_stores_and_arrays(fitted: Any, images: Any) -> None:
    store = images(seed=5)
    X, y = store.numpy()
    assert fitted.score(store) == fitted.score(X, y) == (fitted.predict(store) == y).mean()
    assert fitted.score(store) > 0.8


def test_heads_accept_tensors(fitted: Any, images: Any) -> None:
    torch = pytest.importorskip("torch")
    X, _ = images(seed=5).numpy(np.float32)
    np.testing.assert_array_equal(fitted.predict(torch.from_numpy(X)), fitted.predict(X))


def test_saved_and_loaded_is_the_same_head(fitted: Any, images: Any, tmp_path: Path) -> None:
    heads.save(fitted, tmp_path / "deep" / "head.safetensors")
    loaded, linear = heads.load(tmp_path / "deep" / "head.safetensors"), fitted.frozen()
    X, _ = images(seed=5).numpy(np.float32)
    np.testing.assert_array_equal(loaded.logits(X), linear.logits(X))
    assert (loaded.name, loaded.classnames, loaded.provenance) == (linear.name, linear.classnames, linear.provenance)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["head.safetensors"]


def test_a_file_that_lacks_a_setting_is_refused_unless_earlier_versions_did_not_write_it(
    fitted: Any, tmp_path: Path
) -> None:
    head, path = fitted.frozen(), tmp_path / "head.safetensors"
    heads.save(head, path)
    for name in head.to_file()[1]:
        tensors, record = read_head(path)
        del record[name]
        write_head(tmp_path / "less.safetensors", tensors, record)
        if name in head.optional:
            heads.load(tmp_path / "less.safetensors")
            continue
        with pytest.raises(HeadError, match=rf"less.safetensors: lacks '{name}'; fit the head again$"):
            heads.load(tmp_path / "less.safetensors")


def test_provenance_is_complete_and_json(fitted: Any) -> None:
    provenance = fitted.frozen().provenance
    wanted = {"head", "params", "encoder_key", "text_digest", "classnames", "fitted_on", "chosen_on", "featcache"}
    assert wanted <= set(provenance)
    assert json.loads(json.dumps(provenance)) == provenance
    assert heads.HEADS[provenance["head"]] is type(fitted)
    assert (provenance["encoder_key"] is None) == (type(fitted).fits_on == "texts")
    assert (provenance["text_digest"] is None) == (type(fitted).fits_on == "images" and not type(fitted).takes_texts)
    assert provenance["fitted_on"][0]["name"]


def test_follows_scikit_learns_parameters(fitted: Any) -> None:
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        fresh.frozen()
    with pytest.raises(NotFittedError):
        fresh.predict(np.zeros((1, 12)))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"encoder_key": "enc-2", "text_digests": ("text-2",)}, "fit the head on|featcache text"),
        ({"classnames": ("ant", "bee", "cow", "elk", "dog")}, "class 3: 'dog' against 'elk'"),
    ],
)
def test_refuses_a_store_that_it_does_not_fit(fitted: Any, images: Any, change: dict[str, Any], remedy: str) -> None:
    store = images(**change)
    for refused in (fitted.check, fitted.predict, fitted.frozen().check, lambda s: heads.evaluate([fitted], [s])):
        with pytest.raises(MismatchError, match=remedy):
            refused(store)


def test_refuses_features_of_another_width(fitted: Any, images: Any) -> None:
    narrow = images()
    narrow.X = narrow.X[:, :7]
    with pytest.raises(MismatchError, match=r"12 features.*holds 7"):
        fitted.check(narrow)
    with pytest.raises(HeadError, match="7 features"):
        fitted.predict(narrow.X)


def test_names_rows_that_are_not_finite(fitted: Any, images: Any) -> None:
    X, _ = images().numpy()
    X[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match=r"rows.*[ \[]3, 8[;\]]"):
        fitted.predict(X)
    with pytest.raises(HeadError, match=r"\[3, 8\]"):
        fitted.frozen().predict(X)


def test_gives_one_results_row(fitted: Any, images: Any) -> None:
    (row,) = heads.evaluate([fitted], [images(split="test", dataset_key="data-2"), images(name="noisy", noise=0.6)])
    assert row["head"] == fitted.name
    assert row["encoder"] == "tiny"
    assert {f"{name}:{metric}" for name in ("animals", "noisy") for metric in heads.evaluation.metrics.METRICS} <= set(
        row
    )
    assert row["animals:top1"] > row["noisy:top1"]
    assert "alpha" not in row


def test_the_path_is_evaluated_at_once(fitted: Any, images: Any) -> None:
    """A row a head, one of which is the chosen head's; nothing was chosen on a split of its own."""
    store = images(seed=5, split="test", dataset_key="data-2")
    path = fitted.path_heads()
    rows = heads.evaluate(path, [store])
    assert len(rows) == len(path) == len({row["head"] for row in rows})
    single = ("zero_shot", "nearest_mean", "lp_plus_plus", "gda", "attentive", "clap", "taskres", "prolip")
    assert (len(path) > 1) == (fitted.name not in single)
    (chosen,) = heads.evaluate([fitted], [store])
    (own,) = [row for row in rows if row["params"] == chosen["params"]]
    for metric in heads.evaluation.metrics.METRICS:
        assert own[f"animals:{metric}"] == pytest.approx(chosen[f"animals:{metric}"], rel=1e-5, abs=1e-7)
    assert all(row["chosen_on"] == [] and row["fitted_on"] == chosen["fitted_on"] for row in rows)
    assert json.loads(json.dumps([head.provenance for head in path])) == [head.provenance for head in path]


def test_a_file_that_is_not_a_head_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"not a head")
    for path in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(FeatcacheError, match="featcache fit"):
            heads.load(path)
