"""Sweeps: every job once, resumed after any stop, equal to fits by hand, picks from the selection split alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError
from heads.sweeps.forecast import forecast_sweep
from heads.sweeps.plan import PAPERS, HeadGrid, Splits, SweepPlan, read_plan
from heads.sweeps.run import run_sweep
from heads.sweeps.summary import Summary, picks, summarise, sweep_table

SPLITS = Splits("animals/train", ("animals/test", "noisy/test"), "animals/val", ("texts/animals",))


@pytest.fixture
def stores(images: Any, texts: Any) -> dict[str, Any]:
    return {
        "animals/train": images(),
        "animals/val": images(seed=1, split="val", dataset_key="data-2", labels_digest="labels-2"),
        "animals/test": images(seed=2, split="test", dataset_key="data-3", labels_digest="labels-3"),
        "noisy/test": images(seed=3, name="noisy", split="test", noise=0.5, dataset_key="data-4"),
        "texts/animals": texts(),
    }


def plan_of(*grids: HeadGrid, **fields: Any) -> SweepPlan:
    return SweepPlan(grids, (SPLITS,), **fields)


def test_one_row_per_fit_equal_to_the_fit_by_hand(stores: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(
        HeadGrid("ridge", grid={"alphas": [[0.1], [10.0]]}), HeadGrid("zero_shot"), shots=(4, None), seeds=(0, 1)
    )
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    assert [(row["head"], row["shots"], row["seed"]) for row in rows] == [
        *[("ridge", 4, 0), ("ridge", 4, 1), ("ridge", None, 0)] * 2,
        ("zero_shot", None, 0),
    ]
    drawn = heads.few_shot(stores["animals/train"], 4, 1)
    by_hand = heads.Ridge(alphas=[10.0]).fit(drawn, selection=stores["animals/val"])
    (expected,) = heads.evaluate([by_hand], [stores["animals/test"], stores["noisy/test"]])
    assert {key: rows[4][key] for key in expected} == expected
    assert rows[4]["select:top1"] == by_hand.score(stores["animals/val"])
    assert [json.loads(line)["sweep"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [
        row["sweep"] for row in rows
    ]


def test_a_killed_sweep_resumes_where_it_stopped(stores: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(HeadGrid("ridge"), HeadGrid("nearest_mean"), shots=(2, 4), seeds=(0, 1))
    whole = run_sweep(plan, stores.__getitem__, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # the fourth row was being written
    said: list[str] = []
    again = run_sweep(plan, stores.__getitem__, tmp_path / "cut.jsonl", said.append)
    assert sum("done before" in line for line in said) == 3
    drop = {"fit_seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in json.loads(json.dumps(row)).items() if k not in drop} for row in whole
    ]
    assert run_sweep(plan, stores.__getitem__, tmp_path / "cut.jsonl") == run_sweep(
        plan, stores.__getitem__, tmp_path / "cut.jsonl"
    )


def test_other_data_labels_or_settings_are_other_jobs(stores: dict[str, Any], tmp_path: Path) -> None:
    plan, results = plan_of(HeadGrid("ridge")), tmp_path / "r.jsonl"
    first = run_sweep(plan, stores.__getitem__, results)[0]["sweep"]
    relabelled = {**stores, "animals/train": replace(stores["animals/train"], labels_digest="labels-9")}
    other = run_sweep(plan, relabelled.__getitem__, results)[0]["sweep"]
    fixed = run_sweep(plan_of(HeadGrid("ridge", {"alphas": [1.0]})), stores.__getitem__, results)[0]["sweep"]
    assert len({first, other, fixed}) == 3
    assert run_sweep(plan, stores.__getitem__, results)[0]["sweep"] == first


def test_files_that_were_edited_and_encoded_again_are_other_jobs(stores: dict[str, Any], tmp_path: Path) -> None:
    """Both keys stay what they were: the names and sizes are the same."""
    plan, results, train = plan_of(HeadGrid("nearest_mean")), tmp_path / "r.jsonl", stores["animals/train"]
    train.row_hashes = np.arange(len(train), dtype=np.uint64)
    edited = replace(train, X=-train.X)
    edited.row_hashes = train.row_hashes + np.uint64(10**6)
    first = run_sweep(plan, stores.__getitem__, results)[0]
    second = run_sweep(plan, {**stores, "animals/train": edited}.__getitem__, results)[0]
    assert second["animals:top1"] < 0.1 < first["animals:top1"]


def test_other_prompts_under_one_text_tower_are_other_jobs(stores: dict[str, Any], tmp_path: Path) -> None:
    plan, results = plan_of(HeadGrid("zero_shot")), tmp_path / "r.jsonl"
    first = run_sweep(plan, stores.__getitem__, results)
    texts = stores["texts/animals"]
    assert texts.text_key == replace(texts, raw=texts.raw[::-1]).text_key
    other = run_sweep(plan, {**stores, "texts/animals": replace(texts, raw=texts.raw[::-1])}.__getitem__, results)
    assert other[0]["animals:top1"] != first[0]["animals:top1"]
    assert run_sweep(plan, stores.__getitem__, results) == first


def test_the_best_interpolation_is_chosen_on_the_selection_split(stores: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(HeadGrid("ridge"), alphas=(0.0, 0.5, 1.0))
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    assert [row["head"] for row in rows] == ["ridge", "zero_shot+ridge"]
    path = heads.interpolate(
        heads.ZeroShot().fit(stores["texts/animals"]),
        heads.Ridge().fit(stores["animals/train"], selection=stores["animals/val"]),
        plan.alphas,
    )
    assert rows[1]["alpha"] == heads.choose(path, stores["animals/val"]).alpha
    assert rows[1]["chosen_on"][-1]["split"] == "val"


def test_the_selection_split_of_few_shots_is_drawn_too(stores: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(HeadGrid("ridge"), shots=(2, 8), seeds=(1,), select_shots=4)
    few, more = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    for row, k, s in ((few, 2, 2), (more, 8, 4)):
        train, select = heads.few_shot(stores["animals/train"], k, 1), heads.few_shot(stores["animals/val"], s, 1)
        by_hand = heads.Ridge().fit(train, selection=select)
        assert row["params"]["alpha"] == by_hand.alpha_
        assert row["select:top1"] == by_hand.score(select)
    whole = run_sweep(replace(plan, select_shots=None), stores.__getitem__, tmp_path / "r.jsonl")
    assert {row["sweep"] for row in whole}.isdisjoint({few["sweep"], more["sweep"]})


def test_weights_shrink_to_the_zero_shot_head_of_the_texts(stores: dict[str, Any], tmp_path: Path) -> None:
    priors = {"prior": ["zero", "texts"]}
    plan = plan_of(HeadGrid("ridge", grid=priors), HeadGrid("logistic", {"C": 0.01}, priors), shots=(2,), seeds=(1,))
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    assert [row["setting"]["prior"] for row in rows] == ["zero", "texts"] * 2
    drawn, zero_shot = heads.few_shot(stores["animals/train"], 2, 1), heads.ZeroShot().fit(stores["texts/animals"])
    for row, head in zip(
        rows,
        (heads.Ridge(), heads.Ridge(prior=zero_shot), heads.Logistic(0.01), heads.Logistic(0.01, prior=zero_shot)),
        strict=True,
    ):
        (expected,) = heads.evaluate([head.fit(drawn, selection=stores["animals/val"])], [stores["noisy/test"]])
        assert row["noisy:nll"] == expected["noisy:nll"]
    assert rows[0]["noisy:nll"] != rows[1]["noisy:nll"]
    assert [(row["params"].get("prior") or {}).get("head") for row in rows] == [None, "zero_shot"] * 2
    assert len({row["sweep"] for row in rows}) == 4
    plain = run_sweep(plan_of(HeadGrid("ridge"), shots=(2,), seeds=(1,)), stores.__getitem__, tmp_path / "r.jsonl")
    assert plain[0]["noisy:nll"] == rows[0]["noisy:nll"]  # "zero" is what there is without a prior


def test_classes_with_fewer_rows_than_the_shots_give_what_they_have(stores: dict[str, Any], tmp_path: Path) -> None:
    train, val = stores["animals/train"], stores["animals/val"]
    last = [np.flatnonzero(store.y == 4)[3:] for store in (train, val)]  # three rows of one class remain
    few = {
        name: replace(store, X=np.delete(store.X, gone, axis=0), y=np.delete(store.y, gone))
        for name, store, gone in zip(("animals/train", "animals/val"), (train, val), last, strict=True)
    }
    opened = {**stores, **few}
    plan = plan_of(HeadGrid("ridge"), shots=(2, 8, None), select_shots=4)
    with pytest.raises(HeadError, match="class 4 has 3"):
        run_sweep(plan, opened.__getitem__, tmp_path / "strict.jsonl")
    strict = [json.loads(line) for line in (tmp_path / "strict.jsonl").read_text().splitlines()]
    rows = run_sweep(replace(plan, allow_fewer=True), opened.__getitem__, tmp_path / "r.jsonl")
    assert [(row["shots"], row.get("train_rows"), row.get("select_rows")) for row in rows] == [
        (2, 10, 10),
        (8, 4 * 8 + 3, 4 * 4 + 3),
        (None, None, None),
    ]
    drawn = heads.few_shot(few["animals/train"], 8, 0, allow_fewer=True)
    by_hand = heads.Ridge().fit(drawn, selection=heads.few_shot(few["animals/val"], 4, 0, allow_fewer=True))
    (expected,) = heads.evaluate([by_hand], [stores["animals/test"], stores["noisy/test"]])
    assert {key: rows[1][key] for key in expected} == expected
    assert rows[1]["fitted_on"][0]["sample"] == {"shots": 8, "seed": 0, "rows": 35}
    assert strict[0]["sweep"] != rows[0]["sweep"]  # the switch belongs to the job where rows are drawn
    again = run_sweep(replace(plan, shots=(None,)), opened.__getitem__, tmp_path / "r.jsonl")
    assert again == rows[2:]  # and all rows are all rows


def test_without_a_selection_split_alpha_is_chosen_by_folds_of_train(stores: dict[str, Any], tmp_path: Path) -> None:
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    splits = replace(SPLITS, select=None)
    plan = SweepPlan(
        (HeadGrid("ridge"), HeadGrid("lp_plus_plus", {"steps": 5}), HeadGrid("knn")),
        (splits,),
        shots=(4,),
        alphas=alphas,
        metric="nll",
    )
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    linear = ("ridge", "lp_plus_plus")
    assert [row["head"] for row in rows] == [*(f"{of}{name}" for name in linear for of in ("", "zero_shot+")), "knn"]
    drawn, zero_shot = heads.few_shot(stores["animals/train"], 4), heads.ZeroShot().fit(stores["texts/animals"])
    ridge = heads.Ridge([heads.Ridge().fit(drawn).alpha_])
    by_hand = heads.interpolate_by_folds(zero_shot, ridge, drawn, alphas=alphas, metric="nll")
    (expected,) = heads.evaluate([by_hand], [stores["animals/test"], stores["noisy/test"]])
    assert {key: rows[1][key] for key in expected} == expected
    assert (rows[1]["params"]["selection"], rows[1]["params"]["metric"], rows[1]["chosen_on"]) == ("folds", "nll", [])
    (one,) = run_sweep(replace(plan, heads=plan.heads[:1], shots=(1,)), stores.__getitem__, tmp_path / "r.jsonl")[1:]
    assert (one["alpha"], one["params"]["selection"]) == (0.5, "paper")  # one row per class: nothing to hold out


def test_picks_look_at_the_selection_split_and_never_at_the_test(stores: dict[str, Any]) -> None:
    base = {"data": "d", "model": None, "head": "ridge", "shots": None, "seed": 0}
    rows = [
        {**base, "setting": {"a": 1}, "select:top1": 0.9, "t:top1": 0.1},
        {**base, "setting": {"a": 2}, "select:top1": 0.8, "t:top1": 0.99},
    ]
    (picked,) = picks(summarise(rows), "top1")
    assert picked.setting == {"a": 1}
    (by_loss,) = picks(summarise([{**row, "select:nll": row["select:top1"]} for row in rows]), "nll")
    assert by_loss.setting == {"a": 2}
    assert len(picks(summarise([{**row, "select:top1": None} for row in rows]), "top1")) == 2


OF_PAPERS = {
    "flyp": HeadGrid("logistic", {"C": [0.01, 1.0, 100.0]}),
    "lp++": HeadGrid("lp_plus_plus", {"steps": 10}),
    "regft": HeadGrid("ridge"),
    "tip-adapter": HeadGrid("tip_adapter", {"alphas": [1.0, 5.0], "betas": [1.0, 5.5]}),
}


@pytest.mark.parametrize("paper", sorted(PAPERS))
def test_a_paper_that_chooses_on_test_is_followed_only_by_name(
    stores: dict[str, Any], tmp_path: Path, paper: str
) -> None:
    plan = plan_of(OF_PAPERS[paper], paper=paper, shots=(4,), alphas=(0.0, 0.5, 1.0) if paper == "regft" else ())
    leaking = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["leak"] for row in written] == [PAPERS[paper]] * len(leaking)
    assert all(row["chosen_on"][-1]["split"] == "test" for row in written)
    assert all(row["select:top1"] == row["animals:top1"] for row in written)  # of the very rows that are reported
    honest = run_sweep(replace(plan, paper=None), stores.__getitem__, tmp_path / "r.jsonl")
    assert len(honest) == len(leaking) == (2 if paper == "regft" else 1)
    assert not any("leak" in row for row in honest)
    assert all(row["chosen_on"][-1]["split"] == "val" for row in honest)
    with pytest.raises(HeadError, match="unknown paper"):
        replace(plan, paper="my-paper")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": ()}, "without heads"),
        (
            {"heads": (HeadGrid("zero_shot"),), "data": (Splits("animals/train", ("animals/test",)),)},
            "needs a text store",
        ),
        ({"data": (Splits(None, ("animals/test",)),)}, "name a train store"),
        ({"data": (Splits("animals/train", ()),)}, "nothing to report on"),
        ({"alphas": (0.5,), "data": (Splits("animals/train", ("animals/test",)),)}, "name a text store"),
        (
            {"heads": (HeadGrid("ridge", {"prior": "texts"}),), "data": (replace(SPLITS, texts=()),)},
            "ridge shrinks towards the zero-shot head .* name a text store",
        ),
        ({"shots": (0,)}, "numbers from 1"),
        ({"select_shots": 0}, "numbers from 1"),
    ],
)
def test_plans_that_cannot_run_are_refused_before_anything_is_fitted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        SweepPlan(**{"heads": (HeadGrid("ridge"),), "data": (SPLITS,), **fields})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"name": "rigde"}, "unknown head"),
        ({"name": "ridge", "fixed": {"alpha": 1}}, "has no parameter 'alpha'"),
        ({"name": "ridge", "grid": {"alphas": "ab"}}, "expected a list of values"),
        ({"name": "ridge", "grid": {"alphas": []}}, "expected a list of values"),
        ({"name": "ridge", "fixed": {"prior": "text"}}, "ridge.prior is 'text', expected one of 'zero', 'texts'"),
        ({"name": "knn", "grid": {"prior": ["texts"]}}, "knn takes no prior"),
    ],
)
def test_heads_and_parameters_are_known(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        HeadGrid(**grid)


def test_a_plan_file_and_flags_give_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(
        'shots = [1, "all"]\nseeds = [0, 1]\nmodels = ["tiny"]\nalphas = [0, 0.5]\nselect_metric = "nll"\n'
        "allow_fewer = true\n"
        '[[data]]\ntrain = "a/train"\nselect = "a/val"\non = "a/test"\ntexts = ["texts/a"]\n'
        '[[head]]\nname = "logistic"\nset = { fit_intercept = true }\n'
        'grid = { C = [0.1, 1.0], prior = ["zero", "texts"] }\n'
        '[[head]]\nname = "zero_shot"\n'
    )
    assert read_plan(tmp_path / "sweep.toml") == SweepPlan(
        (
            HeadGrid("logistic", {"fit_intercept": True}, {"C": [0.1, 1.0], "prior": ["zero", "texts"]}),
            HeadGrid("zero_shot"),
        ),
        (Splits("a/train", ("a/test",), "a/val", ("texts/a",)),),
        ("tiny",),
        (1, None),
        (0, 1),
        (0.0, 0.5),
        "nll",
        allow_fewer=True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shots = [", "cannot be read"),
        ("shoots = [1]", "unknown key 'shoots'"),
        ('[[head]]\nname = "ridge"\nparams = {}', "unknown key 'params'"),
        ('[[head]]\nname = "ridge"\n[[data]]\ntrain = "a"\non = "b"\nx = 1', "unknown key 'x'"),
        (
            'shots = ["few"]\n[[head]]\nname = "ridge"\n[[data]]\ntrain = "a"\non = "b"',
            "shots is .*, expected a",
        ),
        ("head = 3", "head is 3, expected a list of"),
        ("allow_fewer = 1", "allow_fewer is 1, expected true or false"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(HeadError, match=message):
        read_plan(tmp_path / "sweep.toml")


def test_the_table_shows_mean_and_spread(stores: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(HeadGrid("ridge"), shots=(2,), seeds=(0, 1, 2))
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    values = 100 * np.array([row["noisy:top1"] for row in rows])
    line = next(line for line in sweep_table(summarise(rows)).splitlines() if "ridge" in line)
    assert f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" in line


def test_the_table_fits_and_leaves_out_what_all_settings_share() -> None:
    means = {f"{name}:top1": 0.5 + k / 100 for k, name in enumerate(("clean", "fog", "a-much-longer-name"))}
    found = [Summary("pets/train@tiny", None, "ridge", {}, k, 1, means, dict.fromkeys(means)) for k in (4, 16)]
    assert sweep_table(found, ["top1"], width=30).splitlines() == [
        *("Accuracy, %", ""),
        *("head   shots  clean   fog", "ridge  4       50.0  51.0", "ridge  16      50.0  51.0", ""),
        *("head   shots  a-much-longer-name", "ridge  4                    52.0", "ridge  16                   52.0"),
    ]


def test_multi_label_heads_are_picked_by_map_and_the_table_shows_it(tagged: Any, tmp_path: Path) -> None:
    stores = {
        "animals/train": tagged(noise=0.8),
        "animals/val": tagged(seed=1, noise=0.8, split="val", dataset_key="data-2"),
        "animals/test": tagged(seed=2, noise=0.8, split="test", dataset_key="data-3"),
    }
    splits = (Splits("animals/train", ("animals/test",), "animals/val"),)
    alphas = [[0.01], [1e4]]
    plan = SweepPlan((HeadGrid("multilabel_ridge", grid={"alphas": alphas}),), splits)
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    wanted = []
    for (alpha,) in alphas:
        head = heads.MultiLabelRidge([alpha]).fit(stores["animals/train"], selection=stores["animals/val"])
        (row,) = heads.evaluate([head], [stores["animals/val"]], allow_chosen=True)
        wanted.append(row["animals:map_macro"])
    assert [row["select:map_macro"] for row in rows] == wanted
    (pick,) = picks(summarise(rows), plan.picked_by)
    assert pick.setting == {"alphas": alphas[int(np.argmax(wanted))]}
    assert replace(plan, metric="nll").picked_by == "binary_nll"
    with pytest.raises(HeadError, match="top1 is not a metric of multi-label heads"):
        replace(plan, metric="top1")
    with pytest.raises(HeadError, match="a sweep of multi-label and single-label heads"):
        replace(plan, heads=(HeadGrid("ridge"), HeadGrid("multilabel_ridge")))


def test_multi_label_heads_are_swept_over_shots(tagged: Any, tmp_path: Path) -> None:
    stores = {
        split: tagged(seed=seed, split=split, dataset_key=split) for seed, split in enumerate(("train", "val", "test"))
    }
    grid, splits = HeadGrid("multilabel_ridge"), (Splits("train", ("test",), "val"),)
    plan = SweepPlan((grid,), splits, shots=(2, 8), seeds=(0, 1), select_shots=4)
    rows = run_sweep(plan, stores.__getitem__, tmp_path / "r.jsonl")
    assert [(row["shots"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (8, 0), (8, 1)]
    for row in rows:
        sample = heads.few_shot(stores["train"], row["shots"], row["seed"])
        assert row["train_rows"] == len(sample) <= row["shots"] * 5
        select = heads.few_shot(stores["val"], min(4, row["shots"]), row["seed"])
        fitted = heads.MultiLabelRidge().fit(sample, selection=select)
        (alone,) = heads.evaluate([fitted], [stores["test"]])
        assert row["animals:map_macro"] == alone["animals:map_macro"]


def test_a_forecast_matches_the_run(stores: dict[str, Any], tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    grids = (HeadGrid("ridge", grid={"alphas": [[0.1], [10.0]]}), HeadGrid("zero_shot"))
    run_sweep(plan_of(*grids, seeds=(0,), shots=(4,), alphas=(0.0, 0.5)), stores.__getitem__, results)
    before = results.read_bytes()
    plan = plan_of(*grids, seeds=(0, 1), shots=(4, None), alphas=(0.0, 0.5))
    said = forecast_sweep(plan, stores.__getitem__, results)
    assert results.read_bytes() == before
    assert (said.fits, said.done, said.to_fit) == (7, 3, {"ridge": 4})
    images = ("animals/train", "animals/val", "animals/test", "noisy/test")
    assert said.bytes_to_read == sum(stores[name].numpy(np.float16)[0].nbytes for name in images)
    run_sweep(plan, stores.__getitem__, results)
    written = results.read_bytes()[len(before) :]
    assert said.rows_to_write == written.count(b"\n")
    assert said.bytes_to_write == pytest.approx(len(written), rel=0.2)
    assert said.seconds is not None
    assert said.seconds > 0
    done = forecast_sweep(plan, stores.__getitem__, results)
    assert (done.done, done.to_fit, done.bytes_to_read, done.seconds) == (7, {}, 0, 0)


def test_a_forecast_of_multi_label_heads_takes_evenly_spaced_rows(tagged: Any, tmp_path: Path) -> None:
    plan = SweepPlan((HeadGrid("multilabel_ridge"),), (Splits("train", ("test",), "val"),))
    held = {
        split: tagged(seed=seed, split=split, dataset_key=split) for seed, split in enumerate(("train", "val", "test"))
    }
    said = forecast_sweep(plan, held.__getitem__, tmp_path / "none.jsonl")
    assert (said.fits, said.to_fit, said.rows_to_write) == (1, {"multilabel_ridge": 1}, 1)
    assert said.seconds is not None
