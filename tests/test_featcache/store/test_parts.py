"""Taps: several outputs of one pass, added to a store at any time, equal to the model's, after kills at any step."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_models import CONFIG, write_folder
from fakes import TAP, NumpyDataset, NumpyEncoder, TappedEncoder
from small_pictures import write_pictures

from featcache import EncodeOptions, encode_dataset, load_encoder
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoding.images import EncodeResult
from featcache.encoding.options import Share
from featcache.errors import (
    ContentChangedError,
    EncoderError,
    MismatchError,
    ShardDoneError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from featcache.store import ImageStore, find_store, open_image_store, repair, verify
from featcache.store.places import local as atomic
from featcache.store.reading.images import parts_of
from featcache.store.reading.parts import Part
from heads import Ridge


def run(root: Path, dataset: NumpyDataset, encoder: NumpyEncoder, *taps: str, **options: object) -> EncodeResult:
    chosen = EncodeOptions(**{"chunk_rows": 8, "batch_size": 3, "taps": taps} | options)
    return encode_dataset(dataset, encoder, root=root, options=chosen)


def contents(folder: Path, skip: str = "provenance.json") -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != skip
    }


def test_the_tap_is_the_hidden_layer_and_comes_from_the_same_pass(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[11]), TappedEncoder()
    store = run(tmp_path, dataset, encoder, TAP, max_bad=1).store
    assert encoder.images == 39  # one pass
    tap = store.tap(TAP)
    hidden = dataset.pixels.reshape(40, -1).astype(np.float64) @ encoder.first / 256
    lengths = np.linalg.norm(hidden, axis=1, keepdims=True)
    good = np.arange(40) != 11
    features, labels = tap.numpy()
    assert np.abs(features - (hidden / lengths)[good]).max() <= 2.0**-11
    assert tap.array("features").dtype == np.float16
    np.testing.assert_allclose(tap.array("norm")[good], lengths[good, 0], rtol=1e-5)
    assert (tap.dim, store.dim, len(tap), labels.tolist()) == (24, 16, 40, store.numpy()[1].tolist())
    assert (tap.ids, tap.classnames, tap.valid.tolist()) == (store.ids, store.classnames, store.valid.tolist())
    assert np.isnan(tap.gather(np.array([11]))).all()
    assert tap.dataset_key == store.dataset_key
    assert tap.encoder_key != store.encoder_key
    assert (tap.text_digests, tap.logit_scale) == ((), None)


def test_a_tap_added_later_changes_no_existing_file(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[11]), TappedEncoder()
    at_once = run(tmp_path / "once", dataset, encoder, TAP, max_bad=1).store
    store = run(tmp_path / "later", dataset, encoder, max_bad=1).store
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(store.path).rglob("*") if path.is_file()
    }
    encoder.images = 0
    result = run(tmp_path / "later", dataset, encoder, TAP, max_bad=1)
    assert (result.hit, result.encoded_rows, encoder.images) == (False, 40, 39)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert contents(result.store.path) == contents(at_once.path)
    assert run(tmp_path / "later", dataset, encoder, TAP, max_bad=1).hit
    assert encoder.images == 39
    assert verify(store.path, deep=True).ok


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("with_base", [False, True])
def test_a_kill_after_any_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_base: bool) -> None:
    dataset, encoder = NumpyDataset(20), TappedEncoder()
    whole = contents(run(tmp_path / "whole", dataset, encoder, TAP).store.path)
    path = run(tmp_path / "killed", NumpyDataset(20), encoder).store.path if with_base else None
    steps = 0
    while steps < 100:
        left = 13 * steps + 5

        def step(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        monkeypatch.setattr(atomic, "after_step", step)
        try:
            path = run(tmp_path / "killed", dataset, encoder, TAP).store.path
            break
        except Killed:
            steps += 1
        if with_base and path is not None:
            assert np.isfinite(open_image_store(path).numpy()[0]).all()  # readable all the time
    assert steps > 3
    assert path is not None
    monkeypatch.setattr(atomic, "after_step", lambda step: None)
    found = {name: content for name, content in contents(path).items() if not name.endswith(".partial")}
    assert {name: found.get(name) for name in whole} == whole


def test_changed_images_are_noticed(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), TappedEncoder()
    store = run(tmp_path, dataset, encoder, TAP).store
    dataset.pixels[20] += 1
    dataset.stamps[20] = 8
    with pytest.raises(ContentChangedError, match="--refresh"):
        run(tmp_path, dataset, encoder, TAP)
    refreshed = run(tmp_path, dataset, encoder, refresh=True).store  # the tap is left behind
    with pytest.raises(MismatchError, match=r"made from different images.*--tap hidden"):
        refreshed.tap(TAP)
    report = verify(store.path, deep=True)
    assert ["different images" in problem for problem in report.problems] == [True]
    encoder.images = 0
    again = run(tmp_path, dataset, encoder, TAP)
    assert encoder.images == 8  # the one chunk
    fresh = run(tmp_path / "fresh", dataset, encoder, TAP).store
    assert again.store.tap(TAP).array("features").tobytes() == fresh.tap(TAP).array("features").tobytes()
    assert verify(store.path, deep=True).ok


def test_an_added_tap_must_be_of_the_same_images(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), TappedEncoder()
    store = run(tmp_path, dataset, encoder).store
    dataset.pixels[20] += 1  # size and time stay the same: only reading the image tells
    with pytest.raises(ContentChangedError, match=r"1 image changed since the store was made, first image-0020"):
        run(tmp_path, dataset, encoder, TAP)
    assert parts_of(store) == []
    dataset.pixels[20] -= 1
    assert run(tmp_path, dataset, encoder, TAP).store.tap(TAP).dim == 24


@pytest.mark.parametrize("name", ["features/c/2/0", "norm/c/0", "valid/c/1"])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_only_a_damaged_tap_is_encoded_again(tmp_path: Path, name: str, how: str) -> None:
    dataset, encoder = NumpyDataset(), TappedEncoder()
    store = run(tmp_path, dataset, encoder, TAP).store
    whole = contents(store.path)
    file = Path(store.path / f"tap-{TAP}" / name)
    if how == "flip":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    else:
        file.unlink()
        with pytest.raises(StoreCorruptError, match="chunk file is missing"):
            store.tap(TAP)
    report = verify(store.path, deep=True)
    assert [f"tap-{TAP}/{name}" in problem for problem in report.problems] == [True]
    repair(report)
    assert len(open_image_store(store.path)) == 40  # the store itself is as it was
    with pytest.raises(StoreIncompleteError, match="run the same encode command"):
        store.tap(TAP)
    encoder.images = 0
    run(tmp_path, dataset, encoder, TAP)
    assert encoder.images == 8
    assert contents(store.path) == whole


def test_two_writers_share_the_work_of_an_added_tap(tmp_path: Path) -> None:
    dataset = NumpyDataset(broken=[11])
    whole = contents(run(tmp_path / "whole", dataset, TappedEncoder(), TAP, max_bad=1).store.path)
    run(tmp_path / "two", dataset, TappedEncoder(), max_bad=1)
    encoders = [TappedEncoder(), TappedEncoder()]
    with pytest.raises(ShardDoneError):
        run(tmp_path / "two", dataset, encoders[0], TAP, max_bad=1, share=Share(1, 2, only=True))
    shards = [Share(0, 2), Share(1, 2)]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(run, tmp_path / "two", dataset, encoder, TAP, max_bad=1, share=share)
            for encoder, share in zip(encoders, shards, strict=True)
        ]
    for found in runs:
        assert contents(found.result().store.path) == whole


def test_a_head_of_a_tap_fits_that_tap_only(tmp_path: Path) -> None:
    store = run(tmp_path, NumpyDataset(), TappedEncoder(), TAP).store
    tap = store.tap(TAP)
    head = Ridge().fit(tap)
    X, y = tap.numpy(np.float64)
    np.testing.assert_allclose(head.coef_, Ridge().fit(X, y, classnames=tap.classnames).coef_, atol=1e-9)
    assert 0 <= head.score(tap) <= 1
    with pytest.raises(MismatchError, match="was fitted on features of encoder"):
        head.score(store)
    with pytest.raises(MismatchError, match="was fitted on features of encoder"):
        Ridge().fit(store).score(tap)


def test_missing_taps_are_named(tmp_path: Path) -> None:
    store = run(tmp_path, NumpyDataset(), TappedEncoder(), TAP).store
    with pytest.raises(EncoderError, match=r"no tap 'deep'; it has hidden"):
        run(tmp_path, NumpyDataset(), TappedEncoder(), "deep")
    with pytest.raises(EncoderError, match=r"no tap 'deep'; it has only its features, of width 16"):
        run(tmp_path, NumpyDataset(), NumpyEncoder(), "deep")
    with pytest.raises(StoreNotFoundError, match=r"no 'deep' in .*it has: hidden; the encode command with --tap deep"):
        store.tap("deep")


@pytest.mark.parametrize("part", [Part("a_b"), Part(None, "plain", 7, 12), Part("x", "reg_ft", 0, 0)])
def test_names_of_parts_are_read_back(part: Part) -> None:
    assert Part.parse(part.name) == part


@pytest.mark.parametrize(
    "name", ["", "features", "tap-", "tap-A", "view-plain-00-1", "view-plain-0", "tap-a-b", "done"]
)
def test_other_folders_are_not_parts(name: str) -> None:
    assert Part.parse(name) is None


def own_forward(name: str, pictures: Sequence[object], transform: object) -> np.ndarray:
    """open_clip's image tower without its projection."""
    model, _, _ = open_clip.create_model_and_transforms(name)
    model.visual.proj = None
    with torch.inference_mode():
        return model.eval().visual(torch.stack([transform(p) for p in pictures])).numpy()  # type: ignore[operator]


def test_pre_projection_is_open_clips_tower_without_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = write_folder(tmp_path / "model", open_clip.CLIP(**CONFIG))
    encoder = load_encoder(name)
    assert encoder.taps == {"pre_projection": 32}
    _, _, transform = open_clip.create_model_and_transforms(name)
    chance = np.random.default_rng(0)
    from PIL import Image

    pictures = [Image.fromarray(chance.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    images = [encoder.prepare(picture) for picture in pictures]
    found = encoder.encode_outputs(images, ["pre_projection"])
    np.testing.assert_array_equal(found["pre_projection"], own_forward(name, pictures, transform))
    np.testing.assert_array_equal(found["projected"], encoder.encode_images(images))


def test_the_embedded_model_stores_its_tap(tmp_path: Path) -> None:
    dataset, encoder = open_dataset(write_pictures(tmp_path / "pictures"), "all"), load_encoder("tiny")
    options = EncodeOptions(taps=["pre_projection"])
    store = encode_dataset(dataset, encoder, root=tmp_path, options=options).store
    plain = encode_dataset(dataset, encoder, root=tmp_path / "plain").store
    assert store.array("features").tobytes() == plain.array("features").tobytes()
    images = [encoder.prepare(dataset.decode(dataset.read(row), row)) for row in range(24)]
    encoder.model.visual.proj = None
    with torch.inference_mode():
        raw = encoder.model.visual(encoder.pixels(torch.from_numpy(np.stack(images)))).double().numpy()
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(store.tap("pre_projection").numpy()[0] - expected).max() <= 2.0**-12


def test_a_resnet_has_no_such_tap(tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    torch.manual_seed(0)
    model = open_clip.CLIP(**(CONFIG | {"vision_cfg": vision}))
    encoder = load_encoder(write_folder(tmp_path / "resnet", model, vision_cfg=vision))
    with pytest.raises(EncoderError, match=r"no tap 'pre_projection'; it has patch, tokens, layer:0 to layer:3"):
        encode_dataset(
            open_dataset("digits", "test"), encoder, root=tmp_path, options=EncodeOptions(taps=["pre_projection"])
        )


def test_the_command_line_stores_finds_fits_and_evaluates_a_tap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    for name, n in (("train", 24), ("test", 12)):
        source = write_pictures(tmp_path / "pictures" / name, n)
        named = ["--split", "all", "--name", name, "--tap", "pre_projection", "--quiet", *root]
        assert main(["encode", source, *named]) == 0
    assert "with pre_projection" in capsys.readouterr().out
    store = find_store("train/all@tiny#pre_projection", tmp_path)
    assert isinstance(store, ImageStore)
    assert store.encoder_name == "tiny#pre_projection"
    head = str(tmp_path / "head.safetensors")
    assert main(["fit", "ridge", "train/all#pre_projection", "-o", head, *root]) == 0
    evaluated = ["evaluate", head, "--on", "test/all#pre_projection", "--allow-seen", "--json", *root]  # drawn alike
    assert main(evaluated) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("[") :] if "[" in shown else shown)
    assert main(["predict", head, str(tmp_path / "pictures/test/cat/00.png"), "--json"]) == 0
    assert "cat" in capsys.readouterr().out
    assert main(["evaluate", head, "--on", "test/all", "--allow-seen", *root]) == MismatchError.exit_code
    assert "was fitted on features of encoder" in capsys.readouterr().err
    assert main(["list", *root]) == 0
    assert "# pre_projection" in capsys.readouterr().out
    assert main(["info", "train/all", *root]) == 0
    assert "taps, views  pre_projection" in capsys.readouterr().out
    assert main(["verify", "train/all", "--deep", *root]) == 0


class WithProjection(TappedEncoder):
    """Its tap is what open_clip's vision transformers have, and it says what follows."""

    taps = {"pre_projection": 24}  # noqa: RUF012

    @property
    def visual_projection(self) -> np.ndarray:  # type: ignore[override]
        return self.last

    def encode_outputs(self, images: Sequence[np.ndarray], taps: Sequence[str]) -> dict[str, np.ndarray]:
        found = super().encode_outputs(images, taps)
        return {"projected": found["projected"], "pre_projection": found[TAP]}


def test_the_projection_is_stored_with_its_tap_and_added_to_old_ones_without_encoding(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), WithProjection()
    old = TappedEncoder.visual_projection
    encoder.__class__ = type("Earlier", (WithProjection,), {"visual_projection": old})
    store = run(tmp_path, dataset, encoder, "pre_projection").store
    before = contents(store.path)
    assert store.tap("pre_projection").visual_projection is None
    encoder.__class__, encoder.images = WithProjection, 0
    result = run(tmp_path, dataset, encoder, "pre_projection")
    found = result.store.tap("pre_projection").visual_projection
    assert found is not None
    assert (result.encoded_rows, encoder.images, found.text_digests) == (0, 0, store.text_digests)
    np.testing.assert_array_equal(found.weights, encoder.last)
    after = contents(store.path)
    added = {"tap-pre_projection/projection.npy", "tap-pre_projection/manifest.json"}
    assert {name for name in after if after[name] != before.get(name)} == added
    assert run(tmp_path, dataset, encoder, "pre_projection").hit
    assert verify(store.path, deep=True).ok
    Path(store.path / "tap-pre_projection" / "projection.npy").write_bytes(b"damaged")
    with pytest.raises(StoreCorruptError, match=r"projection\.npy: differs from its checksum"):
        open_image_store(store.path).tap("pre_projection").visual_projection  # noqa: B018
    assert not verify(store.path, deep=True).ok
    run(tmp_path, dataset, encoder, "pre_projection")
