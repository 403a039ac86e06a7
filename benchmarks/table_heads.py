"""Tables of all heads on real CLIP features: full data beside scikit-learn, few-shot curves, few-shot ImageNet.

    python -m benchmarks.table_heads DIR --out benchmarks/results

DIR holds .npz files of features and labels (``oxford_pets.npz``, ``oxford_flowers.npz``, ``ucf101.npz`` with train,
val and test; ``imagenet_fewshot.npz`` with train, test and ``text_weights``). Nothing is chosen on a test split: on
full data hyper-parameters come from each head's own folds of the train split; few-shot fits draw min(k, 4) rows per
class of val to choose on, as CoOp does; on ImageNet everything is chosen by folds of the train split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

import heads
from benchmarks.common import machine_facts
from heads import LinearHead, Material, ResidentStore, fit_head
from heads.evaluation.compare import compare
from heads.sweeps.plan import HeadGrid, Splits, SweepPlan
from heads.sweeps.run import run_sweep

SETS = ("oxford_pets", "oxford_flowers", "ucf101")
IMAGE_HEADS = ("ridge", "logistic", "discriminant", "nearest_mean", "knn")
SHOTS, SEEDS = (1, 2, 4, 8, 16), (0, 1, 2)
ROWS_ALONE = ("ridge", "logistic", "discriminant", "nearest_mean")
LOGIT_SCALE = 100.0


def stores_of(folder: Path, name: str) -> dict[str, ResidentStore]:
    """The splits of one file as stores in memory."""
    with np.load(folder / f"{name}.npz") as file:
        classes = tuple(f"class {c}" for c in range(int(file["train_labels"].max()) + 1))
        return {
            split: ResidentStore(
                file[f"{split}_features"],
                file[f"{split}_labels"].astype(np.int64),
                classes,
                name,
                split,
                encoder_key="ViT-B-32/openai",
                text_digests=("ViT-B-32/openai",),
                dataset_key=f"{name}/{split}",
                labels_digest=f"{name}/{split}",
            )
            for split in ("train", "val", "test")
            if f"{split}_features" in file
        }


def full_data(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every head that needs no texts, fitted on the whole train split, and scikit-learn's with the same choices."""
    rows = []
    for name in names:
        stores = stores_of(folder, name)
        for head in IMAGE_HEADS:
            fitted = fit_head(head, Material(stores["train"]))
            (row,) = heads.evaluate([fitted], [stores["test"]])
            rows.append(_full_row(name, head, row[f"{name}:top1"], row[f"{name}:nll"], row["params"]))
            rows.append(_peer(name, head, fitted, stores))
    return rows


def _full_row(data: str, head: str, top1: float, nll: float | None, params: Any) -> dict[str, Any]:
    return {"data": data, "head": head, "top1": top1, "nll": nll, "params": params}


def _peer(name: str, head: str, fitted: Any, stores: Mapping[str, ResidentStore]) -> dict[str, Any]:
    """scikit-learn's estimator at the hyper-parameters that our head chose; NLL where it gives probabilities."""
    peers: dict[str, Any] = {
        "ridge": lambda: RidgeClassifierCV(alphas=heads.Ridge().alphas),
        "logistic": lambda: LogisticRegression(C=fitted.C_, tol=1e-6, max_iter=10_000),
        "discriminant": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=fitted.shrinkage_),
        "nearest_mean": NearestCentroid,
        "knn": lambda: KNeighborsClassifier(
            fitted.n_neighbors_, metric="cosine", weights=lambda d: np.exp(-d / fitted.temperature)
        ),
    }
    (train, labels), (test, truth) = (stores[split].numpy(np.float64) for split in ("train", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lbfgs at its iteration limit
        peer = peers[head]().fit(train, labels)
    proba = head != "nearest_mean" and hasattr(peer, "predict_proba")
    nll = (
        float(log_loss(truth, np.clip(peer.predict_proba(test), 1e-12, None), labels=peer.classes_)) if proba else None
    )
    return _full_row(name, f"scikit-learn {type(peer).__name__}", float(peer.score(test, truth)), nll, {})


def few_shot_curves(
    folder: Path, names: Sequence[str], shots: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """The sweep of all heads over shots and seeds; 16 shots are all rows, so that its seeds differ in val alone."""
    opened = {f"{name}/{split}": store for name in names for split, store in stores_of(folder, name).items()}
    data = tuple(Splits(f"{name}/train", (f"{name}/test",), f"{name}/val") for name in names)
    plan = SweepPlan(
        tuple(HeadGrid(head) for head in IMAGE_HEADS), data, shots=tuple(shots), seeds=tuple(seeds), select_shots=4
    )
    with tempfile.TemporaryDirectory() as scratch:
        return run_sweep(plan, opened.__getitem__, Path(scratch) / "rows.jsonl", print)


def zero_shot_head(folder: Path, train: ResidentStore) -> LinearHead:
    """The head of the class vectors in ``imagenet_fewshot.npz``."""
    with np.load(folder / "imagenet_fewshot.npz") as file:
        weights = LOGIT_SCALE * file["text_weights"].astype(np.float32)
    identity = {"head": "zero_shot", "text_digest": "ViT-B-32/openai", "encoder_key": None, "fitted_on": []}
    return LinearHead(weights, np.zeros(len(weights)), train.classnames, name="zero_shot", provenance=identity)


def imagenet(folder: Path, draws: int = 2000) -> list[dict[str, Any]]:
    """Few-shot ImageNet with a text head: each way of combining both, against zero-shot and against rows alone."""
    stores = stores_of(folder, "imagenet_fewshot")
    train, test = stores["train"], stores["test"]
    zero_shot = zero_shot_head(folder, train)
    alone: dict[str, Any] = {name: heads.HEADS[name]() for name in ROWS_ALONE}
    for name, head in alone.items():
        _fitted(name, head.fit, train)
    fits: dict[str, tuple[Callable[[], Any], str]] = {
        "ridge to prior": (heads.Ridge(prior=zero_shot).fit, "ridge"),
        "logistic to prior": (heads.Logistic(prior=zero_shot).fit, "logistic"),
        **{
            f"{name}, alpha by folds": (partial(heads.interpolate_by_folds, zero_shot, heads.settled(head)), name)
            for name, head in alone.items()
        },
        "Tip-Adapter": (partial(heads.TipAdapter().fit, texts=zero_shot), "ridge"),
        "Tip-Adapter-F": (partial(heads.TipAdapterF().fit, texts=zero_shot), "ridge"),
        "LP++": (partial(heads.LPPlusPlus().fit, texts=zero_shot), "logistic"),
    }
    rows = [_single(name, head, test) for name, head in {"zero_shot": zero_shot, **alone}.items()]
    for name, (fit, parent) in fits.items():
        head = _fitted(name, fit, train)
        row = _single(name, head, test)
        for other, base in (("zero_shot", zero_shot), (parent, alone[parent])):
            (found,) = compare(base, head, [test], draws=draws)
            row[f"against {other}"] = {
                "top1": found["top1"]["difference"],
                "nll": found["nll"]["difference"],
                "mcnemar_p": found["mcnemar"]["p"],
            }
        rows.append(row)
    return rows


def _fitted(name: str, fit: Callable[[Any], Any], train: ResidentStore) -> Any:
    """The fitted head, and a line on the screen: some take minutes."""
    began = time.perf_counter()
    head = fit(train)
    print(f"imagenet, {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return head


def _single(name: str, head: Any, test: ResidentStore) -> dict[str, Any]:
    (row,) = heads.evaluate([head], [test])
    found = {"top1": row[f"{test.name}:top1"], "nll": row[f"{test.name}:nll"], "alpha": row.get("alpha")}
    return {"head": name, **found, "params": row["params"]}


def _signed(values: Sequence[float], factor: float, digits: int) -> str:
    value, low, high = (factor * v for v in values)
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def page(full: Sequence[Any], curves: Sequence[Any], few: Sequence[Any], facts: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Heads on real CLIP features",
        f"ViT-B/32 features of OpenAI's CLIP; {facts['cpu']}, {facts['cores']} cores, {facts['date']}.",
        "## Full train split (16 rows per class), chosen by folds of it",
        "scikit-learn runs in float64 at the hyper-parameters that our head chose (ridge: its own choice from the same "
        "path). A dash: the estimator gives no probabilities.",
        "| data | head | accuracy, % | NLL |\n|:---|:---|---:|---:|",
    ]
    lines[-1] += "".join(
        f"\n| {row['data']} | {row['head']} | {100 * row['top1']:.2f} | "
        f"{'–' if row['nll'] is None else format(row['nll'], '.3f')} |"
        for row in full
    )
    if curves:
        lines += [
            "## Few shots",
            "Mean ± standard deviation over seeds; hyper-parameters chosen on min(k, 4) rows per class of val.",
            "Accuracy, %, by rows per class:",
            _curves(curves, "top1", 100, 1),
            "NLL, by rows per class:",
            _curves(curves, "nll", 1, 3),
        ]
    if few:
        lines += ["## ImageNet, four rows per class, 1,000 test rows", _imagenet_table(few), _verdict(few)]
    return "\n\n".join(lines) + "\n"


def _curves(rows: Sequence[Mapping[str, Any]], metric: str, factor: float, digits: int) -> str:
    """A line a data set and head, a column a number of shots."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        data = row["data"].partition("/")[0]
        values = found.setdefault((data, row["head"]), {}).setdefault(row["shots"], [])
        values.append(factor * row[f"{data}:{metric}"])
    shots = sorted({row["shots"] for row in rows})
    lines = [f"| data | head | {' | '.join(map(str, shots))} |", "|:---|:---" + "|---:" * len(shots) + "|"]
    for (data, head), columns in found.items():
        spread = {k: np.std(values, ddof=1) if len(values) > 1 else 0.0 for k, values in columns.items()}
        cells = [f"{np.mean(columns[k]):.{digits}f} ± {spread[k]:.{digits}f}" for k in shots]
        lines.append(f"| {data} | {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _imagenet_table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = ("head", "accuracy, %", "NLL", "accuracy against zero-shot", "against rows alone", "NLL against zero-shot")
    lines = [f"| {' | '.join(shown)} |", "|:---|---:|---:|---:|---:|---:|"]
    for row in rows:
        against = [value for key, value in row.items() if key.startswith("against ")]
        cells = ["–"] * 3
        if against:
            cells = [_signed(found["top1"], 100, 1) for found in against] + [_signed(against[0]["nll"], 1, 3)]
        lines.append(f"| {row['head']} | {100 * row['top1']:.1f} | {row['nll']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which intervals of accuracy exclude zero, said in words; a null result is stated as one."""
    lines = ["95% paired bootstrap intervals of accuracy:"]
    for parent in ("zero_shot", "rows alone"):
        said: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
        for row in rows:
            for key in (key for key in row if key.startswith("against ")):
                if (key == "against zero_shot") == (parent == "zero_shot"):
                    _, low, high = row[key]["top1"]
                    said["above" if low > 0 else "below" if high < 0 else "not told apart from"].append(row["head"])
        lines += [f"- {how} {parent}: {'; '.join(names) or 'none'}" for how, names in said.items()]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for heads-table.md and heads-table.json")
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--shots", nargs="*", type=int, default=SHOTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--no-imagenet", action="store_true")
    args = parser.parse_args(arguments)
    facts = machine_facts()
    full = full_data(args.folder, args.sets)
    curves = few_shot_curves(args.folder, args.sets, args.shots, args.seeds) if args.shots else []
    few = [] if args.no_imagenet else imagenet(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "full": full, "few_shot": curves, "imagenet": few}
    (args.out / "heads-table.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    text = page(full, curves, few, facts)
    (args.out / "heads-table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
