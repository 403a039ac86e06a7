"""What a trained model scores: on held-out fonts (for choices) and on scikit-learn's digits (reported only)."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import train_test_split
from torch import Tensor

from tools.train_tiny import model
from tools.train_tiny.augment import IMAGE_SIZE
from tools.train_tiny.captions import DIGIT_WORDS
from tools.train_tiny.data import Ints

TEMPLATES = (
    'a photo of the number: "{}".',
    "a photo of the number {}.",
    "the digit {}",
    "the number {}",
    "a low resolution image of the digit {}",
    "a handwritten {}",
    "a blurry photo of the digit {}.",
)
ALPHAS = np.logspace(-4, 3, 15)


@torch.no_grad()
def image_features(net: CLIP, images: Tensor, batch: int = 256) -> Tensor:
    """L2-normalised features ``(N, D)`` of images ``(N, 3, 32, 32)`` in 0..1."""
    pixels = (images - model.MEAN) / model.STD
    return torch.cat([F.normalize(net.encode_image(part), dim=-1) for part in torch.split(pixels, batch)])


@torch.no_grad()
def class_weights(net: CLIP, tokenize: open_clip.SimpleTokenizer, templates: Sequence[str]) -> Tensor:
    """Zero-shot weights ``(10, D)``: mean over the templates of the normalised text features, normalised."""
    prompts = [template.format(word) for word in DIGIT_WORDS for template in templates]
    features = F.normalize(net.encode_text(tokenize(prompts)), dim=-1).view(10, len(templates), -1)
    return F.normalize(features.mean(1), dim=-1)


def accuracy(features: Tensor, weights: Tensor, labels: Ints) -> float:
    """Share of rows whose largest logit is the label's."""
    return float(((features @ weights.T).argmax(1).numpy() == labels).mean())


def held_out(net: CLIP, tokenize: open_clip.SimpleTokenizer, sets: dict[str, tuple[Tensor, Ints]]) -> dict[str, float]:
    """Zero-shot accuracy on each validation look of the held-out fonts, and their mean."""
    weights = class_weights(net, tokenize, TEMPLATES)
    scores = {name: accuracy(image_features(net, x), weights, y) for name, (x, y) in sets.items()}
    return scores | {"mean": float(np.mean(list(scores.values())))}


def template_scores(
    net: CLIP, tokenize: open_clip.SimpleTokenizer, sets: dict[str, tuple[Tensor, Ints]]
) -> dict[str, float]:
    """Mean held-out-font accuracy of each template alone."""
    features = {name: (image_features(net, x), y) for name, (x, y) in sets.items()}
    weights = {t: class_weights(net, tokenize, [t]) for t in TEMPLATES}
    return {t: float(np.mean([accuracy(x, w, y) for x, y in features.values()])) for t, w in weights.items()}


def digit_images() -> tuple[Tensor, Ints]:
    """scikit-learn's digits ``(1797, 3, 32, 32)``: 0..16 becomes 0..1, upsampled 8 -> 32 bicubically, not rounded."""
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images.astype(np.float32))[:, None] * (255 / 16)
    large = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True) / 255
    return large.expand(-1, 3, -1, -1), bunch.target.astype(np.int64)


def digit_scores(net: CLIP, tokenize: open_clip.SimpleTokenizer) -> dict[str, Any]:
    """Zero-shot top-1 on all digits, templates together and the first alone; ridge on a fixed quarter held back."""
    images, labels = digit_images()
    features = image_features(net, images)
    train_x, test_x, train_y, test_y = train_test_split(
        features.numpy(), labels, test_size=0.25, random_state=0, stratify=labels
    )
    ridge = RidgeClassifierCV(alphas=ALPHAS).fit(train_x, train_y)
    together = class_weights(net, tokenize, TEMPLATES)
    first = class_weights(net, tokenize, TEMPLATES[:1])
    return {
        "zero_shot_top1": round(accuracy(features, together, labels), 4),
        "zero_shot_top1_first_template": round(accuracy(features, first, labels), 4),
        "ridge_top1": round(float(ridge.score(test_x, test_y)), 4),
        "ridge_alpha": float(ridge.alpha_),
    }


def machine_facts() -> dict[str, Any]:
    """Processor, threads and versions that the figures were made with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "python": platform.python_version(),
    }
