"""What each way of choosing gives on real CLIP features: ridge's alpha, kNN's k, beside the zero-shot head.

    python -m benchmarks.table_choosing DIR --out benchmarks/results

DIR is as for `benchmarks.table_heads`. Nothing is chosen on a test split. On ImageNet every head is compared with the
zero-shot head, of the same run, by a paired bootstrap over the test rows. Then few rows a class: heads that choose by
accuracy, NLL or squared error of held-out training rows. Last the transductive heads: TransCLIP on the zero-shot head
and on GDA, and EM-Dirichlet on batches of 3 to 10 of 100 classes of ImageNet (four such hundreds), and on 100 classes
at once.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import heads
from benchmarks.common import machine_facts, markdown_table, write_json
from benchmarks.table_heads import SETS, stores_of, zero_shot_head
from heads import GDA, KNN, EMDirichlet, Logistic, LPPlusPlus, Ridge, TipAdapter, TransCLIP, few_shot
from heads.estimators.base import METRICS
from heads.evaluation.compare import compare

IMAGENET = "imagenet_fewshot"
FEW: Mapping[str, Callable[..., Any]] = {
    "ridge": Ridge,
    "ridge, standardised": partial(Ridge, standardise=True),
    "logistic": Logistic,
    "logistic, standardised": partial(Logistic, standardise=True),
}
LOSSES = {label: (*METRICS, "squared_error") if "ridge" in label else METRICS for label in FEW}
WITH_TEXTS: Mapping[str, Callable[..., Any]] = {"gda": GDA, "tip_adapter": TipAdapter, "lp_plus_plus": LPPlusPlus}
ALONE: Mapping[str, Mapping[str, Any]] = {
    "ridge, squared error": {"metric": "squared_error"},
    "ridge, NLL": {"metric": "nll"},
    "ridge, accuracy": {"metric": "top1"},
}
NEIGHBOURS: Mapping[str, Mapping[str, Any]] = {
    "kNN, plain shares, accuracy": {"metric": "top1", "calibrate": False},
    "kNN, accuracy": {"metric": "top1"},
    "kNN, NLL": {},
}
TO_PRIOR: Mapping[str, Mapping[str, Any]] = {
    "ridge to prior, squared error, not added": {"metric": "squared_error", "add_prior": False},
    "ridge to prior, NLL, not added": {"metric": "nll", "add_prior": False},
    "ridge to prior, accuracy": {"metric": "top1"},
    "ridge to prior, NLL": {},
}

EM_STEPS = (5, 100, 1000, None)
"""Steps per round of EM-Dirichlet: the default, more, the authors' number, and None for the exact maximum."""


def of_set(folder: Path, name: str) -> list[dict[str, Any]]:
    """Ridge and kNN on one data set, with hyper-parameters chosen by leave-one-out and on the validation split."""
    stores, rows = stores_of(folder, name), []
    for split in (None, "val"):
        selection = None if split is None else stores[split]
        for kind, settings in ((Ridge, ALONE), (KNN, NEIGHBOURS)):
            for label, options in settings.items():
                began = time.process_time()
                head = kind(**options).fit(stores["train"], selection=selection)
                rows.append(_row(name, label, split, head, stores["test"], time.process_time() - began))
    return rows


def of_imagenet(folder: Path, draws: int = 2000) -> list[dict[str, Any]]:
    """Few-shot ImageNet: the zero-shot head, and ridge that shrinks towards it."""
    stores = stores_of(folder, IMAGENET)
    prior = zero_shot_head(folder, stores["train"])
    rows = [_row(IMAGENET, "zero-shot", None, prior, stores["test"], 0.0)]
    fits: dict[str, Callable[[], Any]] = {
        label: partial(Ridge(prior=prior, **options).fit, stores["train"]) for label, options in TO_PRIOR.items()
    }
    fits["gda"] = partial(GDA().fit, stores["train"], texts=prior)
    for metric in METRICS:
        fits[f"Tip-Adapter, {metric}"] = partial(TipAdapter(metric=metric).fit, stores["train"], texts=prior)
    for label, fit in fits.items():
        began = time.process_time()
        head = fit()
        rows.append(_row(IMAGENET, label, None, head, stores["test"], time.process_time() - began))
        (found,) = compare(prior, head, [stores["test"]], draws=draws)
        rows[-1]["against zero-shot"] = {key: found[key]["difference"] for key in ("top1", "nll")}
    return rows


def of_few_rows(folder: Path, name: str, shots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Mean accuracy and NLL over the draws, by rows per class, head and metric."""
    stores, found = stores_of(folder, name), []
    texts = {"texts": zero_shot_head(folder, stores["train"])} if name == IMAGENET else {}
    for k in shots:
        drawn = [few_shot(stores["train"], k, seed) for seed in seeds]
        for label, kind in (WITH_TEXTS if texts else FEW).items():
            for metric in METRICS if texts else LOSSES[label]:
                fits = [kind(metric=metric).fit(rows, **texts) for rows in drawn]
                rows = [heads.evaluate([head], [stores["test"]])[0] for head in fits]
                top1, nll = (float(np.mean([row[f"{name}:{what}"] for row in rows])) for what in ("top1", "nll"))
                found.append({"data": name, "shots": k, "head": label, "metric": metric, "top1": top1, "nll": nll})
    return found


def of_transduction(folder: Path, batches: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """TransCLIP on two heads, and EM-Dirichlet by batches of few classes; accuracy, beside the head it begins from."""
    stores = stores_of(folder, IMAGENET)
    texts, (T, t) = zero_shot_head(folder, stores["train"]), stores["test"].numpy()
    gda = GDA().fit(stores["train"], texts=texts).linear()
    found = []
    for label, start in (("zero-shot", texts), ("gda", gda)):
        adapted = TransCLIP().fit(T, texts=start)
        found.append((f"transclip on {label}", len(T), start.score(T, t), adapted.score(T, t)))
    X, y = stores["train"].numpy()
    chance, scores, width = np.random.default_rng(seed), [], min(100, len(texts.classnames))
    # The default number of steps was chosen on the first hundred: the four after it are shown.
    starts = [start for start in range(width, 5 * width, width) if start + width <= len(texts.classnames)] or [0]
    for batch in range(batches):
        first = starts[batch % len(starts)]
        few = texts.restrict(np.arange(first, first + width))
        classes = chance.choice(width, min(int(chance.integers(3, 11)), width), replace=False)
        rows = np.flatnonzero(np.isin(y, first + classes))
        own = [_em_score(X[rows], y[rows] - first, few, steps) for steps in EM_STEPS]
        scores.append([len(rows), few.score(X[rows], y[rows] - first), *own])
    n, before, *after = np.mean(scores, axis=0)
    for steps, score in zip(EM_STEPS, after, strict=True):
        found.append((f"em_dirichlet, mm_steps={steps}, {batches} batches of 3 to 10 classes", n, before, score))
    few, rows = texts.restrict(np.arange(width)), np.flatnonzero(y < width)
    found.append(
        ("em_dirichlet, all classes", len(rows), few.score(X[rows], y[rows]), _em_score(X[rows], y[rows], few, 5))
    )
    return [dict(zip(("head", "rows", "before", "top1"), row, strict=True)) for row in found]


def _em_score(X: Any, y: Any, texts: Any, mm_steps: int | None) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many classes at once, which are shown on purpose
        return float(EMDirichlet(mm_steps=mm_steps).fit(X, texts=texts).score(X, y))


def _row(data: str, label: str, split: str | None, head: Any, test: Any, seconds: float) -> dict[str, Any]:
    (row,) = heads.evaluate([head], [test])
    found = {"data": data, "head": label, "chosen on": split or "training rows"}
    return {**found, "top1": row[f"{data}:top1"], "nll": row[f"{data}:nll"], "cpu_s": seconds, "params": row["params"]}


def page(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    found = []
    for row in (row for row in rows if "chosen on" in row):
        against = "–"
        if "against zero-shot" in row:
            value, low, high = (100 * v for v in row["against zero-shot"]["top1"])
            against = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        found.append([row["data"], row["head"], row["chosen on"], f"{100 * row['top1']:.1f}", f"{row['nll']:.3f}"])
        found[-1] += (against, f"{row['cpu_s']:.1f}")
    head = ["data", "head", "chosen on", "accuracy, %", "NLL", "accuracy against zero-shot", "CPU, s"]
    parts = [
        "# Ways of choosing, on real CLIP features",
        f"ViT-B/32 features of OpenAI's CLIP; {facts['cpu']}, {facts['cores']} cores, {facts['date']}. CPU seconds "
        "are those of the fit. Differences against zero-shot have 95% paired bootstrap intervals.",
        markdown_table(head, found, left=3),
    ]
    if few := [row for row in rows if "shots" in row]:
        settings = [[row["data"], str(row["shots"]), row["head"], row["metric"]] for row in few]
        figures = [[f"{100 * row['top1']:.1f}", f"{row['nll']:.3f}"] for row in few]
        cells = [setting + figure for setting, figure in zip(settings, figures, strict=True)]
        parts += ["Few rows per class, chosen on held-out ones of them; means over the draws (one of ImageNet)."]
        parts += [markdown_table(["data", "rows per class", "head", "chosen by", "accuracy, %", "NLL"], cells, left=4)]
    if transductive := [row for row in rows if "before" in row]:
        cells = [
            [row["head"], f"{row['rows']:.0f}", f"{100 * row['before']:.1f}", f"{100 * row['top1']:.1f}"]
            for row in transductive
        ]
        parts += ["Transductive heads on ImageNet, and the head that each begins from."]
        parts += [markdown_table(["head", "rows at once", "accuracy before, %", "accuracy, %"], cells)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for choosing.md and choosing.json")
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--no-imagenet", action="store_true")
    parser.add_argument("--shots", nargs="*", type=int, default=(1, 2, 4), help="rows per class of the second table")
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2), help="its draws")
    args = parser.parse_args(arguments)
    rows = [row for name in args.sets for row in of_set(args.folder, name)]
    rows += [] if args.no_imagenet else of_imagenet(args.folder)
    rows += [row for name in args.sets for row in of_few_rows(args.folder, name, args.shots, args.seeds)]
    if not args.no_imagenet:
        rows += of_few_rows(args.folder, IMAGENET, args.shots, args.seeds[:1]) + of_transduction(args.folder)
    facts = machine_facts()
    write_json(args.out / "choosing.json", {"machine": facts, "rows": rows})
    text = page(rows, facts)
    (args.out / "choosing.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
