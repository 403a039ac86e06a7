"""The heads that take longest, on few-shot ImageNet: LP++, Tip-Adapter-F, logistic with C by folds.

    python -m benchmarks.bench_slow_heads FOLDER --out slow-heads.json

FOLDER contains ``imagenet_fewshot.npz``; without it, random rows of that size are used. Each head is fitted once and
compared with a plain torch implementation of the same training (autograd, one fold after another; for logistic, every C
of the path on every fold, each to its optimum). The record also has CPU seconds, which depend less on other load, and
whether both chose the same setting.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import heads
from benchmarks.common import machine_facts, print_facts, write_json
from heads import LinearHead
from heads.estimators.few_shot.base import validation_folds
from heads.estimators.few_shot.lp_plus_plus import HELD_ROWS
from heads.estimators.logistic.choice import FOLD_TOL
from heads.estimators.logistic.classifier import CS

Rows = tuple[NDArray[np.floating], NDArray[np.int64], LinearHead]


def few_shot_rows(folder: Path | None, classes: int, dim: int = 512) -> Rows:
    """Features, labels and a zero-shot head: real ones of the first classes, or random ones."""
    if folder is not None:
        with np.load(folder / "imagenet_fewshot.npz") as file:
            X, y = file["train_features"], file["train_labels"].astype(np.int64)
            vectors = file["text_weights"][:classes].astype(np.float32)
        X, y = X[y < classes], y[y < classes]
    else:
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(classes, dim)).astype(np.float32)
        y = np.repeat(np.arange(classes), 4)
        X = (vectors[y] + rng.normal(size=(len(y), dim))).astype(np.float32)
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = tuple(f"class {c}" for c in range(classes))
    return X, y, LinearHead(100 * vectors, np.zeros(classes, np.float32), names)


def plain_lp(rows: Rows, steps: int) -> int:
    """The number of steps that LP++ chooses by folds, by autograd."""
    X, y, text = torch.from_numpy(rows[0].astype(np.float32)), torch.from_numpy(rows[1]), rows[2]
    T = torch.nn.functional.normalize(torch.from_numpy(text.weights), dim=1)
    folds = validation_folds(rows[1], len(T))
    assert folds is not None
    hits, nll, held = np.zeros(steps), np.zeros(steps), 0
    for k in range(int(folds[0].max()) + 1):
        kept, out = (torch.from_numpy(mask) for mask in (folds[0] != k, (folds[0] == k) & folds[1]))
        if held >= HELD_ROWS:
            break
        held += int(out.sum())
        F, labels, V, v = X[kept], y[kept], X[out], y[out]
        G, onehot, n = F @ T.T, torch.nn.functional.one_hot(labels, len(T)).float(), len(F)
        w, b = (onehot.T @ F).requires_grad_(), torch.zeros(len(T), requires_grad=True)
        present = onehot.sum(0) > 0
        start = 250 * ((onehot * G).sum(0)[present] / onehot.sum(0)[present]).mean()
        blend = torch.full((len(T),), float(start), requires_grad=True)
        sgd = torch.optim.SGD([w, b], float(4 * n / torch.linalg.eigvalsh(F.double().T @ F.double())[-1]), momentum=0.9)
        for step in range(1, steps + 1):
            blend.grad = None
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(F @ w.T + b + blend * G, labels).backward()
            sgd.step()
            if step % 10 == 0 and blend.grad is not None:
                blend.data -= n / (4 * (G**2).sum(0).max()) * blend.grad  # type: ignore[unreachable]  # filled by backward()
            with torch.no_grad():
                logits = V @ w.T + b + blend * (V @ T.T)
                hits[step - 1] += int((logits.argmax(1) == v).sum())
                nll[step - 1] += float(torch.nn.functional.cross_entropy(logits, v, reduction="sum"))
    return int(np.lexsort((nll, -hits))[0]) + 1


def plain_keys(rows: Rows, epochs: int) -> float:
    """Mean loss after training Tip-Adapter-F's keys on all rows and on the rows of every fold, by autograd."""
    folds = validation_folds(rows[1], len(rows[2].classnames))
    assert folds is not None
    losses = []
    for k in range(-1, int(folds[0].max()) + 1):
        X, y = torch.from_numpy(rows[0].astype(np.float32)[folds[0] != k]), torch.from_numpy(rows[1][folds[0] != k])
        V = torch.nn.functional.normalize(X, dim=1)
        base = X @ torch.from_numpy(rows[2].weights).T
        keys = V.clone().requires_grad_()
        optimiser = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
        values = torch.nn.functional.one_hot(y, base.shape[1]).float()
        for _ in range(epochs):
            for batch in torch.randperm(len(V)).split(256):
                votes = torch.exp(5.5 * (V[batch] @ keys.T - 1)).scatter(1, batch[:, None], 0.0) @ values
                loss = torch.nn.functional.cross_entropy(base[batch] + votes, y[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def whole_path(rows: Rows) -> float:
    """The C chosen by folds on the whole path, with the same solver but without early stopping of paths."""
    with_all = [*CS[:-1], CS[-1] * (1 + 1e-12)]
    return float(heads.Logistic(with_all, tol=FOLD_TOL).fit(rows[0], rows[1]).C_)


def timed(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, CPU seconds, and the chosen setting."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "found": found}


def bench(rows: Rows, names: Sequence[str], steps: int, epochs: int, *, plain: bool) -> dict[str, Any]:
    """All heads, and the plain implementations unless left out."""
    X, y, text = rows
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "lp_plus_plus": (
            lambda: heads.LPPlusPlus(steps=steps).fit(X, y, texts=text).steps_,
            lambda: plain_lp(rows, steps),
        ),
        "tip_adapter_f": (
            lambda: heads.TipAdapterF(epochs=epochs).fit(X, y, texts=text).alpha_,
            lambda: plain_keys(rows, epochs),
        ),
        "logistic": (lambda: float(heads.Logistic().fit(X, y).C_), lambda: whole_path(rows)),
    }
    results = {}
    for name in names:
        ours, reference = pairs[name]
        results[name] = {"featcache": timed(ours)} | ({"plain": timed(reference)} if plain else {})
        for label, found in results[name].items():
            said = f"{found['seconds']:8.1f} s, {found['cpu_seconds']:8.1f} CPU s, found {found['found']}"
            print(f"{name:>14} {label:>10}: {said}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="holds imagenet_fewshot.npz; drawn rows without it")
    parser.add_argument("--heads", nargs="*", default=["lp_plus_plus", "tip_adapter_f", "logistic"])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300, help="of LP++")
    parser.add_argument("--epochs", type=int, default=20, help="of Tip-Adapter-F")
    parser.add_argument("--no-plain", action="store_true", help="featcache's heads alone")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    facts = machine_facts()
    print_facts(facts)
    rows = few_shot_rows(args.folder, args.classes)
    found = bench(rows, args.heads, args.steps, args.epochs, plain=not args.no_plain)
    if args.out:
        write_json(args.out, {"machine": facts, "rows": len(rows[1]), "classes": args.classes, "heads": found})


if __name__ == "__main__":
    main()
