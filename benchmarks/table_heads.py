"""Tables of all heads on real CLIP features: full data compared with scikit-learn, few-shot curves, few-shot ImageNet.

    python -m benchmarks.table_heads DIR --out benchmarks/results

DIR holds .npz files of features and labels (``oxford_pets.npz``, ``oxford_flowers.npz``, ``ucf101.npz`` with train,
val and test; ``imagenet_fewshot.npz`` with train, test and ``text_weights``). Nothing is chosen on a test split: on
full data hyper-parameters come from each head's own folds of the train split; few-shot fits draw min(k, 4) rows per
class of val to choose on, as CoOp does; on ImageNet everything is chosen by folds of the train split.

Heads that need texts are fitted on ImageNet alone, the one file that has them. Every finished row is kept in files
under ``--work``: the same command resumes from there, and fits heads that were added since.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

import heads
from benchmarks.common import Kept, machine_facts, markdown_table
from heads import LinearHead, Material, ResidentStore, few_shot, fit_head
from heads.estimators.catalogue import make_head
from heads.evaluation.compare import compare
from heads.sweeps.plan import HeadGrid, Splits, SweepPlan
from heads.sweeps.run import run_sweep

SETS = ("oxford_pets", "oxford_flowers", "ucf101")
IMAGE_HEADS = (
    HeadGrid("ridge"),
    HeadGrid("logistic"),
    HeadGrid("discriminant"),
    HeadGrid("nearest_mean"),
    HeadGrid("knn"),
    HeadGrid("adamw"),
    HeadGrid("sgd"),
    HeadGrid("cosine"),
    *(HeadGrid(name, {"standardise": True}) for name in ("ridge", "logistic", "adamw")),
)
"""Heads fitted on images only, with settings that differ from the defaults."""
USUAL = "logistic"  # the probe that most papers report; the others are compared with it
SHOTS, SEEDS, IMAGENET_SHOTS = (1, 2, 4, 8, 16), (0, 1, 2), (1, 2, 4)
ROWS_ALONE = ("ridge", "logistic", "discriminant", "nearest_mean")
TEXT_HEADS = {
    "gda": "discriminant",
    "tip_adapter": "ridge",
    "tip_adapter_f": "ridge",
    "lp_plus_plus": "discriminant",
    "clap": "discriminant",
    "taskres": "discriminant",
    "prolip": "discriminant",
}
"""Heads fitted on images and texts, and the image-only head that each is compared with."""
TRANSDUCTIVE = ("transclip", "label_propagation")
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


def label_of(head: str, setting: Mapping[str, Any]) -> str:
    """Name of a head with its settings in the tables."""
    return ", ".join([head, *(f"{name}={value}" for name, value in setting.items())])


def full_data(folder: Path, names: Sequence[str], kept: Kept, draws: int = 2000) -> list[dict[str, Any]]:
    """All image-only heads fitted on the whole train split, and scikit-learn's with the same hyper-parameters."""
    rows = []
    for name in names:
        stores = stores_of(folder, name)
        fit = cache(partial(_fit_full, Material(stores["train"])))
        for place, grid in enumerate(IMAGE_HEADS):
            label = label_of(grid.name, grid.fixed)
            rows += kept(f"{name}: {label}", partial(_full_rows, name, place, fit, stores, draws))
    return rows


def _fit_full(train: Material, place: int) -> Any:
    return fit_head(IMAGE_HEADS[place].name, train, IMAGE_HEADS[place].fixed)


def _full_rows(
    data: str, place: int, fit: Callable[[int], Any], stores: Mapping[str, ResidentStore], draws: int
) -> list[dict[str, Any]]:
    """The row of a head compared with the usual probe, and the row of scikit-learn's estimator if there is one."""
    grid, test = IMAGE_HEADS[place], stores["test"]
    fitted = fit(place)
    (row,) = heads.evaluate([fitted], [test])
    label = label_of(grid.name, grid.fixed)
    found = _full_row(data, label, row[f"{data}:top1"], row[f"{data}:nll"], row["params"])
    if label != USUAL:
        (usual,) = (place for place, other in enumerate(IMAGE_HEADS) if label_of(other.name, other.fixed) == USUAL)
        (compared,) = compare(fit(usual), fitted, [test], draws=draws)
        found[f"against {USUAL}"] = {"top1": compared["top1"]["difference"], "nll": compared["nll"]["difference"]}
    return [found] if grid.fixed or grid.name not in PEERS else [found, _peer(data, grid.name, fitted, stores)]


def _full_row(data: str, head: str, top1: float, nll: float | None, params: Any) -> dict[str, Any]:
    return {"data": data, "head": head, "top1": top1, "nll": nll, "params": params}


PEERS: Mapping[str, Callable[[Any], Any]] = {
    "ridge": lambda fitted: RidgeClassifierCV(alphas=heads.Ridge().alphas),
    "logistic": lambda fitted: LogisticRegression(C=fitted.C_, tol=1e-6, max_iter=10_000),
    "discriminant": lambda fitted: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=fitted.shrinkage_),
    "nearest_mean": lambda fitted: NearestCentroid(),
    "knn": lambda fitted: KNeighborsClassifier(
        fitted.n_neighbors_, metric="cosine", weights=lambda d: np.exp(-d / fitted.temperature)
    ),
}
"""scikit-learn's estimators at the hyper-parameters of our fitted head."""


def _peer(name: str, head: str, fitted: Any, stores: Mapping[str, ResidentStore]) -> dict[str, Any]:
    """scikit-learn's estimator at the hyper-parameters that our head chose; NLL if it has probabilities."""
    (train, labels), (test, truth) = (stores[split].numpy(np.float64) for split in ("train", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lbfgs at its iteration limit
        peer = PEERS[head](fitted).fit(train, labels)
    proba = head != "nearest_mean" and hasattr(peer, "predict_proba")
    nll = (
        float(log_loss(truth, np.clip(peer.predict_proba(test), 1e-12, None), labels=peer.classes_)) if proba else None
    )
    return _full_row(name, f"scikit-learn {type(peer).__name__}", float(peer.score(test, truth)), nll, {})


def few_shot_curves(
    folder: Path, names: Sequence[str], shots: Sequence[int], seeds: Sequence[int], results: Path
) -> list[dict[str, Any]]:
    """The sweep of all heads over shots and seeds; 16 shots are all rows, so their seeds differ only in val."""
    opened = {f"{name}/{split}": store for name in names for split, store in stores_of(folder, name).items()}
    data = tuple(Splits(f"{name}/train", (f"{name}/test",), f"{name}/val") for name in names)
    plan = SweepPlan(IMAGE_HEADS, data, shots=tuple(shots), seeds=tuple(seeds), select_shots=4)
    return run_sweep(plan, opened.__getitem__, results, partial(print, flush=True))


def zero_shot_head(folder: Path, train: ResidentStore) -> LinearHead:
    """The head of the class vectors in ``imagenet_fewshot.npz``."""
    with np.load(folder / "imagenet_fewshot.npz") as file:
        weights = LOGIT_SCALE * file["text_weights"].astype(np.float32)
    identity: Any = {"head": "zero_shot", "text_digest": "ViT-B-32/openai", "encoder_key": None, "fitted_on": []}
    bias = np.zeros(len(weights), np.float32)
    return LinearHead(weights, bias, train.classnames, name="zero_shot", provenance=identity)


def imagenet(folder: Path, shots: Sequence[int], kept: Kept, draws: int = 2000) -> list[dict[str, Any]]:
    """Few-shot ImageNet with a text head: each way of combining both, against zero-shot and against rows alone."""
    stores = stores_of(folder, "imagenet_fewshot")
    zero_shot = zero_shot_head(folder, stores["train"])
    rows: list[dict[str, Any]] = [{"shots": 0, **_single("zero_shot", zero_shot, stores["test"])}]
    for k in shots:
        fits = _FewShot(few_shot(stores["train"], k, 0), stores["test"], zero_shot, draws)
        rows += [kept(f"imagenet, {k} rows: {name}", partial(fits.row, name)) | {"shots": k} for name in fits.all()]
    return rows


class _FewShot:
    """The heads for one sample of ImageNet rows; `row` fits one and compares it."""

    def __init__(self, train: Any, test: ResidentStore, zero_shot: LinearHead, draws: int) -> None:
        self.train, self.test, self.zero_shot, self.draws = train, test, zero_shot, draws
        self.alone = cache(lambda name: make_head(name, {}).fit(train))

    def all(self) -> dict[str, tuple[Callable[[], Any], str | None]]:
        """How each head is fitted, and the image-only head that it is compared with, if any."""
        found: dict[str, tuple[Callable[[], Any], str | None]] = {
            name: (partial(self.alone, name), None) for name in ROWS_ALONE
        }
        for name in ("ridge", "logistic"):
            found[f"{name} to prior"] = partial(make_head(name, {}, self.zero_shot).fit, self.train), name
        for name in ROWS_ALONE:
            found[f"{name}, alpha by folds"] = partial(self._by_folds, name), name
        for name, parent in TEXT_HEADS.items():
            found[name] = partial(make_head(name, {}).fit, self.train, texts=self.zero_shot), parent
        for name in TRANSDUCTIVE:
            fit = partial(make_head(name, {}).fit, self.test, texts=self.zero_shot)
            found[f"{name}, without training rows"] = fit, "nearest_mean"
            found[f"{name}, with them"] = partial(fit, labelled=self.train), "nearest_mean"
        return found

    def _by_folds(self, name: str) -> LinearHead:
        return heads.interpolate_by_folds(self.zero_shot, heads.settled(self.alone(name)), self.train)

    def row(self, name: str) -> dict[str, Any]:
        """The row of a head."""
        fit, parent = self.all()[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one row per class: nothing can be held out to choose by
            head = fit()
        row = _single(name, head, self.test)
        others = {} if parent is None else {"zero_shot": self.zero_shot, parent: self.alone(parent)}
        for other, base in others.items():
            (found,) = compare(base, head, [self.test], draws=self.draws)
            row[f"against {other}"] = {
                "top1": found["top1"]["difference"],
                "nll": found["nll"]["difference"],
                "mcnemar_p": found["mcnemar"]["p"],
            }
        return row


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
        f"ViT-B/32 features of OpenAI's CLIP; {facts['cpu']}, {facts['cores']} cores, {facts['date']}. Intervals are "
        "95% paired bootstraps over the test rows unless said otherwise; one that holds zero is a null result.",
        "## Full train split (16 rows per class), chosen by folds of it",
        "scikit-learn runs in float64 at the hyper-parameters that our head chose (ridge: its own choice from the same "
        "path). A dash: the estimator gives no probabilities, or nothing is compared.",
    ]
    cells = []
    for row in full:
        against = _signed(row[f"against {USUAL}"]["top1"], 100, 1) if f"against {USUAL}" in row else "–"
        nll = "–" if row["nll"] is None else format(row["nll"], ".3f")
        cells.append([row["data"], row["head"], f"{100 * row['top1']:.2f}", nll, against])
    lines += [markdown_table(["data", "head", "accuracy, %", "NLL", f"accuracy against {USUAL}"], cells, left=2)]
    lines += [
        _verdict([row for row in full if row["data"] == data], USUAL, f"{data}, accuracy")
        for data in dict.fromkeys(row["data"] for row in full)
    ]
    if curves:
        lines += [
            "## Few shots",
            "Mean ± standard deviation over seeds; hyper-parameters chosen on min(k, 4) rows per class of val.",
            "Accuracy, %, by rows per class:",
            _curves(curves, "top1", 100, 1),
            "NLL, by rows per class:",
            _curves(curves, "nll", 1, 3),
            f"Accuracy against {USUAL}, in points, by rows per class: the mean over data sets and seeds, and the "
            "half-width of its 95% interval (Student's t over the pairs). In brackets: a null result.",
            _differences(curves),
        ]
    if few:
        most = max(row["shots"] for row in few)
        last = [row for row in few if row["shots"] in (0, most)]
        lines += [f"## ImageNet, {most} rows per class, 1,000 test rows", _NOTES, _imagenet_table(last)]
        lines += [_verdict(last, other, "Accuracy") for other in ("zero_shot", "rows alone")]
        lines += ["Accuracy in % / NLL, by rows per class, of one draw (seed 0):", _imagenet_curves(few)]
    return "\n\n".join(lines) + "\n"


_NOTES = (
    "The transductive heads (the last ones) see the features of all test rows at once, so that their figures stand by "
    "themselves. `python -m benchmarks.bench_slow_heads` times the fits that take long."
)


def _curves(rows: Sequence[Mapping[str, Any]], metric: str, factor: float, digits: int) -> str:
    """One line per data set and head, one column per number of shots."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        data = row["data"].partition("/")[0]
        values = found.setdefault((data, label_of(row["head"], row["setting"])), {}).setdefault(row["shots"], [])
        values.append(factor * row[f"{data}:{metric}"])
    shots = sorted({row["shots"] for row in rows})
    lines = []
    for (data, head), columns in found.items():
        spread = {k: np.std(values, ddof=1) if len(values) > 1 else 0.0 for k, values in columns.items()}
        lines.append([data, head, *(f"{np.mean(columns[k]):.{digits}f} ± {spread[k]:.{digits}f}" for k in shots)])
    return markdown_table(["data", "head", *map(str, shots)], lines, left=2)


def _differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy minus that of the usual probe on the same rows, one line per head, one column per number of shots."""
    found: dict[str, dict[tuple[Any, ...], float]] = {}
    for row in rows:
        data, label = row["data"].partition("/")[0], label_of(row["head"], row["setting"])
        found.setdefault(label, {})[row["shots"], data, row["seed"]] = 100 * row[f"{data}:top1"]
    shots, usual = sorted({row["shots"] for row in rows}), found[USUAL]
    lines = []
    for label, own in found.items():
        if label == USUAL:
            continue
        cells = [label]
        for k in shots:
            gaps = np.array([own[key] - usual[key] for key in usual if key[0] == k])
            half = float(student.ppf(0.975, len(gaps) - 1)) * gaps.std(ddof=1) / len(gaps) ** 0.5
            told = f"{gaps.mean():+.1f} ± {half:.1f}"
            cells.append(told if abs(gaps.mean()) > half else f"[{told}]")
        lines.append(cells)
    return markdown_table(["head", *map(str, shots)], lines)


def _imagenet_curves(rows: Sequence[Mapping[str, Any]]) -> str:
    shots = sorted({row["shots"] for row in rows})
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        found.setdefault(row["head"], {})[row["shots"]] = f"{100 * row['top1']:.1f} / {row['nll']:.2f}"
    lines = [[head, *(cells.get(k, "–") for k in shots)] for head, cells in found.items()]
    return markdown_table(["head", *map(str, shots)], lines)


def _imagenet_table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = ("head", "accuracy, %", "NLL", "accuracy against zero-shot", "against rows alone", "NLL against zero-shot")
    lines = []
    for row in rows:
        against = [value for key, value in row.items() if key.startswith("against ")]
        cells = ["–"] * 3
        if against:
            cells = [_signed(found["top1"], 100, 1) for found in against] + [_signed(against[0]["nll"], 1, 3)]
        lines.append([row["head"], f"{100 * row['top1']:.1f}", f"{row['nll']:.3f}", *cells])
    return markdown_table(shown, lines)


def _verdict(rows: Sequence[Mapping[str, Any]], other: str, what: str) -> str:
    """Which accuracy differences from a head have intervals that exclude zero, in words; also states null results."""
    said: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for row in rows:
        for key in (key for key in row if key.startswith("against ")):
            if key == f"against {other}" or (other == "rows alone" and key != "against zero_shot"):
                _, low, high = row[key]["top1"]
                said["above" if low > 0 else "below" if high < 0 else "not told apart from"].append(row["head"])
    return "\n".join([f"{what}:\n", *(f"- {how} {other}: {'; '.join(names) or 'none'}" for how, names in said.items())])


def _a_row_a_line(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for name, rows in tables.items():
        kept = [{key: value for key, value in row.items() if key not in ("fitted_on", "chosen_on")} for row in rows]
        parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(row, default=str) for row in kept) + "\n]")
    return "{" + ",\n".join(parts) + "}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for heads-table.md and heads-table.json")
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--shots", nargs="*", type=int, default=SHOTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--imagenet-shots", nargs="*", type=int, default=IMAGENET_SHOTS)
    parser.add_argument("--work", type=Path, default=Path("build/table_heads"), help="finished rows, kept")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    kept, facts = Kept(args.work / "rows.jsonl"), machine_facts()
    full = full_data(args.folder, args.sets, kept)
    results = args.work / "few-shot.jsonl"
    curves = few_shot_curves(args.folder, args.sets, args.shots, args.seeds, results) if args.shots else []
    few = imagenet(args.folder, args.imagenet_shots, kept) if args.imagenet_shots else []
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heads-table.json").write_text(
        _a_row_a_line({"machine": [facts], "full": full, "few_shot": curves, "imagenet": few})
    )
    text = page(full, curves, few, facts)
    (args.out / "heads-table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
