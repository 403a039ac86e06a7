"""Initial heads: a probe fitted on stored features (LP-FT), or a head file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_models import make_model, write_folder
from finetuning import BATCH, Pictures, batch_of, start

from featcache.datasets import open_dataset
from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.errors import MismatchError
from heads import Logistic, Ridge, save

PROBES: dict[str, Any] = {"ridge": Ridge, "logistic": Logistic}


class Shaded(Pictures):
    """Pictures whose brightness gives the class, so that a probe can learn something."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = self.pixels // 4 + (90 * self.index.labels.astype(np.uint8))[:, None, None, None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), make_model())


@pytest.mark.parametrize("scale", ["folded", "separate"])
@pytest.mark.parametrize("name", PROBES)
def test_first_logits_equal_those_of_the_starting_head(name: str, scale: str, model: str, tmp_path: Path) -> None:
    dataset = Shaded()
    probe = PROBES[name]().fit(encode(dataset, model=load_encoder(model)))
    assert probe.score(encode(dataset, model=load_encoder(model))) == 1.0
    for head in (name, str(save(probe, tmp_path / "head.safetensors"))):
        run = start(model, dataset, head=head, head_scale=scale, shuffle=False)
        batch = batch_of(run)
        with torch.no_grad():
            features = run.stepper.model.image_features(batch.images)
            logits = run.stepper.objective(features, batch)[1]
        rows = features.double().numpy()
        expected = probe.linear().logits(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        assert logits is not None
        assert logits.shape == (BATCH, 3)
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4 * np.ptp(expected))
        assert (logits.numpy().argmax(axis=1) == batch.labels.numpy()).all()


@pytest.mark.parametrize("name", PROBES)
def test_lp_ft_encodes_the_images_once(name: str, model: str) -> None:
    dataset = Shaded()
    encode(dataset, model=load_encoder(model))
    reads: list[int] = []
    read = dataset.read
    dataset.read = lambda row: reads.append(row) or read(row)  # type: ignore[method-assign,func-returns-value]
    start(model, dataset, head=name, precision="bf16")
    assert not reads


def test_a_head_of_another_encoder_is_refused(model: str, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", make_model(seed=1))
    dataset = Pictures()
    path = save(Ridge().fit(encode(dataset, model=load_encoder(other))), tmp_path / "head.safetensors")
    with pytest.raises(MismatchError, match="fitted on features of encoder"):
        start(model, dataset, head=str(path))


def test_a_head_of_other_classes_is_refused(model: str, tmp_path: Path) -> None:
    path = save(Ridge().fit(encode(Pictures(), model=load_encoder(model))), tmp_path / "head.safetensors")
    with pytest.raises(MismatchError, match="3 classes"):
        start(model, open_dataset("digits", "train"), head=str(path))
