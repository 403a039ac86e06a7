"""featcache in one file: the core of the library in plain numpy, torch and open_clip, without its speed and checks.

    python examples/featcache_in_one_file.py local-dir:MODEL_FOLDER TRAIN_FOLDER TEST_FOLDER "a photo of a {}."

Encode class folders of images once and keep the features; build a zero-shot head from prompts and a ridge head with
alpha chosen by exact leave-one-out; report accuracy. tests/test_example.py compares the results with the library's.
"""

import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

ALPHAS = np.logspace(-3, 3, 25)


def unit(rows):
    """Rows (N, D) divided by their L2 norms."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@torch.no_grad()
def encode(model, preprocess, folder, cache):
    """Features (N, D) float16 of unit length, labels (N,) and names of a folder of class folders; encoded once."""
    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    if not Path(cache).exists():
        paths = [(path, c) for c, name in enumerate(classes) for path in sorted((Path(folder) / name).iterdir())]
        rows = []
        for start in range(0, len(paths), 64):
            images = torch.stack([preprocess(Image.open(path)) for path, _ in paths[start : start + 64]])
            rows.append(model.encode_image(images).float().numpy())
        labels = np.array([c for _, c in paths])
        np.savez(cache, features=unit(np.concatenate(rows)).astype(np.float16), labels=labels)
    with np.load(cache) as file:
        return file["features"], file["labels"], classes


@torch.no_grad()
def zero_shot(model, tokenizer, classes, templates):
    """Weights (C, D): the normalised mean of each class's normalised prompts, times the logit scale."""
    prompts = [[template.format(name) for template in templates] for name in classes]
    texts = [unit(model.encode_text(tokenizer(of_class)).float().numpy()) for of_class in prompts]
    return model.logit_scale.exp().item() * unit(np.stack([rows.mean(axis=0) for rows in texts]))


def ridge(X, labels, n_classes, alphas=ALPHAS):
    """Weights (C, D), intercept (C,) and alpha of one-hot ridge regression; alpha by exact leave-one-out."""
    X, Y = X.astype(np.float64), np.eye(n_classes)[labels]
    centred, means = X - X.mean(axis=0), (X.mean(axis=0), Y.mean(axis=0))
    s, V = np.linalg.eigh(centred.T @ centred)
    projected = centred @ V  # (N, D): every alpha rescales its columns
    errors = []
    for alpha in alphas:
        fitted = means[1] + projected @ ((projected.T @ (Y - means[1])) / (s + alpha)[:, None])
        leverage = 1 / len(X) + (projected**2 / (s + alpha)).sum(axis=1)
        errors.append((((Y - fitted) / (1 - leverage)[:, None]) ** 2).mean())
    alpha = alphas[int(np.argmin(errors))]
    weights = (V @ ((projected.T @ (Y - means[1])) / (s + alpha)[:, None])).T
    return weights, means[1] - weights @ means[0], alpha


def main(name, train, test, *templates):
    """Fit both heads and print their accuracy on the test folder."""
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    X, labels, classes = encode(model, preprocess, train, "train-features.npz")
    X_test, labels_test, _ = encode(model, preprocess, test, "test-features.npz")
    weights, intercept, alpha = ridge(X, labels, len(classes))
    scores = {"zero-shot": X_test @ zero_shot(model, tokenizer, classes, templates).T}
    scores[f"ridge, alpha {alpha:.3g}"] = X_test @ weights.T + intercept
    for head, rows in scores.items():
        print(f"{head}: {100 * (rows.argmax(axis=1) == labels_test).mean():.2f}% of {len(rows):,} images")


if __name__ == "__main__":
    sys.exit(__doc__) if len(sys.argv) < 5 else main(*sys.argv[1:])
