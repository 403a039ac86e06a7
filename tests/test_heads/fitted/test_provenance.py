"""Where a head comes from travels into the heads made from it, so that refusals follow; and what a ridge was told."""

import json
from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError
from heads import (
    CLAP,
    AdamW,
    LinearHead,
    Logistic,
    LPPlusPlus,
    ProLIP,
    Ridge,
    TaskRes,
    TipAdapter,
    TipAdapterF,
    ZeroShot,
)
from heads.fitted.provenance import ROLES, Provenance, SplitRecord


def from_text(kind: Any) -> Any:
    return lambda parent, train: kind().fit(train, texts=parent)


def from_prior(kind: Any) -> Any:
    return lambda parent, train: kind(prior=parent).fit(train)


MAKERS = {
    "tip_adapter": from_text(TipAdapter),
    "tip_adapter_f": from_text(lambda: TipAdapterF(epochs=1)),
    "lp_plus_plus": from_text(lambda: LPPlusPlus(steps=5)),
    "clap": from_text(lambda: CLAP(epochs=2)),
    "taskres": from_text(lambda: TaskRes(epochs=2)),
    "prolip": from_text(lambda: ProLIP(epochs=2)),
    "ridge": from_prior(Ridge),
    "logistic": from_prior(Logistic),
    "adamw": from_prior(AdamW),
}


@pytest.fixture(params=sorted(MAKERS))
def made_from(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]


@pytest.fixture
def val(images: Any) -> Any:
    return images(n=150, seed=6, split="val", dataset_key="data-3")


def test_a_head_made_from_one_that_was_stacked_on_val_is_not_reported_there(
    made_from: Any, images: Any, texts: Any, val: Any
) -> None:
    train = images()
    parent = heads.stack([ZeroShot().fit(texts()), Ridge(alphas=[1.0]).fit(train)], val)
    head = made_from(parent, train)
    with pytest.raises(HeadError, match="was chosen on animals/val"):
        heads.evaluate([head], [val])
    record = head.provenance_
    assert json.loads(json.dumps(record)) == record
    assert [entry["split"] for entry in record["chosen_on"]] == ["val"]


def test_a_head_made_from_one_that_was_fitted_on_val_does_not_choose_there(
    made_from: Any, images: Any, texts: Any, val: Any
) -> None:
    train, parent = images(), Ridge(alphas=[1.0]).fit(val)
    head = made_from(parent.linear(), train)
    assert [entry["split"] for entry in head.provenance_["fitted_on"]] == ["train", "val"]
    with pytest.raises(HeadError, match="was fitted on animals/val"):
        heads.choose([head, ZeroShot().fit(texts())], val)
    with pytest.raises(HeadError, match="was fitted on animals/val"):
        heads.calibrate(head, val)


def test_splits_are_listed_once_and_the_heads_own_choice_last(images: Any, texts: Any, val: Any) -> None:
    train, other = images(), images(seed=7, split="dev", dataset_key="data-5")
    parent = heads.choose([Ridge(alphas=[1.0]).fit(train)], val)
    head = Ridge(prior=parent).fit(train, selection=other)
    assert [entry["split"] for entry in head.provenance_["fitted_on"]] == ["train"]
    assert [entry["split"] for entry in head.provenance_["chosen_on"]] == ["val", "dev"]
    both = heads.blend([head, Ridge(alphas=[1.0]).fit(train)])
    assert [entry["split"] for entry in both.provenance["fitted_on"]] == ["train"]
    between = heads.interpolate(head, parent, [0.5])[0]
    assert [entry["split"] for entry in between.provenance["fitted_on"]] == ["train"]
    assert [entry["split"] for entry in between.provenance["chosen_on"]] == ["val", "dev"]


def test_heads_of_a_path_know_where_their_prior_was_chosen(images: Any, val: Any) -> None:
    train = images()
    parent = heads.choose([Ridge(alphas=[1.0]).fit(train)], val)
    for head in Logistic([0.1, 1.0], prior=parent).fit(train).path_heads():
        with pytest.raises(HeadError, match="was chosen on animals/val"):
            heads.evaluate([head], [val])


def test_the_priors_parameters_are_kept(images: Any, texts: Any) -> None:
    parent = ZeroShot(templates=[0]).fit(texts())
    for head in (Ridge(prior=parent).fit(images()), Logistic(1.0, prior=parent.linear()).fit(images())):
        kept = head.provenance_["params"]["prior"]
        assert (kept["head"], kept["text_digest"], kept["params"]["templates"]) == ("zero_shot", "text-1", [0])
        assert "texts" in [entry["name"] for entry in head.provenance_["fitted_on"]]


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({}, {}, {"cv": "loo"}),
        ({"cv": 4}, {}, {"cv": 4}),
        ({"cv": np.arange(200) % 3}, {}, {"cv": 3}),
        ({"class_weight": "balanced"}, {}, {"class_weight": "balanced", "weighted": True}),
        ({"class_weight": {1: 2.0}}, {}, {"class_weight": {"1": 2.0}}),
        ({"class_weight": np.arange(1, 6)}, {}, {"class_weight": [1.0, 2.0, 3.0, 4.0, 5.0]}),
        ({}, {"groups": np.arange(200) // 4}, {"groups": 50, "cv": "loo"}),
        ({"cv": 4}, {"groups": np.arange(200) // 4}, {"groups": 50, "cv": 4}),
        ({}, {"sample_weight": np.ones(200)}, {"weighted": True}),
    ],
)
def test_ridge_records_how_it_was_fitted(
    images: Any, settings: dict[str, Any], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    record = Ridge(**settings).fit(images(), **options).provenance_
    assert json.loads(json.dumps(record)) == record
    assert expected.items() <= record["params"].items()
    told = {"class_weight", "groups", "weighted"} & set(record["params"])
    assert told <= set(expected) | ({"weighted"} if settings.get("class_weight") is not None else set())


def test_a_ridge_chosen_on_a_split_names_no_folds(images: Any, val: Any) -> None:
    params = Ridge(cv=4).fit(images(), selection=val).provenance_["params"]
    assert "cv" not in params
    assert params["selection"] == "split"


@pytest.mark.parametrize("absent", [(), (None,), ([],)])
@pytest.mark.parametrize("role", ROLES)
def test_a_record_without_one_role_keeps_the_rows_of_the_other(
    role: str, absent: tuple[Any, ...], tmp_path: Any
) -> None:
    (other,) = set(ROLES) - {role}
    rows = np.array([3, 8], np.uint64)
    record = {other: [SplitRecord({"name": "pets", "split": "train"}, rows)]} | dict(zip([role], absent, strict=False))
    head = LinearHead(np.eye(2, 3), np.zeros(2), ("a", "b"), provenance=Provenance(record))
    again = heads.load(heads.save(head, tmp_path / "head.safetensors")).provenance
    assert again == record
    np.testing.assert_array_equal(again[other][0].rows, rows)
