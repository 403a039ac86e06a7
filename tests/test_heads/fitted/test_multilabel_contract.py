"""What every multi-label head promises. A multi-label head in HEADS is tested here without another line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import heads
from featcache.errors import HeadError, MismatchError
from heads.evaluation.metrics import MULTILABEL
from heads.fitted.file_format import read_head, write_head


def test_predictions_are_the_sigmoid_and_the_thresholds(fitted_multilabel: Any, tagged: Any) -> None:
    store, head = tagged(seed=5), fitted_multilabel.frozen()
    X, _ = store.numpy()
    logits = X.astype(np.float32) @ head.weights.T + head.bias
    np.testing.assert_allclose(fitted_multilabel.predict_proba(store), 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_array_equal(fitted_multilabel.predict(X), logits >= head.thresholds)
    known = store.targets >= 0
    exact = ((fitted_multilabel.predict(X) == store.targets) | ~known).all(axis=1).mean()
    assert fitted_multilabel.score(store) == fitted_multilabel.score(X, store.targets) == exact


def test_saved_and_loaded_is_the_same_head(fitted_multilabel: Any, tagged: Any, tmp_path: Path) -> None:
    head = fitted_multilabel.frozen().with_thresholds([0.5, np.inf, -1.0, 0.0, 2.0])
    heads.save(head, tmp_path / "head")
    loaded: Any = heads.load(tmp_path / "head")
    X, _ = tagged(seed=5).numpy()
    np.testing.assert_array_equal(loaded.logits(X), head.logits(X))
    np.testing.assert_array_equal(loaded.thresholds, head.thresholds)
    assert (loaded.name, loaded.classnames, loaded.provenance) == (head.name, head.classnames, head.provenance)


def test_provenance_is_complete_and_parameters_are_scikit_learns(fitted_multilabel: Any) -> None:
    provenance = fitted_multilabel.frozen().provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert heads.HEADS[provenance["head"]] is type(fitted_multilabel)
    assert (provenance["encoder_key"] is None) == (type(fitted_multilabel).fits_on == "texts")
    with pytest.raises(NotFittedError):
        clone(fitted_multilabel).predict(np.zeros((1, 12)))


def test_evaluation_gives_every_metric_as_scikit_learn_has_it(fitted_multilabel: Any, tagged: Any) -> None:
    store = tagged(seed=5, split="test", dataset_key="data-2")
    (row,) = heads.evaluate([fitted_multilabel], [store])
    assert {f"animals:{metric}" for metric in MULTILABEL} <= set(row)
    scores, Y = fitted_multilabel.frozen().logits(store.X), store.targets
    for column, name in enumerate(store.classnames):
        known = Y[:, column] >= 0
        wanted = average_precision_score(Y[known, column], scores[known, column])
        assert row["animals:class_ap"][name] == pytest.approx(wanted, abs=1e-9)
    assert row["animals:map_macro"] > 0.8
    assert len(heads.evaluate(fitted_multilabel.path_heads(), [store])) == len(fitted_multilabel.path_heads())


def test_single_label_and_multi_label_heads_refuse_each_others_stores(
    fitted_multilabel: Any, tagged: Any, images: Any
) -> None:
    ridge = heads.Ridge().fit(images())
    with pytest.raises(HeadError, match=r"animals/train is multi-label .* one label per row"):
        heads.Ridge().fit(tagged())
    for refused in (ridge.check, ridge.predict, lambda store: heads.evaluate([ridge], [store])):
        with pytest.raises(MismatchError, match="one label per row, but 'animals' is multi-label"):
            refused(tagged(split="test", dataset_key="data-2"))
    for refused in (fitted_multilabel.check, lambda store: heads.evaluate([fitted_multilabel], [store])):
        with pytest.raises(MismatchError, match="is multi-label, but 'animals' has one label per row"):
            refused(images(split="test", dataset_key="data-2"))
    with pytest.raises(HeadError, match="confusion: not for multi-label heads"):
        heads.judge([fitted_multilabel], [tagged(split="test", dataset_key="data-2")], confusion=True)
    with pytest.raises(HeadError, match="top1 is not a metric of multi-label heads; expected one of map_macro"):
        heads.choose([fitted_multilabel], tagged(split="val", dataset_key="data-3"), metric="top1")


def test_a_store_of_another_encoder_or_class_list_is_refused(fitted_multilabel: Any, tagged: Any) -> None:
    with pytest.raises(MismatchError, match=r"fit the head on|featcache text"):
        fitted_multilabel.check(tagged(encoder_key="enc-2", text_digests=("text-2",)))
    with pytest.raises(MismatchError, match="class 3: 'dog' against 'elk'"):
        fitted_multilabel.check(tagged(classnames=("ant", "bee", "cow", "elk", "dog")))


def test_thresholds_come_from_the_selection_split_and_it_is_recorded(tagged: Any, texts: Any) -> None:
    val = tagged(seed=7, split="val", dataset_key="data-3")
    for name in sorted(name for name in heads.HEADS if heads.HEADS[name].multilabel):
        fitted = heads.fit_head(name, heads.Material(tagged(), [texts()], selection=val))
        (row,) = heads.evaluate([fitted], [val], allow_chosen=True)
        plain = fitted.frozen().with_thresholds(np.zeros(5))
        (other,) = heads.evaluate([plain], [val], allow_chosen=True)
        assert row["animals:f1_macro"] >= other["animals:f1_macro"]
        assert fitted.provenance_.chosen_on[-1]["split"] == "val"
        with pytest.raises(HeadError, match="chosen on"):
            heads.evaluate([fitted], [val])


def test_c_is_chosen_by_the_metric_on_held_out_rows(tagged: Any) -> None:
    train, val = tagged(noise=0.5), tagged(seed=7, noise=0.5, split="val", dataset_key="data-3")
    head = heads.MultiLabelLogistic(C=[1e-3, 0.1, 10.0]).fit(train, selection=val)
    scores = []
    for C in head.Cs_:
        parts = []
        for column in range(5):
            known, held = train.targets[:, column] >= 0, val.targets[:, column] >= 0
            one = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky")
            one.fit(train.X[known].astype(float), train.targets[known, column])
            parts.append(
                average_precision_score(val.targets[held, column], one.decision_function(val.X[held].astype(float)))
            )
        scores.append(np.mean(parts))
    np.testing.assert_allclose(head.cv_scores_, scores, atol=1e-6)
    assert head.Cs_[int(np.argmax(scores))] == head.C_
    assert heads.choose(head.path_heads(), val).name == f"multilabel_logistic C={head.C_:g}"


def test_lists_of_names_are_targets_and_a_class_without_rows_is_named(tagged: Any) -> None:
    X, Y = tagged(unknown=0.0).numpy()
    Y = Y.copy()
    Y[:, 2] = 0
    names = [[tagged().classnames[column] for column in np.flatnonzero(row)] for row in Y]
    with pytest.warns(UserWarning, match="1 of 5 classes have no positive or no negative training row: cow"):
        head = heads.MultiLabelLogistic(C=1.0).fit(X, names, classnames=tagged().classnames)
    assert head.absent_ == ("cow",)
    assert not head.predict(X)[:, 2].any()
    with pytest.warns(UserWarning, match="cow"):
        table = heads.MultiLabelLogistic(C=1.0).fit(X, Y, classnames=tagged().classnames)
    np.testing.assert_array_equal(head.coef_, table.coef_)


@pytest.mark.parametrize("name", ["absent", "never"])
def test_a_file_that_lacks_a_setting_is_refused(fitted_multilabel: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "head.safetensors"
    heads.save(fitted_multilabel, path)
    tensors, record = read_head(path)
    del record[name]
    write_head(path, tensors, record)
    with pytest.raises(HeadError, match=rf"head.safetensors: lacks '{name}'; fit the head again$"):
        heads.load(path)
