"""Diagonal Fisher information: against one backward pass an image, and in an ensemble."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.augment import view_uniforms
from featcache.cli import main
from featcache.datasets import open_dataset
from featcache.datasets.base import SampleIndex
from featcache.encoders import load_encoder
from featcache.errors import MismatchError
from ft.checkpoint import read_state
from ft.errors import TrainingError
from ft.fisher import diagonal_fisher, fisher
from heads import LinearHead, save


class Few:
    """Twelve digits."""

    name, split = "few", "val"

    def __init__(self, n: int = 12) -> None:
        base = open_dataset("digits", "val")
        i = base.index
        self.index = SampleIndex(i.ids[:n], i.sizes[:n], i.stamps[:n], i.labels[:n], i.classnames)
        self.read, self.decode = base.read, base.decode


def some_head(scale: float = 5.0) -> LinearHead:
    rng = np.random.default_rng(0)
    names = open_dataset("digits", "val").index.classnames
    return LinearHead(scale * rng.normal(size=(10, 128)), rng.normal(size=10), names)


def test_one_backward_pass_an_image_gives_the_same(tmp_path: Path) -> None:
    data, head = Few(), some_head()
    found = fisher("tiny", None, data, head, passes=2, seed=3, device="cpu")
    encoder = load_encoder("tiny", device="cpu")
    tower = encoder.model.visual
    trained = {name: value for name, value in tower.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in trained.items()}
    for turn in range(2):
        for row in range(12):
            image = encoder.prepare(data.decode(data.read(row), row))
            features = tower(encoder.pixels(torch.from_numpy(image[None])))
            logits = (features / features.norm()) @ torch.from_numpy(head.weights).T + torch.from_numpy(head.bias)
            p = logits.detach().softmax(-1)[0].double().numpy()
            drawn = view_uniforms(3, turn, data.index.ids[row], 1)[0]
            label = int(np.searchsorted(np.cumsum(p), drawn, side="right"))
            tower.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
            for name, value in trained.items():
                sums[name] += value.grad.double().square() / 24
    assert found.keys() == {f"visual.{name}" for name in sums}
    for name, value in sums.items():
        scale = value.max().item()
        assert (found[f"visual.{name}"].double() - value).abs().max() <= 1e-4 * scale + 1e-12, name


def test_labels_are_drawn_from_the_models_own_prediction() -> None:
    """For softmax regression on one input x the Fisher of the bias is p (1 - p), exactly, over many draws."""
    parameters = {"bias": torch.tensor([0.3, -0.5, 1.0])}
    n = 4000
    uniforms = (torch.arange(n) + 0.5) / n
    batches = iter([(torch.zeros(n, 1), uniforms)])
    found = diagonal_fisher(lambda values, x: (values["bias"] + 0 * x).log_softmax(-1), parameters, batches)
    p = parameters["bias"].softmax(0)
    torch.testing.assert_close(found["bias"], p * (1 - p), rtol=1e-3, atol=1e-4)


def test_the_command_line_feeds_the_ensemble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [tmp_path / f"fisher{number}.safetensors" for number in range(2)]
    head = save(some_head(), tmp_path / "head.safetensors")
    assert main(["fisher", "digits:val", "--limit", "8", "--head", str(head), "-o", str(names[0]), "--quiet"]) == 0
    assert main(["fisher", "digits:val", "--limit", "8", "--templates", "digits", "-o", str(names[1]), "--quiet"]) == 0
    one, two = (read_state(name) for name in names)
    assert one.keys() == two.keys()
    assert all(key.startswith("visual.") and (value >= 0).all() for key, value in one.items())
    command = ["wise", "tiny", "tiny", "--alpha", "0.5", "-o", str(tmp_path / "out"), "--fisher", *map(str, names)]
    assert main(command) == 0


def test_refusals() -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        fisher("tiny", None, Few(), LinearHead(np.zeros((2, 128)), np.zeros(2), ("a", "b")), device="cpu")
    with pytest.raises(TrainingError, match="no images"):
        diagonal_fisher(lambda values, x: x, {"w": torch.zeros(1)}, iter([]))
