"""Whole runs against a plain loop in float64: batches, captions, frozen parts, LoRA, averages, schedules.

Adam's eps is large, so that gradients near zero, whose sign is rounding, move nothing.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_models import make_model, write_folder
from finetuning import Pictures, log, options, weights

from featcache.datasets.base import SampleIndex
from ft.training.loop import finetune
from ft.training.options import FinetuneOptions
from heads import load

TEMPLATES = ("a photo of a {}.", "a drawing of the {}.", "{}")
TOKENS = open_clip.SimpleTokenizer(context_length=16)
MEAN, STD = (torch.tensor(values, dtype=torch.float64) for values in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
CONTRASTIVE = {"objective": "contrastive", "batch_size": 10, "drop_last": False, "steps": 6}
CASES: dict[str, dict[str, Any]] = {
    "incomplete batch left out": {"batch_size": 10, "epochs": 2, "steps": None, "clip": 0.5, "weight_decay": 0.1},
    "smaller last batch": {"batch_size": 10, "epochs": 2, "steps": None, "drop_last": False, "warmup": 2},
    "smaller last batch in parts": {"batch_size": 11, "drop_last": False, "accumulate": 3, "head": "zeros"},
    "batch larger than the data": {"batch_size": 100, "drop_last": False, "optimizer": "adam", "weight_decay": 0.3},
    "one epoch of one step": {"batch_size": 24, "epochs": 1, "steps": None, "average": "ema", "ema_decay": 0.5},
    "warm-up longer than the run": {"warmup": 20},
    "no warm-up": {"warmup": 0, "steps": 5},
    "class without rows": {"label_smoothing": 0.2, "steps": 5},
    "head alone": {"train": ("head",), "steps": 4},
    "mean of late epochs": {"average": "swa", "swa_start": 0.3, "batch_size": 10, "drop_last": False, "steps": 6},
    "mean of a run that ends within an epoch": {"average": "swa", "swa_start": 0.75, "steps": 7},
    "LoRA and a moving average": {"lora_rank": 2, "lora_alpha": 4.0, "average": "ema", "ema_decay": 0.5, "steps": 5},
    "captions": CONTRASTIVE,
    "captions in parts, false negatives": CONTRASTIVE | {"accumulate": 3, "false_negatives": True},
    "stored captions": CONTRASTIVE | {"train": ("image", "logit_scale")},
    "frozen image tower": CONTRASTIVE | {"train": ("text",), "accumulate": 2},
}


class Three(Pictures):
    """Pictures of three of four classes, two of which share a name."""

    def __init__(self) -> None:
        super().__init__()
        known = self.index
        names = ("cat", "crane", "crane", "eel")
        self.index = SampleIndex(known.ids, known.sizes, known.stamps, known.labels, names)


class Plain:
    """The model, its trained parameters and its loss, in float64."""

    def __init__(self, data: Pictures, chosen: FinetuneOptions, head: Any) -> None:
        self.model: Any = make_model().double().eval()
        self.data, self.options = data, chosen
        self.labels = torch.from_numpy(data.index.labels)
        self.images = ((torch.from_numpy(data.pixels).double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
        parts = {"visual": "image", "logit_scale": "logit_scale"}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parts.get(name.partition(".")[0], "text") in chosen.train)
        self.adapted = self._adapt() if chosen.lora_rank else {}
        self.trained: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        self.trained = {name: p for name, p in self.trained.items() if p.requires_grad}
        for path, (_, _, a, b) in self.adapted.items():
            self.trained |= {f"{path} A": a, f"{path} B": b}
        if head is not None:
            self.trained["weights"] = torch.from_numpy(head.weights.copy()).double().requires_grad_()
            self.trained["bias"] = torch.from_numpy(head.bias.copy()).double().requires_grad_()

    def _adapt(self) -> dict[str, tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Module, W, A and B of each attention's packed matrix, which becomes a constant."""
        make, rank, found = torch.Generator().manual_seed(0), self.options.lora_rank, {}
        self.model.visual.requires_grad_(False)
        for path, module in self.model.named_modules():
            if not path.startswith("visual."):
                continue
            if isinstance(module, torch.nn.MultiheadAttention):
                bound, width = 1 / math.sqrt(module.embed_dim), module.embed_dim
                a = torch.empty(3, rank, width).uniform_(-bound, bound, generator=make).double().requires_grad_()
                b = torch.zeros(3, width, rank, dtype=torch.float64, requires_grad=True)
                packed: Any = module._parameters.pop("in_proj_weight")
                found[path] = module, packed.detach(), a, b
        return found

    def add_updates(self) -> None:
        for module, matrix, a, b in self.adapted.values():
            factor = (self.options.lora_alpha or 1) / self.options.lora_rank
            module.in_proj_weight = matrix + factor * (b @ a).reshape(matrix.shape)

    def loss(self, rows: np.ndarray, epoch: int) -> torch.Tensor:
        v = F.normalize(self.model.encode_image(self.images[rows]), dim=-1)
        labels = self.labels[rows]
        if "weights" in self.trained:
            logits = v @ self.trained["weights"].T + self.trained["bias"]
            smooth, log_p = self.options.label_smoothing, logits.log_softmax(dim=1)
            return -((1 - smooth) * log_p[range(len(rows)), labels] + smooth * log_p.mean(dim=1)).mean()
        texts = []
        for row in rows.tolist():
            draw = np.random.default_rng([self.options.seed, epoch, row]).integers(len(TEMPLATES))
            texts.append(TEMPLATES[draw].format(self.data.index.classnames[int(self.labels[row])]))
        logits = self.model.logit_scale.exp() * v @ F.normalize(self.model.encode_text(TOKENS(texts)), dim=-1).T
        if self.options.false_negatives:
            return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2
        return (apart(logits, texts) + apart(logits.T, texts)) / 2


def apart(logits: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Each pair of equal captions against those of other captions alone."""
    means = []
    for row, own in zip(logits, texts, strict=True):
        others = [value.exp() for value, text in zip(row, texts, strict=True) if text != own]
        same = [value for value, text in zip(row, texts, strict=True) if text == own]
        costs = [(value.exp() + sum(others)).log() - value for value in same]
        means.append(torch.stack(costs).mean())
    return torch.stack(means).mean()


def rate(chosen: FinetuneOptions, step: int, total: int) -> float:
    if step < chosen.warmup:
        return chosen.lr * (step + 1) / chosen.warmup
    return chosen.lr * (1 + math.cos(math.pi * (step - chosen.warmup) / (total - chosen.warmup))) / 2


def run_plainly(plain: Plain, chosen: FinetuneOptions) -> list[float]:
    """Losses; the trained values, or their average, are left in place."""
    n, size = len(plain.labels), chosen.batch_size
    per_epoch = n // size if chosen.drop_last else math.ceil(n / size)
    total = chosen.steps or (chosen.epochs or 0) * per_epoch
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings: dict[str, Any] = {"eps": chosen.eps, "weight_decay": chosen.weight_decay}
    optimizer = kinds[chosen.optimizer](plain.trained.values(), lr=1.0, **settings)
    average, late, losses = {k: p.detach().clone() for k, p in plain.trained.items()}, [], []
    for step in range(total):
        epoch, number = divmod(step, per_epoch)
        order = np.random.Generator(np.random.PCG64([chosen.seed, epoch])).permutation(n)
        plain.add_updates()
        loss = plain.loss(order[number * size :][:size], epoch)
        optimizer.zero_grad()
        loss.backward()
        if chosen.clip:
            torch.nn.utils.clip_grad_norm_(plain.trained.values(), chosen.clip)
        optimizer.param_groups[0]["lr"] = rate(chosen, step, total)
        optimizer.step()
        losses.append(loss.item())
        now = {name: p.detach().clone() for name, p in plain.trained.items()}
        average = {k: chosen.ema_decay * average[k] + (1 - chosen.ema_decay) * now[k] for k in now}
        late += [now] if number == per_epoch - 1 and step + 1 > chosen.swa_start * total else []
    means = {k: torch.stack([each[k] for each in late or [now]]).mean(dim=0) for k in now}
    left = {"none": now, "ema": average, "swa": means}[chosen.average]
    with torch.no_grad():
        for name, p in plain.trained.items():
            p.copy_(left[name])
        plain.add_updates()
    return losses


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_a_plain_loop(case: str, tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    changes = {"lr": 1e-2, "eps": 1e-2, "log_every": 1, "templates": str(tmp_path / "templates.txt")} | CASES[case]
    model, chosen, data = write_folder(tmp_path / "model", make_model()), options(**changes), Three()
    result = finetune(data, model, out=tmp_path / "run", options=chosen, device="cpu")
    head = load(result.start_head).linear() if chosen.objective == "cross_entropy" else None
    plain = Plain(data, chosen, head)
    assert [record["loss"] for record in log(tmp_path / "run")] == pytest.approx(run_plainly(plain, chosen), rel=1e-5)
    expected: dict[str, torch.Tensor] = plain.model.state_dict()
    expected |= {f"{path}.in_proj_weight": module.in_proj_weight for path, (module, *_) in plain.adapted.items()}
    found, start = weights(result.last), make_model().state_dict()
    assert found.keys() == expected.keys()
    largest = max(float((value - start[name]).abs().max()) for name, value in expected.items())
    assert largest > 1e-4 or chosen.train == ("head",)
    for name, value in expected.items():
        moved = (value - start[name]).abs().max()
        assert (found[name] - value).abs().max() <= 0.01 * moved + 1e-5 * largest + 1e-7, name
    if head is not None:
        fitted: Any = load(result.last_head).linear()
        for found_part, name in ((fitted.weights, "weights"), (fitted.bias, "bias")):
            np.testing.assert_allclose(found_part, plain.trained[name].detach().numpy(), rtol=1e-5, atol=1e-5)
