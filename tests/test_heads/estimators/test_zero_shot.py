"""Zero-shot heads: golden values, template subsets, ragged prompt files, ensembles and their refusals."""

import json
from typing import Any

import numpy as np
import pytest

from featcache.errors import HeadError, MismatchError
from heads import ZeroShot

# S(shape, phase, amplitude) = amplitude * sin(phase + 0.7 k), rows normalised: fixed input of the golden values below,
# which an independent float64 computation gave.
GOLDEN = np.array([[0.73596974, 0.50221509, 0.03226084, -0.45286619],
                   [0.58022049, 0.67602119, 0.45387857, 0.01826976],
                   [0.10576519, 0.51042133, 0.67501834, 0.52214369]])  # fmt: skip


def golden_raw() -> np.ndarray:
    e = np.sin(0.2 + 0.7 * np.arange(24)).reshape(3, 2, 4)
    return e / np.linalg.norm(e, axis=-1, keepdims=True)


def norm(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_golden_class_weights(texts: Any) -> None:
    store = texts()
    store.raw, store.classnames, store.counts = golden_raw(), ("a", "b", "c"), np.array([2, 2, 2])
    head = ZeroShot().fit(store)
    np.testing.assert_allclose(head.coef_ / 20.0, GOLDEN, atol=1e-8)
    np.testing.assert_allclose(head.linear().weights, (20.0 * GOLDEN).astype(np.float32), rtol=1e-6)
    unnormalised = norm(np.sin(0.2 + 0.7 * np.arange(24)).reshape(3, 2, 4).mean(axis=1))
    assert abs(unnormalised[0] - GOLDEN[0]).max() > 0.04  # the order of the steps shows in the values


def test_logits_carry_scale_and_bias(texts: Any, images: Any) -> None:
    store, X = texts(logit_scale=117.0, logit_bias=-12.5), images().numpy()[0]
    wanted = 117.0 * X @ norm(norm(store.raw).mean(axis=1)).T - 12.5
    np.testing.assert_allclose(ZeroShot().fit(store).linear().logits(X), wanted, atol=2e-4)


@pytest.mark.parametrize("templates", [[1], ["the {}."], [np.int64(1)]])
def test_template_subsets(texts: Any, templates: list[Any]) -> None:
    store = texts()
    head = ZeroShot(templates).fit(store)
    np.testing.assert_allclose(head.coef_ / 20.0, norm(store.raw[:, 1]), atol=1e-7)
    assert json.loads(json.dumps(head.provenance_)) == head.provenance_


def test_prompt_files_with_different_numbers_of_prompts(texts: Any) -> None:
    store = texts(templates=None, counts=np.array([2, 1, 2, 1, 2]))
    store.raw[[1, 3], 1] = np.nan
    found = ZeroShot().fit(store).coef_ / 20.0
    for c, count in enumerate(store.counts):
        np.testing.assert_allclose(found[c], norm(norm(store.raw[c, :count]).mean(axis=0)), atol=1e-6)
    with pytest.raises(HeadError, match="2 classes \\(bee, dog\\)"):
        ZeroShot([1]).fit(store)
    with pytest.raises(HeadError, match="not among the 0"):
        ZeroShot(["a {}."]).fit(store)


def test_ensembles_mix_normalised_class_vectors(texts: Any) -> None:
    one, two = texts(), texts(seed=7, name="more")
    first, second = (ZeroShot().fit(s).coef_ / 20.0 for s in (one, two))
    np.testing.assert_allclose(ZeroShot().fit([one, two]).coef_, 20.0 * norm(first + second), rtol=1e-9)
    head = ZeroShot(weights=[3, 1]).fit([one, two])
    np.testing.assert_allclose(head.coef_, 20.0 * norm(0.75 * first + 0.25 * second), rtol=1e-9)
    assert [entry["name"] for entry in head.provenance_["fitted_on"]] == ["texts", "more"]
    assert head.provenance_["params"]["weights"] == [0.75, 0.25]


def test_members_of_an_ensemble_must_agree(texts: Any) -> None:
    with pytest.raises(MismatchError, match="different class names"):
        ZeroShot().fit([texts(), texts(classnames=("ant", "bee", "cow", "elk", "dog"))])
    with pytest.raises(MismatchError, match="text-1 and text-2"):
        ZeroShot().fit([texts(), texts(text_digest="text-2")])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"templates": [2]}, "index 2 .* it has 0 to 1"),
        ({"templates": [-1]}, "index -1"),
        ({"templates": []}, "empty list"),
        ({"templates": ["an {}."]}, "'an {}.' is not among the 2"),
        ({"weights": [1.0, 2.0]}, "1 non-negative numbers"),
        ({"weights": [-1.0]}, "non-negative"),
        ({"weights": [0.0]}, "non-negative"),
    ],
)
def test_invalid_parameters_are_refused(texts: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        ZeroShot(**params).fit(texts())


def test_other_input_than_text_stores_is_refused(images: Any, texts: Any) -> None:
    others: list[Any] = [[], images(), np.eye(3)]
    for wrong in others:
        with pytest.raises(HeadError, match="text stores"):
            ZeroShot().fit(wrong)
    with pytest.raises(HeadError, match="no logit scale"):
        ZeroShot().fit(texts(logit_scale=None))
    cancelled = texts()
    cancelled.raw[2, 1] = -cancelled.raw[2, 0]
    with pytest.raises(HeadError, match="average to zero"):
        ZeroShot().fit(cancelled)


def test_an_encoder_without_text_side_is_refused(texts: Any, images: Any) -> None:
    with pytest.raises(MismatchError, match="text tower None"):
        ZeroShot().fit(texts()).check(images(text_digests=()))
