"""Ensembles of heads, models and prompts against sums written out, least squares by numpy, and refits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

import heads
from featcache.errors import HeadError, MismatchError
from heads import LinearHead, Ridge, ZeroShot


def two_models(images: Any, n: int = 200, seed: int = 3, **fields: Any) -> tuple[Any, Any]:
    """One set of samples under two encoders: equal labels, other features."""
    first = images(n=n, seed=seed, **fields)
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(12, 12)))[0]
    noisy = first.X.astype(np.float32) + 0.3 * np.random.default_rng(seed).normal(size=first.X.shape)
    second = images(n=n, seed=seed, encoder_key="enc-2", encoder_name="other", text_digests=("text-2",), **fields)
    second.X = (noisy @ rotation).astype(np.float16)
    return first, second


def test_a_joint_store_holds_the_members_side_by_side(images: Any) -> None:
    first, second = two_models(images)
    joint = heads.join([first, second])
    X, y = joint.numpy()
    np.testing.assert_array_equal(X, np.concatenate([first.X, second.X], axis=1).astype(np.float32))
    np.testing.assert_array_equal(y, first.y)
    blocks = [(features.copy(), labels) for features, labels in joint.blocks(rows=64)]
    np.testing.assert_array_equal(np.concatenate([features for features, _ in blocks]), X)
    assert (joint.dim, len(joint), joint.encoder_key, joint.text_digests) == (
        24,
        200,
        "enc-1+enc-2",
        ("text-1+text-2",),
    )


@pytest.mark.parametrize("key", ["dataset_key", "labels_digest", "classnames"])
def test_stores_of_other_samples_are_not_joined(images: Any, key: str) -> None:
    first, second = two_models(images)
    setattr(second, key, ("ant", "bee", "cow", "elk", "dog") if key == "classnames" else "other")
    with pytest.raises(MismatchError, match=r"different (samples|labels|class names); "):
        heads.join([first, second])
    with pytest.raises(HeadError, match="at least two"):
        heads.join([first])


def test_images_that_were_edited_between_two_models_are_not_joined(images: Any) -> None:
    first, second = two_models(images)
    first.row_hashes = np.arange(200, dtype=np.uint64)
    second.row_hashes = first.row_hashes.copy()
    assert len(heads.join([first, second])) == 200
    second.row_hashes[[3, 9]] += np.uint64(1000)
    with pytest.raises(MismatchError, match=r"rows \[3, 9\] are of files that were edited .*; encode both again"):
        heads.join([first, second])


def test_an_ensemble_of_models_is_the_weighted_sum_of_their_logits(images: Any) -> None:
    first, second = two_models(images)
    members = [Ridge(alphas=[1.0]).fit(store).linear() for store in (first, second)]
    together = heads.ensemble(members, [0.3, 0.7])
    expected = 0.3 * members[0].logits(first.X) + 0.7 * members[1].logits(second.X)
    joint = heads.join([first, second])
    np.testing.assert_allclose(together.logits(joint.numpy()[0]), expected, rtol=1e-4, atol=1e-5)
    test = heads.join(two_models(images, seed=4, split="test", dataset_key="data-2"))
    (row,) = heads.evaluate([together], [test])
    assert row["animals:top1"] == (together.predict(test) == test.labels).mean()
    with pytest.raises(MismatchError, match="was fitted on features of encoder"):
        heads.evaluate([together], [first])


def test_any_head_fits_at_feature_level(images: Any) -> None:
    joint = heads.join(two_models(images))
    alone = Ridge(alphas=[0.1]).fit(joint)
    X, y = joint.numpy(np.float64)
    np.testing.assert_allclose(alone.coef_, Ridge(alphas=[0.1]).fit(X, y).coef_, atol=1e-10)
    assert alone.provenance_["encoder_key"] == "enc-1+enc-2"


def test_zero_shot_heads_of_two_models_join(images: Any, texts: Any) -> None:
    first, second = two_models(images)
    zero_shot = [ZeroShot().fit(texts(text_digest=f"text-{i}", seed=i)) for i in (1, 2)]
    row = heads.evaluate([heads.ensemble(zero_shot)], [heads.join([first, second])])[0]
    assert 0 <= row["animals:top1"] <= 1
    fitted = Ridge().fit(second)
    with pytest.raises(HeadError, match="only some of"):
        heads.ensemble([zero_shot[0], fitted])


def test_blend_is_linear_and_refuses_two_models(images: Any, texts: Any) -> None:
    first, second = two_models(images)
    a, b = Ridge(alphas=[1.0]).fit(first), ZeroShot().fit(texts())
    blended = heads.blend([a, b], [2.0, -0.5])
    expected = 2.0 * a.linear().logits(first.X) - 0.5 * b.linear().logits(first.X)
    np.testing.assert_allclose(blended.logits(first.X), expected, rtol=1e-4, atol=1e-4)
    assert (blended.provenance["encoder_key"], blended.provenance["text_digest"]) == ("enc-1", "text-1")
    with pytest.raises(MismatchError, match="heads belong to encoder_key"):
        heads.blend([a, Ridge().fit(second)])
    with pytest.raises(HeadError, match="2 finite numbers"):
        heads.blend([a, b], [1.0])


def test_stacking_weights_are_those_of_least_squares_on_all_logits(images: Any) -> None:
    rng = np.random.default_rng(0)
    select = images(n=300, seed=6, name="val", split="val", dataset_key="data-3")
    truth = np.eye(5)[select.y]
    base = heads.Ridge(alphas=[1.0]).fit(images()).linear()
    members = [
        LinearHead(base.weights + s * rng.normal(size=base.weights.shape), base.bias, base.classnames)
        for s in (0.3, 0.5, 0.8)
    ]
    stacked = heads.stack(members, select)
    logits = [head.logits(select.X).astype(np.float64) for head in members]
    design = np.stack([(one - one.mean(axis=1, keepdims=True)).ravel() for one in logits], axis=1)
    weights = nnls(design, (truth - truth.mean(axis=1, keepdims=True)).ravel())[0]
    assert np.count_nonzero(weights) > 0
    np.testing.assert_allclose(stacked.provenance["params"]["weights"], weights, rtol=1e-6, atol=1e-12)
    free = np.linalg.lstsq(design[:, weights > 0], (truth - truth.mean(axis=1, keepdims=True)).ravel())[0]
    np.testing.assert_allclose(weights[weights > 0], free, rtol=1e-6)  # the bound is all that differs
    ratio = stacked.logits(select.X) / sum(w * one for w, one in zip(weights, logits, strict=True))
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-2)  # one temperature for all


def test_stacking_drops_a_useless_head_and_takes_duplicates(images: Any) -> None:
    select = images(n=300, seed=6, name="val", split="val", dataset_key="data-3")
    good = Ridge(alphas=[1.0]).fit(images()).linear()
    wrong = LinearHead(-good.weights, -good.bias, good.classnames, name="wrong")
    weights = heads.stack([good, wrong, good], select).provenance["params"]["weights"]
    assert weights[0] + weights[2] > 0
    assert weights[1] == pytest.approx(0.0, abs=1e-8)
    with pytest.raises(HeadError, match="no head tells"):
        heads.stack([wrong], select)


def test_stacking_is_refused_on_training_rows_and_reported_as_chosen(images: Any) -> None:
    train, select = images(), images(seed=6, split="val", dataset_key="data-3")
    head = Ridge(alphas=[1.0]).fit(train)
    with pytest.raises(HeadError, match="was fitted on"):
        heads.stack([head, head], train)
    with pytest.raises(HeadError, match="was chosen on"):
        heads.evaluate([heads.stack([head, head], select)], [select])


def test_models_stack_better_than_the_worse_one_alone(images: Any) -> None:
    members = [Ridge(alphas=[1.0]).fit(store) for store in two_models(images)]
    stacked = heads.stack(members, list(two_models(images, seed=7, split="val", dataset_key="data-3")))
    tests = two_models(images, n=1000, seed=8, split="test", dataset_key="data-4")
    alone = [head.score(store) for head, store in zip(members, tests, strict=True)]
    assert stacked.score(heads.join(list(tests))) >= min(alone)
    with pytest.raises(HeadError, match="2 heads and 1 stores"):
        heads.stack(members, [tests[0]])


def test_template_scores_are_the_mean_largest_centred_logit(images: Any, texts: Any) -> None:
    store, prompts = images(), texts()
    X = store.X.astype(np.float64)
    scores = heads.score_templates(prompts, store)
    for t in range(2):
        logits = 20.0 * (X - X.mean(axis=0)) @ prompts.raw[:, t].T.astype(np.float64)
        assert scores[t] == pytest.approx(logits.max(axis=1).mean(), rel=1e-5)
    weights = heads.template_weights(prompts, store)
    np.testing.assert_allclose(weights, np.exp(scores) / np.exp(scores).sum())


def test_a_noise_template_gets_the_smaller_weight_and_the_head_uses_it(images: Any, texts: Any) -> None:
    prompts = texts()
    prompts.raw[:, 1] = prompts.raw[:, 1].mean(axis=0)  # says the same of every class
    weights = heads.template_weights(prompts, images())
    assert weights[0] > 0.9
    head = ZeroShot(template_weights=weights).fit(prompts)
    mixed = weights[0] * prompts.raw[:, 0] + weights[1] * prompts.raw[:, 1]
    np.testing.assert_allclose(
        head.coef_, 20 * mixed / np.linalg.norm(mixed, axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )
    assert head.provenance_["params"]["template_weights"] == weights


def test_template_scores_refuse_prompt_files_and_foreign_towers(images: Any, texts: Any) -> None:
    with pytest.raises(HeadError, match="prompt file"):
        heads.score_templates(texts(templates=None), images())
    with pytest.raises(MismatchError, match="text tower"):
        heads.score_templates(texts(text_digest="text-9"), images())
    empty = SimpleNamespace(blocks=list, name="none", text_digests=("text-1",))
    with pytest.raises(HeadError, match="no valid row"):
        heads.score_templates(texts(), empty)
