"""Augmented views stored beside the features: equal to encoding the augmented pictures by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import CLASSES, NumpyDataset, NumpyEncoder
from small_pictures import write_pictures

from featcache import EncodeOptions, encode_dataset
from featcache.cli.main import main
from featcache.datasets.base import SampleIndex
from featcache.encoding.augment import AUGMENTATIONS
from featcache.encoding.images import EncodeResult
from featcache.errors import EncoderError, FeatcacheError, HeadError, StoreNotFoundError
from featcache.store import find_store, open_image_store, verify
from featcache.store.reading.images import parts_of
from heads import Ridge, few_shot
from heads.estimators.fit import Material, fit_head
from heads.fitted.provenance import same_split, split_id

SEED = 11


class Sized(NumpyEncoder):
    """Takes images of 4x4 and has a tap: the features before a projection."""

    image_size, taps = (4, 4), {"hidden": 16}

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.encode_outputs(images, ())["projected"]

    def encode_outputs(self, images: Sequence[np.ndarray], taps: Sequence[str]) -> dict[str, np.ndarray]:
        hidden = super().encode_images(images)
        return {"projected": hidden @ self.weights[:16], "hidden": hidden}


class Decoding(NumpyDataset):
    """Counts decoded pictures; these have numbers, so that data sets can share and reorder them."""

    decoding = "4x4"

    def __init__(self, numbers: Sequence[int] = range(20), broken: Sequence[int] = ()) -> None:
        super().__init__(40, broken)
        self.numbers, self.decoded = list(numbers), 0
        self.pixels, self.labels = self.pixels[self.numbers], self.labels[self.numbers]
        self.stamps = self.stamps[: len(self.numbers)]

    @property
    def index(self) -> SampleIndex:
        ids = [f"image-{number}" for number in self.numbers]
        return SampleIndex(ids, np.full(len(ids), 48), self.stamps.copy(), self.labels.astype(np.int64), CLASSES)

    def decode(self, content: bytes | memoryview, row: int) -> np.ndarray:
        self.decoded += 1
        return super().decode(content, row)


def run(root: Path, dataset: NumpyDataset, encoder: NumpyEncoder, **options: Any) -> EncodeResult:
    chosen = {"chunk_rows": 8, "batch_size": 3, "max_bad": 1, "view_seed": SEED} | options
    return encode_dataset(dataset, encoder, root=root, options=EncodeOptions(**chosen))


def by_hand(dataset: Decoding, encoder: Sized, view: int, name: str, tap: str = "projected") -> np.ndarray:
    ids = dataset.index.ids
    pixels = [AUGMENTATIONS[name](dataset.pixels[row], 4, SEED, view, ids[row]) for row in range(len(ids))]
    features = encoder.encode_outputs(pixels, ["hidden"])[tap].astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["plain", "lipsum"])
def test_views_are_the_augmented_pictures_from_one_decode(tmp_path: Path, name: str) -> None:
    dataset, encoder = Decoding(broken=[5]), Sized()
    store = run(tmp_path, dataset, encoder, views=3, augmentation=name, taps=["hidden"]).store
    assert dataset.decoded == 20
    assert encoder.images == 4 * 19  # the image itself and three views
    good = np.arange(20) != 5
    for k in range(3):
        view = store.view(k)
        assert np.abs(view.numpy()[0] - by_hand(dataset, encoder, k, name)[good]).max() < 1e-3
        assert np.abs(view.tap("hidden").numpy()[0] - by_hand(dataset, encoder, k, name, "hidden")[good]).max() < 1e-3
        assert (view.labels.tolist(), view.valid.tolist()) == (store.labels.tolist(), good.tolist())
        assert (view.encoder_key, view.text_digests) == (store.encoder_key, store.text_digests)
        assert same_split(split_id(view), store)  # what was fitted on a view has seen these images
        assert split_id(view) != split_id(store)  # but a sweep must not take one for the other
    assert store.view(0).array("features").tobytes() != store.view(1).array("features").tobytes()
    assert store.tap("hidden").view(1).encoder_key == store.view(1).tap("hidden").encoder_key
    assert verify(store.path, deep=True).ok


def test_views_do_not_depend_on_workers_or_on_when_they_are_added(tmp_path: Path) -> None:
    one = run(tmp_path / "one", Decoding(), Sized(), views=3, workers=1).store
    many = run(tmp_path / "many", Decoding(), Sized(), views=1, workers=4, ahead=2).store
    before = {file: file.stat().st_mtime_ns for file in Path(many.path).rglob("*") if file.is_file()}
    encoder = Sized()
    result = run(tmp_path / "many", Decoding(), encoder, views=3, workers=3)
    assert (result.encoded_rows, encoder.images) == (20, 2 * 20)  # two more views, nothing else
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for k in range(3):
        assert result.store.view(k).array("features").tobytes() == one.view(k).array("features").tobytes()
    assert run(tmp_path / "many", Decoding(), encoder, views=2).hit


def test_all_views_are_rows_in_groups(tmp_path: Path) -> None:
    store = run(tmp_path, Decoding(broken=[5]), Sized(), views=3).store
    views = store.views()
    assert (len(views), views.dim, views.classnames) == (60, 16, CLASSES)
    X, y = views.numpy()
    streamed = [(x.copy(), labels) for x, labels in views.blocks(7)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in streamed]), X)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in streamed]), y)
    image = [row for row in range(20) if row != 5]
    assert views.groups.tolist() == image * 3
    np.testing.assert_array_equal(y, store.labels[views.groups])
    rows = np.array([59, 0, 21, 20])
    expected = [store.view(row // 20).gather(np.array([row % 20]))[0] for row in rows.tolist()]
    np.testing.assert_array_equal(views.gather(rows), expected)
    assert views.ids[21] == store.ids[1]
    with pytest.raises(IndexError, match=r"the store has rows 0\.\.59"):
        views.gather(np.array([60]))


def test_ridge_leaves_views_of_an_image_out_together(tmp_path: Path) -> None:
    store = run(tmp_path, Decoding(range(40)), Sized(), views=3).store
    views = store.views()
    X, y = views.numpy(np.float64)
    expected = Ridge().fit(X, y, groups=views.groups, classnames=CLASSES)
    for head in (Ridge().fit(views, groups=views.groups), fit_head("ridge", Material(views))):
        np.testing.assert_allclose(head.coef_, expected.coef_, atol=1e-8)
        np.testing.assert_allclose(head.cv_errors_, expected.cv_errors_, rtol=1e-8)
    apart = Ridge().fit(X, y, classnames=CLASSES)
    assert not np.allclose(apart.cv_errors_, expected.cv_errors_, rtol=1e-3)
    assert 0 <= expected.score(*store.numpy()) <= 1
    with pytest.raises(HeadError, match=r"would hold out rows of groups \(views of an image.* that it also fits on"):
        fit_head("discriminant", Material(views))
    others = Decoding(range(40))
    others.pixels = 255 - others.pixels
    fit_head("discriminant", Material(views, selection=run(tmp_path / "others", others, Sized()).store))
    with pytest.raises(HeadError, match="rows are views, and shots are images"):
        few_shot(views, 2)


def test_views_are_copied_where_id_and_content_are_known(tmp_path: Path) -> None:
    old = run(tmp_path, Decoding(range(20)), Sized(), views=2, taps=["hidden"]).store
    encoder, order = Sized(), [30, *range(19, -1, -1)]
    result = run(tmp_path, Decoding(order), encoder, views=2, taps=["hidden"])
    assert (result.encoded_rows, result.copied_rows, encoder.images) == (1, 20, 3)
    for k in range(2):
        for new, then in (
            (result.store.view(k), old.view(k)),
            (result.store.view(k).tap("hidden"), old.view(k).tap("hidden")),
        ):
            assert new.array("features")[1:].tobytes() == then.array("features")[::-1].tobytes()
            assert new.array("norm")[1:].tobytes() == then.array("norm")[::-1].tobytes()
    renamed = Decoding(range(20))
    renamed.numbers = list(range(20, 40))  # the same pictures under other ids: other crops
    again = run(tmp_path, renamed, Sized(), views=2)
    assert (again.encoded_rows, again.copied_rows) == (20, 0)
    lacking = run(tmp_path, Decoding(range(15)), Sized(), views=3)  # no store has the third view
    assert (lacking.encoded_rows, lacking.copied_rows) == (15, 0)


def test_unavailable_views_are_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"has no image_size, which augmented views need"):
        run(tmp_path, Decoding(), NumpyEncoder(), views=1)
    with pytest.raises(FeatcacheError, match="--augmentation flips: expected one of"):
        run(tmp_path, Decoding(), Sized(), views=1, augmentation="flips")
    with pytest.raises(FeatcacheError, match="views is -1, expected a whole number from 0 to 10,000"):
        EncodeOptions(views=-1)
    store = run(tmp_path, Decoding(), Sized()).store
    with pytest.raises(StoreNotFoundError, match=r"no such views; it has: none; .*--views K"):
        store.views()
    store = run(tmp_path, Decoding(), Sized(), views=1).store
    run(tmp_path, Decoding(), Sized(), views=1, augmentation="lipsum")
    with pytest.raises(FeatcacheError, match="several kinds of views; name augmentation and seed; it has: lipsum"):
        store.views()
    assert len(store.views("plain")) == 20
    with pytest.raises(
        StoreNotFoundError, match=r"no 'view-plain-11-7'.*--views 8 --augmentation plain --view-seed 11"
    ):
        store.view(7, "plain")


def test_views_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    views = ["--views", "2", "--augmentation", "wise_ft", "--view-seed", "3"]
    source = write_pictures(tmp_path / "pictures")
    assert main(["encode", source, "--split", "all", "--name", "pets", *views, "--quiet", "--json", *root]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["parts"] == ["view-wise_ft-3-0", "view-wise_ft-3-1"]
    head = str(tmp_path / "head.safetensors")
    assert main(["fit", "ridge", "pets/all#views", "-o", head, *root]) == 0
    capsys.readouterr()
    assert main(["evaluate", head, "--on", "pets/all#view-wise_ft-3-1", *root]) == 0
    assert "was fitted on" in "".join(capsys.readouterr())  # views of these images
    assert main(["evaluate", head, "--on", "pets/all#views", *root]) == HeadError.exit_code
    store = open_image_store(record["store"])
    assert len(find_store("pets/all#views", tmp_path)) == 2 * len(store)
    assert len(parts_of(store)) == 2
