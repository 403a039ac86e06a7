"""Recall@k against a plain numpy ranking of all pairs; ties, several captions, and what is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyDataset, NumpyEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache.cli.main import main
from featcache.datasets import SampleIndex
from featcache.encoding.texts import embed_prompts
from featcache.errors import FeatcacheWarning, HeadError, MismatchError
from heads.evaluation.retrieval import captions_of, retrieval_ranks, retrieve


def by_sorting(images: np.ndarray, captions: np.ndarray, owners: np.ndarray) -> tuple[list[int], list[int]]:
    """Sort everything by similarity, stable, and look where the right ones stand."""
    s = images.astype(np.float64) @ captions.astype(np.float64).T
    of_images = []
    for i, row in enumerate(s):
        right = [place for place, j in enumerate(np.argsort(-row, kind="stable")) if owners[j] == i]
        of_images.append(right[0] if right else -1)
    return of_images, [
        int(np.flatnonzero(np.argsort(-s[:, j], kind="stable") == owner)[0]) for j, owner in enumerate(owners)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 60), st.integers(1, 4), st.integers(1, 500))
def test_ranks_equal_sorting_all_pairs(seed: int, n: int, m: int, dim: int, cells: int) -> None:
    """Whole numbers: many exact ties, whatever the order of sums; blocks of any size change nothing."""
    rng = np.random.default_rng(seed)
    images, captions = rng.integers(-2, 3, (n, dim)), rng.integers(-2, 3, (m, dim))
    owners = rng.integers(0, n, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heads.evaluation.retrieval._CELLS", cells)
        found = retrieval_ranks(images, captions, owners)
    for ranks, wanted in zip(found, by_sorting(images, captions, owners), strict=True):
        assert ranks.tolist() == wanted


def test_real_numbers_and_tensors() -> None:
    rng = np.random.default_rng(0)
    images, captions = rng.normal(size=(200, 16)).astype(np.float32), rng.normal(size=(900, 16)).astype(np.float32)
    owners = np.arange(900) % 200
    wanted = by_sorting(images, captions, owners)
    for kind in (np.asarray, torch.from_numpy):
        found = retrieval_ranks(kind(images), kind(captions), owners)
        for ranks, right in zip(found, wanted, strict=True):
            assert (ranks == right).mean() > 0.99  # float32 may swap neighbours that all but tie
            assert np.abs(ranks - right).max() <= 1


def test_a_constant_model_retrieves_the_first_captions() -> None:
    of_images, of_captions = retrieval_ranks(np.ones((6, 2)), np.ones((12, 2)), np.arange(12) // 2)
    assert of_images.tolist() == [0, 2, 4, 6, 8, 10]
    assert of_captions.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_rows_of_different_lengths_give_a_warning() -> None:
    """By inner product the longest caption is everyone's first."""
    with pytest.warns(FeatcacheWarning, match="captions have lengths from 1 to 9.05: ranks are by inner product"):
        of_images, _ = retrieval_ranks(np.eye(2), [[1, 0], [6.4, 6.4]], [0, 1])
    assert of_images.tolist() == [1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retrieval_ranks(5 * np.eye(2), np.eye(2, dtype=np.float16) * np.float16(0.9996), [0, 1])


@pytest.mark.parametrize(
    ("images", "captions", "owners", "message"),
    [
        (np.eye(3), np.eye(2), [0, 1], "do not match"),
        (np.eye(3), np.eye(3), [0, 1], "do not match"),
        (np.eye(3), np.eye(3), [0.0, 1.0, 2.0], "row indices"),
        (np.eye(3), np.eye(3), [0, 1, 3], r"\[0, 3\], expected rows 0 to 2"),
        (np.array([[np.nan, 0]]), np.eye(2), [0, 0], r"images hold NaN or infinity, for instance in rows \[0\]"),
        (np.zeros((0, 2)), np.eye(2), [0, 0], "at least one row"),
    ],
)
def test_invalid_retrieval_inputs(images: Any, captions: Any, owners: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        retrieval_ranks(images, captions, owners)


def captions(ids: list[str]) -> dict[str, list[str]]:
    """One to three sentences for every image but one."""
    return {
        name: [f"{name} {'x' * (7 * c + row % 5)}" for c in range(1 + row % 3)]
        for row, name in enumerate(ids)
        if row != 11
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """Forty images, one of them broken; one to three captions for all but one."""
    images = featcache.encode(NumpyDataset(broken=[5]), model=NumpyEncoder(), root=tmp_path / "cache", max_bad=1)
    prompts = captions(images.ids)
    made = embed_prompts(list(prompts), None, NumpyEncoder(), prompts=prompts, name="captions", root=tmp_path / "cache")
    return images, made.store


def test_stores_are_matched_by_sample_id(pair: tuple[Any, Any]) -> None:
    images, texts = pair
    row = retrieve(images, texts, ks=(1, 3, 10))
    X, sentences, owners = images.numpy()[0], [], []
    valid = np.flatnonzero(images.valid).tolist()
    for name, vectors, count in zip(texts.classnames, texts.raw, texts.counts, strict=True):
        if images.ids.index(name) in valid:
            sentences += list(vectors[:count])
            owners += [valid.index(images.ids.index(name))] * int(count)
    of_images, of_captions = (np.array(r) for r in by_sorting(X, np.array(sentences), np.array(owners)))
    assert (row["images"], row["captions"], row["images_without_caption"]) == (39, len(owners), 1)
    for k in (1, 3, 10):
        assert row[f"fake:image_to_text_recall@{k}"] == pytest.approx((of_images[of_images >= 0] < k).mean())
        assert row[f"fake:text_to_image_recall@{k}"] == pytest.approx((of_captions < k).mean())


def test_foreign_texts_and_unknown_images_are_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    images, texts = pair
    foreign = type("Foreign", (), {**{k: getattr(texts, k) for k in ("raw", "counts", "classnames", "name")}})()
    foreign.text_digest = "other"
    with pytest.raises(MismatchError, match="text tower other"):
        retrieve(images, foreign)
    foreign.classnames = ("nobody", *texts.classnames[1:])
    with pytest.raises(MismatchError, match=r"^1 classes of .*no sample ids of fake/train \(nobody\).*image-0000$"):
        captions_of(images, foreign)
    with pytest.raises(HeadError, match=r"k = \[0\]"):
        retrieve(images, texts, ks=[0])
    foreign.classnames, foreign.raw, foreign.counts = ("image-0005",), texts.raw[:1], texts.counts[:1]
    with pytest.raises(HeadError, match="no caption of an image"):
        captions_of(images, foreign)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The verb, with a numpy encoder for `tiny`."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("featcache.cli.arguments.load_encoder", lambda *_, **__: NumpyEncoder())

    def run(*arguments: str) -> tuple[int, Any, str]:
        code = main(["retrieve", *arguments, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


def test_the_verb_takes_a_store_a_file_or_a_column(pair: tuple[Any, Any], cli: Any, tmp_path: Path) -> None:
    images, texts = pair
    wanted = retrieve(images, texts)
    code, row, error = cli("fake/train", "texts/captions")
    assert code == 0, error
    assert row == wanted
    (tmp_path / "captions.json").write_text(json.dumps(captions(images.ids)))
    code, row, error = cli("fake/train", "--captions", "captions.json")
    assert code == 0, error
    assert {k: v for k, v in row.items() if k != "texts"} == {k: v for k, v in wanted.items() if k != "texts"}
    assert [json.loads(line)["captions"] for line in Path("results.jsonl").read_text().splitlines()] == [73, 73]

    class Captioned(NumpyDataset):
        name = "captioned"

        @property
        def index(self) -> SampleIndex:
            own = super().index
            sentences = np.array(["" if row == 3 else f"image {row}" for row in range(40)], object)
            return replace(own, ids=[f"c-{i}" for i in own.ids], metadata={"caption": sentences})

    featcache.encode(Captioned(), model=NumpyEncoder(), root=tmp_path / "cache")
    code, row, error = cli("captioned/train", "--caption-column", "caption", "--k", "2", "40")
    assert code == 0, error
    assert (row["captions"], row["captioned:text_to_image_recall@40"]) == (39, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of them"),
        (["texts/captions", "--captions", "c.json"], "expected one of them"),
        (["fake/train"], "a store of images; expected a store of texts"),
        (["--captions", "nosuch.json"], "--captions nosuch.json: no such file; expected JSON"),
        (["--caption-column", "title"], "no metadata column 'title'"),
    ],
)
def test_missing_or_conflicting_arguments_are_refused(
    pair: tuple[Any, Any], cli: Any, arguments: list[str], message: str
) -> None:
    code, _, error = cli("fake/train", *arguments)
    assert code == 2
    assert message in error
