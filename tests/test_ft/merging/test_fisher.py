"""Diagonal Fisher information against one backward pass per image, and in an ensemble."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.datasets.base import SampleIndex
from featcache.encoding.augment import view_uniforms
from featcache.errors import MismatchError, TrainingError
from ft.checkpoints.folder import read_state
from ft.checkpoints.parents import load_open_clip
from ft.merging.fisher import diagonal_fisher, fisher
from heads import LinearHead, ZeroShot, load, save


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


def test_fisher_equals_one_backward_pass_per_image(tmp_path: Path) -> None:
    data, head, encoder = Few(), some_head(), load_open_clip("tiny", device="cpu")
    found = fisher(encoder, data, head, passes=2, seed=3)
    tower = encoder.model.visual
    weight, bias = (torch.from_numpy(value.copy()).requires_grad_() for value in (head.weights, head.bias))
    trained = {f"visual.{name}": value for name, value in tower.named_parameters() if value.requires_grad}
    trained |= {"head.weight": weight, "head.bias": bias}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in trained.items()}
    for turn in range(2):
        for row in range(12):
            image = encoder.prepare(data.decode(data.read(row), row))
            features = tower(encoder.pixels(torch.from_numpy(image[None])))
            logits = (features / features.norm()) @ weight.T + bias
            p = logits.detach().softmax(-1)[0].double().numpy()
            drawn = view_uniforms(3, turn, data.index.ids[row], 1)[0]
            label = int(np.searchsorted(np.cumsum(p), drawn, side="right"))
            for value in trained.values():
                value.grad = None
            torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
            for name, value in trained.items():
                sums[name] += value.grad.double().square() / 24
    assert found.keys() == sums.keys()
    for name, value in sums.items():
        scale = value.max().item()
        assert (found[name].double() - value).abs().max() <= 1e-4 * scale + 1e-12, name


def test_labels_are_drawn_from_the_models_own_prediction() -> None:
    """For softmax regression on one input x the Fisher of the bias is p (1 - p), exactly, over many draws."""
    parameters = {"bias": torch.tensor([0.3, -0.5, 1.0])}
    n = 4000
    uniforms = (torch.arange(n) + 0.5) / n
    batches = iter([(torch.zeros(n, 1), uniforms)])
    found = diagonal_fisher(lambda values, x: (values["bias"] + 0 * x).log_softmax(-1), parameters, batches)
    p = parameters["bias"].softmax(0)
    torch.testing.assert_close(found["bias"], p * (1 - p), rtol=1e-3, atol=1e-4)


def test_fisher_files_of_the_command_line_weight_the_ensemble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [tmp_path / f"fisher{number}.safetensors" for number in range(2)]
    head = save(some_head(), tmp_path / "head.safetensors")
    assert main(["fisher", "digits:val", "--limit", "8", "--head", str(head), "-o", str(names[0]), "--quiet"]) == 0
    assert main(["fisher", "digits:val", "--limit", "8", "--templates", "digits", "-o", str(names[1]), "--quiet"]) == 0
    one, two = (read_state(name) for name in names)
    assert one.keys() == two.keys()
    assert {key for key in one if not key.startswith("visual.")} == {"head.weight", "head.bias"}
    assert all((value >= 0).all() for value in one.values())
    assert one["head.weight"].shape == (10, 128)
    command = ["wise", "tiny", "tiny", "--alpha", "0.5", "-o", str(tmp_path / "out"), "--fisher", *map(str, names)]
    assert main(command) == 0
    command = ["wise", "tiny", "tiny", "--alpha", "0.5", "-o", str(tmp_path / "judged"), "--fisher", *map(str, names)]
    command += ["--select", "digits:val", "--heads", "zero_shot", str(head), "--templates", "digits"]
    assert main([*command, "--results", str(tmp_path / "results.jsonl")]) == 0
    texts = featcache.embed_text(open_dataset("digits", "val").index.classnames, "digits")
    first, second = ZeroShot().fit(texts).linear(), load(head).linear()
    merged = load(tmp_path / "judged" / "best_head.safetensors").linear()
    for name, values in (("head.weight", "weights"), ("head.bias", "bias")):
        f0, f1 = (np.maximum(state[name].double().numpy(), 1e-8) for state in (one, two))
        wanted = (f0 * getattr(first, values) + f1 * getattr(second, values)) / (f0 + f1)
        np.testing.assert_allclose(getattr(merged, values), wanted, rtol=1e-5, atol=1e-5)
    assert merged.provenance["params"]["fisher_floor"] == 1e-8


class Cropped(Few):
    """The same images, cropped in advance."""

    def __init__(self) -> None:
        super().__init__(4)
        whole = self.decode

        def cut(content: Any, row: int) -> Any:
            pixels = np.asarray(whole(content, row))
            side = 7 * len(pixels) // 8
            start = (len(pixels) - side + 1) // 2
            return pixels[start : start + side, start : start + side]

        self.decode = cut


def test_preprocess_is_applied() -> None:
    tiny, cropping = (load_open_clip("tiny", device="cpu", preprocess=name) for name in (None, "central-crop"))
    asked = fisher(cropping, Few(4), some_head())
    by_hand = fisher(tiny, Cropped(), some_head())
    own = fisher(tiny, Few(4), some_head())
    assert all(torch.equal(asked[name], by_hand[name]) for name in own)
    assert not torch.equal(asked["visual.proj"], own["visual.proj"])


def test_another_class_list_and_no_images_are_refused() -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        fisher(load_open_clip("tiny"), Few(), LinearHead(np.zeros((2, 128)), np.zeros(2), ("a", "b")))
    with pytest.raises(TrainingError, match="no images"):
        diagonal_fisher(lambda values, x: x, {"w": torch.zeros(1)}, iter([]))
