"""Rows that a head was fitted or chosen on are found in any split, by the content of their images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache import ImageStore, encode_dataset
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoders.callables import CallableEncoder
from featcache.errors import HeadError
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features
from heads import (
    KNN,
    LinearHead,
    Logistic,
    Material,
    Ridge,
    RidgeRegression,
    RowStream,
    blend,
    calibrate,
    choose,
    compare,
    evaluate,
    few_shot,
    fit_head,
    grouped,
    interpolate,
    judge,
    load,
    resident,
    stack,
    unseen,
)
from heads.evaluation.seen import names_only

ENCODER = CallableEncoder(lambda images: images.reshape(len(images), -1) / 255.0, 27, digest="pixels of 3 x 3")
CLASSES = ("ant", "bee")
POOL = 60


class Pool:
    """Images of two classes, of which splits are written in different forms, and encoded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0
        rng = np.random.default_rng(0)
        (folder / "pool").mkdir()
        for i in range(POOL):
            pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            pixels[..., i % 2] //= 3  # so that classes can be told apart
            Image.fromarray(pixels).save(folder / "pool" / f"{i:03d}.png")

    @cached_property
    def other(self) -> ImageStore:
        """Images that are never evaluated on."""
        return self.store(range(54, POOL), name="other")

    def image(self, i: int) -> Path:
        return self.folder / "pool" / f"{i:03d}.png"

    def store(self, rows: Sequence[int], form: str = "list", name: str = "pets", split: str = "train") -> ImageStore:
        """The images of these numbers as a list, as a re-saved list of links elsewhere, or as folders by class."""
        self.made += 1
        place = self.folder / f"{form}-{self.made}"
        place.mkdir()
        if form == "list":
            lines = [f"pool/{i:03d}.png\t{CLASSES[i % 2]}" for i in rows]
            (place / "list.txt").write_text("\n".join(lines), encoding="utf-8")
            source = f"list:{place}/list.txt,root={self.folder}"
        elif form == "renamed list":
            for number, i in enumerate(rows):
                (place / f"IMG_{number}.png").write_bytes(self.image(i).read_bytes())
            lines = [f"IMG_{number}.png\t{CLASSES[i % 2]}" for number, i in enumerate(rows)]
            (place / "list.txt").write_text("# saved again\n" + "\n".join(lines), encoding="utf-8")
            source = f"list:{place}/list.txt"
        else:
            for number, i in enumerate(rows):
                target = place / split / CLASSES[i % 2] / f"x{number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.image(i).read_bytes())
            source = f"imagefolder:{place}"
        dataset = open_dataset(source, split, name=name)
        return encode_dataset(dataset, ENCODER, root=place / "cache").store


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(tmp_path_factory.mktemp("pool"))


def both_classes(rows: np.ndarray) -> list[int]:
    """Rows with two of each class, so that every head fits."""
    return list(dict.fromkeys([0, 1, 2, 3, *rows.tolist()]))


def _plain(train: Any, other: Any, folder: Path) -> Any:
    return Ridge([1.0]).fit(train).frozen()


def _saved(train: Any, other: Any, folder: Path) -> Any:
    return load(Ridge([1.0]).fit(train).save(folder / "head"))


def _interpolated(train: Any, other: Any, folder: Path) -> Any:
    return interpolate(Ridge([1.0]).fit(other), _saved(train, other, folder), [0.5])[0]


def _ensembled(train: Any, other: Any, folder: Path) -> Any:
    both = blend([Ridge([1.0]).fit(train), Ridge([1.0]).fit(other)])
    return load(both.save(folder / "head"))


def _begun(train: Any, other: Any, folder: Path) -> Any:
    return Ridge([1.0], prior=Ridge([1.0]).fit(train).frozen()).fit(other).frozen()


def _calibrated(train: Any, other: Any, folder: Path) -> Any:
    return load(calibrate(Ridge([1.0]).fit(other), train).save(folder / "head"))


def _chosen(train: Any, other: Any, folder: Path) -> Any:
    return choose(Ridge([0.1, 1.0]).fit(other).path_heads(), train)


def _selected(train: Any, other: Any, folder: Path) -> Any:
    return KNN([1, 3]).fit(other, selection=train).frozen()


MADE: list[Callable[[Any, Any, Path], Any]] = [
    _plain, _saved, _interpolated, _ensembled, _begun, _calibrated, _chosen, _selected,
]  # fmt: skip


def drawn_case(pool: Pool, number: int, overlap: bool, folder: Path) -> tuple[Any, ImageStore, int]:
    """A head that has seen a drawn split, another drawn split, and how many of its rows the head has seen."""
    rng = np.random.default_rng([number, overlap])
    order = rng.permutation(np.arange(4, 52))
    train = both_classes(order[: rng.integers(4, 24)])
    test = [52, 53, *order[24 : 24 + rng.integers(0, 24)].tolist()]
    if overlap:
        seen_before = rng.choice(train, rng.integers(1, len(train)), replace=False).tolist()
        test = [*test, *seen_before] if rng.random() < 0.8 else both_classes(np.array(seen_before))
    rng.shuffle(test)
    forms = rng.choice(["list", "renamed list", "folders"], 2)
    names = [("pets", "train"), ("pets", "test"), ("holdout", "train"), ("clean", "val")]
    first, second = rng.choice(len(names), 2, replace=not overlap)
    seen = pool.store(train, forms[0], *names[first])
    head = MADE[number % len(MADE)](seen, pool.other, folder)
    return head, pool.store(test, forms[1], *names[second]), len(set(train) & set(test))


def check_cases(pool: Pool, numbers: range, folder: Path) -> None:
    for number in numbers:
        head, test, count = drawn_case(pool, number, True, folder)
        with pytest.raises(HeadError, match=rf"^{count:,} of the {len(test):,} rows of {test.name}/{test.split} "):
            evaluate([head], [test])
        if count == len(test):
            with pytest.raises(HeadError, match="none remains"):
                evaluate([head], [test], seen="exclude")
        else:
            (row,) = evaluate([head], [test], seen="exclude")
            assert row[f"{test.name}:n_excluded"] == count
        head, test, count = drawn_case(pool, number, False, folder)
        assert count == 0
        (row,) = evaluate([head], [test], seen="exclude")
        assert row[f"{test.name}:n_excluded"] == 0
        assert evaluate([head], [test])[0][f"{test.name}:nll"] == row[f"{test.name}:nll"]


def test_drawn_overlaps_are_refused_or_counted_and_disjoint_splits_pass(pool: Pool, tmp_path: Path) -> None:
    check_cases(pool, range(len(MADE)), tmp_path)


@pytest.mark.nightly
def test_two_hundred_drawn_overlaps_and_as_many_disjoint_splits(pool: Pool, tmp_path: Path) -> None:
    check_cases(pool, range(len(MADE), 200), tmp_path)


@pytest.fixture(scope="module")
def splits(pool: Pool) -> dict[str, ImageStore]:
    return {
        "train": pool.store(range(20)),
        "mixed": pool.store([30, 3, 31, 7, 32, 33], "renamed list", "clean", "test"),
        "test": pool.store(range(40, 52), "folders", split="test"),
    }


def test_unseen_rows_are_evaluated_like_a_split_of_their_own(splits: dict[str, ImageStore], pool: Pool) -> None:
    head = Ridge([1.0]).fit(splits["train"]).frozen()
    judged = judge([head], [splits["mixed"]], seen="exclude", per_sample=True)
    (wanted,) = evaluate([head], [pool.store([30, 31, 32, 33], name="clean", split="test")])
    for metric in ("top1", "nll", "ece"):
        assert judged.rows[0][f"clean:{metric}"] == wanted[f"clean:{metric}"]
    assert judged.samples["clean"].rows.tolist() == [0, 2, 4, 5]
    assert unseen(splits["mixed"], head).sample == {"excluded": 2}
    assert unseen(splits["mixed"], splits["train"]).labels.tolist() == [0, 1, 0, 1]
    assert unseen(splits["test"], head, splits["train"]) is splits["test"]


def test_all_heads_are_judged_on_the_rows_that_none_has_seen(splits: dict[str, ImageStore], pool: Pool) -> None:
    heads = [Ridge([1.0]).fit(splits["train"]), Ridge([1.0]).fit(pool.store([0, 1, 2, 5, 31, 32], name="more"))]
    rows = evaluate(heads, [splits["mixed"]], seen="exclude")
    assert [row["clean:n_excluded"] for row in rows] == [4, 4]  # 3, 7 and 31, 32
    (record,) = compare(heads[0], heads[1], [splits["mixed"]], seen="exclude", draws=20)
    assert (record["n"], record["n_excluded"]) == (2, 4)
    with pytest.raises(HeadError, match="2 of the 6 rows"):
        compare(heads[0], heads[1], [splits["mixed"]])


def test_the_training_split_under_its_own_name_gives_figures_of_training_rows(splits: dict[str, ImageStore]) -> None:
    head = Ridge([1.0]).fit(splits["train"])
    (row,) = evaluate([head], [splits["train"]])
    assert row["fitted_on"][0]["split"] == "train"
    sample = few_shot(splits["train"], 2)
    (row,) = evaluate([Ridge([1.0]).fit(sample)], [splits["train"]], seen="exclude")
    assert row["pets:n_excluded"] == 4  # two shots of two classes; the others are held out
    with pytest.raises(HeadError, match="none remains"):
        evaluate([head], [splits["train"]], seen="exclude")
    renamed = replace(resident(splits["train"], "cpu"), name="clean")
    with pytest.raises(HeadError, match="20 of the 20 rows of clean/train"):
        evaluate([head], [renamed])
    assert evaluate([head], [renamed], seen="allow")
    with pytest.raises(HeadError, match="seen is 'ignore', expected one of refuse, exclude, allow"):
        evaluate([head], [renamed], seen="ignore")


def test_choices_are_not_made_on_training_rows(splits: dict[str, ImageStore]) -> None:
    fitted, mixed = Ridge([0.1, 1.0]).fit(splits["train"]), splits["mixed"]
    for refused in (
        lambda: choose(fitted.path_heads(), mixed),
        lambda: calibrate(fitted, mixed),
        lambda: stack([fitted], mixed),
    ):
        with pytest.raises(HeadError, match="2 of the 6 rows of clean/test are among those of pets/train"):
            refused()
    with pytest.raises(HeadError, match=r"2 of the 6 rows of the selection split clean/test are training rows"):
        Ridge().fit(splits["train"], selection=mixed)
    best = choose(fitted.path_heads(), mixed, seen="exclude")
    assert best.provenance.chosen_on[-1]["sample"] == {"excluded": 2}
    rest = unseen(mixed, splits["train"])
    assert Ridge([0.1, 1.0]).fit(splits["train"], selection=rest).provenance_.chosen_on[0]["sample"] == {"excluded": 2}
    assert choose([best], mixed, seen="exclude")  # what was chosen on may choose again


def test_a_group_that_a_fit_held_out_together_counts_as_seen(splits: dict[str, ImageStore], tmp_path: Path) -> None:
    train, test = (resident(splits[name], "cpu") for name in ("train", "test"))
    train = replace(train, metadata={"year": np.arange(20) % 2, "patient": np.array([f"p{i // 4}" for i in range(20)])})
    patients = np.array(["p1", "p9", "p4", *["p7"] * 9], object)
    test = replace(test, metadata={"patient": patients}, split="test")
    head = load(Ridge([1.0]).fit(train, groups=train.metadata["patient"]).save(tmp_path / "head"))
    assert head.provenance.fitted_on[0]["grouped_by"] == "patient"
    with pytest.raises(HeadError, match=r"2 of the 12 rows.*or share a patient with them"):
        evaluate([head], [test])
    assert evaluate([head], [test], seen="exclude")[0]["pets:n_excluded"] == 2
    assert evaluate([Ridge([1.0]).fit(train)], [test])  # nothing was grouped
    regression = RidgeRegression([1.0]).fit(train, np.arange(20.0), groups=train.metadata["patient"])
    kept = RidgeRegression.load(regression.save(tmp_path / "regression")).provenance_.fitted_on[0]
    assert kept["grouped_by"] == "patient"
    assert len(kept.rows) == 20 + 5


def test_a_grouped_store_is_held_out_refused_and_excluded_by_group(
    splits: dict[str, ImageStore], pool: Pool, tmp_path: Path
) -> None:
    names = np.array([f"p{i // 4}" for i in range(20)], object)
    train, test = (resident(splits[name], "cpu") for name in ("train", "test"))
    train = replace(train, metadata={"patient": names})
    test = replace(test, metadata={"patient": np.array(["p1", "p9", "p4", *["p7"] * 9], object)}, split="test")
    ridge = Ridge([0.1, 1.0]).fit(train, groups=names)
    found = fit_head("ridge", Material(grouped(train, "patient")), {"alphas": [0.1, 1.0]})
    np.testing.assert_array_equal(found.frozen().weights, ridge.frozen().weights)
    with pytest.raises(HeadError, match="give a selection split"):
        fit_head("logistic", Material(grouped(train, "patient")))
    with pytest.raises(HeadError, match=r"2 of the 12 rows of the selection .*, or share a patient with them"):
        fit_head("logistic", Material(grouped(train, "patient"), selection=test), {"C": [1.0]})
    val = unseen(test, grouped(train, "patient"))
    chosen = Logistic([1.0, 2.0]).fit(grouped(train, "patient"), selection=grouped(val, "patient"))
    head = load(chosen.save(tmp_path / "head"))
    for role in ("fitted_on", "chosen_on"):
        assert [entry["grouped_by"] for entry in head.provenance[role]] == ["patient"]
    other = resident(pool.store(range(20, 32), split="test"), "cpu")
    other = replace(other, metadata={"patient": np.array(["p7", "p2", *[f"q{i}" for i in range(10)]], object)})
    with pytest.raises(HeadError, match=r"1 of the 12 rows .*share a patient"):
        evaluate([head], [other])
    assert evaluate([head], [other], seen="exclude")[0]["pets:n_excluded"] == 2
    with pytest.raises(HeadError, match="no metadata column 'ward'; it has patient"):
        grouped(train, "ward")


@pytest.mark.parametrize("kind", [Ridge, Logistic])
def test_groups_are_recorded_with_standardised_features(splits: dict[str, ImageStore], kind: Any) -> None:
    patients = {"patient": np.array([f"p{i // 4}" for i in range(20)], object)}
    train, test = (resident(splits[name], "cpu") for name in ("train", "test"))
    rows = grouped(replace(train, metadata=patients), "patient")
    later = replace(test, metadata={"patient": np.array(["p1", *["p9"] * 11], object)}, split="test")
    (plain, scaled) = (kind([1.0], standardise=how).fit(rows, selection=test).provenance_ for how in (False, True))
    assert plain.fitted_on == scaled.fitted_on
    np.testing.assert_array_equal(plain.fitted_on[0].rows, scaled.fitted_on[0].rows)
    with pytest.raises(HeadError, match=r"1 of the 12 rows.*or share a patient with them"):
        evaluate([kind([1.0], standardise=True).fit(rows, selection=test)], [later], allow_chosen=True)


def test_equal_sets_are_kept_once_in_a_file_and_older_files_fall_back_to_names(
    splits: dict[str, ImageStore], tmp_path: Path
) -> None:
    from safetensors import safe_open

    one = Ridge([1.0]).fit(splits["train"])
    two = Ridge([1.0], prior=one).fit(splits["test"])
    path = calibrate(blend([one, two]), unseen(splits["mixed"], one)).save(tmp_path / "head")
    with safe_open(str(path), framework="np") as file:
        seen = {key: file.get_tensor(key) for key in file.keys() if key.startswith("seen.")}  # noqa: SIM118
        record = json.loads(file.metadata()["head"])
    assert [len(rows) for rows in seen.values()] == [20, 12, 4]
    assert record["seen"] == {"fitted_on": [0, 1], "chosen_on": [2]}
    assert all(rows.dtype == np.uint64 and (np.diff(rows) > 0).all() for rows in seen.values())
    wanted = np.unique(splits["train"].array("content")[:, :8].copy().view("<u8"))
    np.testing.assert_array_equal(next(iter(seen.values())), wanted)
    head = one.frozen()
    names = {**head.provenance, "fitted_on": [dict(head.provenance.fitted_on[0])]}
    older = LinearHead(head.weights, head.bias, head.classnames, "older", names)
    assert names_only(older, splits["mixed"]) == ["pets/train"]
    assert names_only(head, splits["mixed"]) == []
    assert evaluate([older], [splits["mixed"]])  # nothing but names to go by
    with pytest.raises(HeadError, match="it is not known on which rows"):
        evaluate([older], [splits["train"]], seen="exclude")


def test_a_stream_carries_the_hashes_that_it_is_given(splits: dict[str, ImageStore]) -> None:
    train = splits["train"]
    stream = RowStream(train.blocks, train.dim, CLASSES, encoder_key=train.encoder_key, row_hashes=train.row_hashes)
    head = Ridge().fit(stream)
    renamed = replace(resident(train, "cpu"), name="other", split="test", dataset_key="other")
    with pytest.raises(HeadError, match=f"{len(train)} of the {len(train)} rows of other/test"):
        evaluate([head], [renamed])
    evaluate([Ridge().fit(replace(stream, row_hashes=None))], [renamed])  # nothing is known of the rows


def test_imported_features_are_known_by_their_values(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    labels = np.arange(30) % 2

    def made(rows: Any, name: str) -> ImageStore:
        return import_features(Foreign(X[rows], labels[rows]), Source("m"), name=name, root=tmp_path)

    with pytest.raises(HeadError, match="5 of the 15 rows of b/train"):
        evaluate([Ridge([1.0]).fit(made(np.arange(20), "a"))], [made(np.arange(29, 14, -1), "b")])


def test_the_command_line_refuses_excludes_and_allows(
    splits: dict[str, ImageStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train, mixed, test = (str(splits[name].path) for name in ("train", "mixed", "test"))
    assert main(["fit", "ridge", train, "-o", "a.safetensors", "--select", mixed]) == 2
    assert "--exclude-seen leaves these out" in capsys.readouterr().err
    assert main(["fit", "ridge", train, "-o", "a.safetensors", "--select", mixed, "--exclude-seen"]) == 0
    assert main(["fit", "ridge", test, "-o", "b.safetensors"]) == 0
    evaluated = ["evaluate", "a.safetensors", "--on", mixed]
    assert main(evaluated) == 2
    assert main(["compare", "a.safetensors", "b.safetensors", mixed]) == 2
    assert main([*evaluated, "--allow-seen"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "b.safetensors", "--on", mixed, train, "--exclude-seen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["clean:n_excluded"] == 0
