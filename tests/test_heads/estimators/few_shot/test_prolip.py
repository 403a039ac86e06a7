"""ProLIP: its formula in float64, and the way from a tap with its projection to a head file and its results."""

from pathlib import Path
from typing import Any

import head_references as reference
import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from PIL import Image
from small_pictures import write_pictures
from torch.nn import functional

import featcache
import heads
from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoders.taps import PRE_PROJECTION as TAP
from featcache.errors import HeadError, MismatchError
from heads import ProLIP, ZeroShot


def test_prolip_is_its_formula_in_float64(images: Any, texts: Any) -> None:
    store, text = images(n=40, noise=0.6), ZeroShot().fit(texts()).linear()
    kept = store.y != 3  # a class without a row
    chance = np.random.default_rng(4)
    y, start = store.y[kept], chance.normal(size=(20, 12)) / 4
    X = chance.normal(size=(len(y), 20)) + 3 * store.X[kept].astype(np.float64) @ np.linalg.pinv(start)
    head = ProLIP(lr=0.01, epochs=50).fit(X, y, texts=text, projection=start)
    wanted = reference.prolip(X, y, text.weights.astype(np.float64), 0.01, 50, start)
    np.testing.assert_allclose(head.projection_, wanted, atol=2e-4)
    assert np.abs(wanted - start).max() > 0.05
    truth = reference.projected(wanted, text.weights.astype(np.float64))(X) + text.bias
    np.testing.assert_allclose(head.frozen().logits(X), truth, atol=2e-2)
    assert head.losses_[-1] < head.losses_[0]
    own = np.log(reference.softmax(reference.projected(start, text.weights.astype(np.float64))(X)))
    assert head.losses_[0] == pytest.approx(-own[np.arange(len(y)), y].mean(), rel=1e-5)


def test_bfloat16_products_leave_the_projection_where_it_was(
    images: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, text = images(n=60, noise=0.6), ZeroShot().fit(texts()).linear()
    X, y = store.numpy(np.float32)
    wide = ProLIP(lr=1e-3, epochs=30).fit(X, y, texts=text)
    monkeypatch.setattr("heads.solvers.logistic.precision.LOW_WORK", 0)
    monkeypatch.setattr("heads.solvers.logistic.precision.has_bfloat16", lambda: True)
    monkeypatch.setattr("heads.estimators.few_shot.prolip._PIECE_ROWS", 16)
    narrow = ProLIP(lr=1e-3, epochs=30).fit(X, y, texts=text)
    assert not np.array_equal(narrow.projection_, wide.projection_)
    np.testing.assert_allclose(narrow.losses_, wide.losses_, rtol=1e-3)
    moved = np.abs(wide.projection_ - np.eye(12)).max()  # Adam makes steps of gradients however small
    np.testing.assert_allclose(narrow.projection_, wide.projection_, atol=0.1 * moved)
    logits = wide.frozen().logits(X)
    np.testing.assert_allclose(narrow.frozen().logits(X), logits, atol=5e-3 * np.abs(logits).max())
    assert (narrow.predict(X) == wide.predict(X)).all()


def test_the_penalty_is_one_over_the_rows_per_class_and_lengths_do_not_matter(images: Any, texts: Any) -> None:
    store = images(n=60)
    head = ProLIP(lr=1e-3, epochs=5).fit(store, texts=texts())
    assert head.provenance_["params"]["penalty"] == pytest.approx(5 / 60)
    longer = store.X.astype(np.float64) * np.linspace(1, 30, 60)[:, None]
    same = ProLIP(penalty=5 / 60, lr=1e-3, epochs=5).fit(longer, store.y, texts=texts())
    np.testing.assert_allclose(same.projection_, head.projection_, atol=1e-6)
    held = ProLIP(penalty=1e4, lr=1e-3, epochs=5).fit(store, texts=texts())
    assert np.abs(held.projection_ - np.eye(12)).max() < np.abs(head.projection_ - np.eye(12)).max()


def test_invalid_settings_and_shapes_are_refused(images: Any, texts: Any) -> None:
    X, y = images(n=40).numpy()
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"penalty": -1.0}):
        with pytest.raises(HeadError, match=f"{next(iter(wrong))} is .*, expected a"):
            ProLIP(**wrong).fit(X, y, texts=texts())
    with pytest.raises(HeadError, match=r"projection is \(9, 12\), expected finite numbers \(12, 12\)"):
        ProLIP().fit(X, y, texts=texts(), projection=np.ones((9, 12)))
    with pytest.raises(HeadError, match="brings its own projection"):
        ProLIP().fit(images(), texts=texts(), projection=np.eye(12))


def test_from_a_tap_to_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection is the model's: before training the head is the zero-shot head of the features it projects to."""
    monkeypatch.chdir(tmp_path)
    model = write_folder(tmp_path / "clip", make_model())
    write_pictures(tmp_path / "pictures" / "train", 30)
    for kind in ("cat", "dog"):  # the last ones
        (tmp_path / "pictures" / "test" / kind).mkdir(parents=True)
        for path in sorted((tmp_path / "pictures" / "train" / kind).iterdir())[12:]:
            path.rename(tmp_path / "pictures" / "test" / kind / path.name)
    for split in ("train", "test"):
        assert main(["encode", "imagefolder:pictures", "--split", split, "--model", model, "--tap", TAP]) == 0
    store: Any = featcache.find_store("pictures/train")
    tap = store.tap(TAP)
    assert tap.visual_projection is not None
    assert (tap.visual_projection.weights.shape, tap.visual_projection.text_digests) == ((32, 24), store.text_digests)
    again = reference.unit(tap.numpy(np.float64)[0] @ tap.visual_projection.weights)
    np.testing.assert_allclose(again, store.numpy(np.float64)[0], atol=2e-3)
    assert main(["text", "imagefolder:pictures", "--model", model, "--name", "t"]) == 0
    command = ["fit", "prolip", "pictures/train#pre_projection", "texts/t", "-o", "head.safetensors"]
    assert main([*command, "--set", "lr=0.01"]) == 0
    assert main(["evaluate", "head.safetensors", "--on", "pictures/test#pre_projection"]) == 0
    head = heads.load("head.safetensors")
    with pytest.raises(MismatchError, match="fitted on features of encoder"):
        head.check(store)
    text = featcache.find_store("texts/t")
    with monkeypatch.context() as earlier:  # a tap that an earlier version wrote
        earlier.setattr(type(tap), "visual_projection", None)
        with pytest.raises(MismatchError, match="--tap pre_projection again"):
            ProLIP().fit(store.tap(TAP), texts=text)
    few = ProLIP(epochs=1, lr=1e-12).fit(heads.few_shot(tap, 1), texts=text)
    np.testing.assert_allclose(few.predict_proba(tap), ZeroShot().fit(text).predict_proba(store), atol=2e-2)


@pytest.mark.parametrize("kind", ["tiny", "random"])
def test_training_starts_at_the_models_zero_shot_head_and_follows_the_paper(kind: str, tmp_path: Path) -> None:
    """Features in float32, straight from the model, so that nothing but the head is compared."""
    encoder: Any = load_encoder("tiny" if kind == "tiny" else write_folder(tmp_path / "clip", make_model(seed=3)))
    chance = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in chance.integers(0, 256, (24, 40, 40, 3), np.uint8)]
    names, y = ("cat", "dog", "car"), np.arange(24) % 3
    prepared = [encoder.prepare(picture) for picture in pictures]
    X = np.asarray(encoder.encode_outputs(prepared, [TAP])[TAP], np.float32)
    model, tokens = encoder.model.eval(), encoder.tokenize([f"a photo of a {name}." for name in names])
    with torch.no_grad():
        image = functional.normalize(model.encode_image(encoder.pixels(torch.from_numpy(np.stack(prepared)))), dim=1)
        words = functional.normalize(model.encode_text(tokens), dim=1)
        scale = model.logit_scale.exp()
        own = (scale * image @ words.T).numpy()
    text = heads.LinearHead((scale * words).detach().numpy(), np.zeros(3), names)
    start = np.asarray(encoder.visual_projection, np.float32)
    before = ProLIP(lr=1e-12, epochs=1).fit(X, y, texts=text, projection=start)
    np.testing.assert_allclose(before.frozen().logits(X), own, atol=1e-5 * float(scale))

    W = torch.nn.Parameter(torch.from_numpy(start).double().clone())
    optimiser = torch.optim.Adam([W], lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 40)
    for _ in range(40):
        cosines = functional.normalize(torch.from_numpy(X).double() @ W, dim=1) @ words.double().T
        loss = functional.cross_entropy(scale * cosines, torch.from_numpy(y))
        loss = loss + (W - torch.from_numpy(start)).square().sum() / 8  # lambda = 1 / rows per class
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    trained = ProLIP(lr=1e-3, epochs=40).fit(X, y, texts=text, projection=start)
    assert np.abs(trained.projection_ - start).max() > 5e-3
    np.testing.assert_allclose(trained.projection_, W.detach(), atol=1e-4)
