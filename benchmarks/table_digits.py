"""The table of robust fine-tuning on the demo's model and digits: every method, several seeds, every shift.

``python -m benchmarks.table_digits --out benchmarks/results/table_digits.json`` trains, encodes and judges everything
(under an hour on two cores) and writes the JSON and a Markdown table beside it. It can be stopped at any time: every
finished row is under ``--work``, and the same command resumes from there.

Hyper-parameters are chosen on the selection split (digits/val, NLL, seed 0) and nowhere else, WiSE's alpha there by
accuracy, as its paper does; the table says which.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import featcache
import ft
import heads
from benchmarks.common import machine_facts, write_json
from benchmarks.table_digits_text import markdown
from featcache.datasets import open_dataset
from featcache.datasets.sources.published.digits import DOMAINS
from ft.checkpoints.parents import load_open_clip
from ft.merging.merge import needs_of
from ft.merging.moments import layer_moments, write_moments
from ft.merging.sweep import WiseOptions, sweep
from ft.training.loop import finetune
from heads.fitted.linear import as_linear

TEMPLATES = "digits"
TESTS = ["digits", *(f"digits:{domain}" for domain in DOMAINS if domain != "clean")]
ALPHAS = [round(0.1 * step, 1) for step in range(11)]
CS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
BANK = 2000
BASE: dict[str, Any] = {
    "templates": TEMPLATES,
    "head_scale": "separate",
    "head_bias": False,
    "batch_size": 50,
    "schedule": "lipsum",
    "augment": "wise_ft",
    "select": "nll",
    "prior": "store",
}


@dataclass(frozen=True)
class Method:
    """A fine-tuned row: what it adds to plain fine-tuning, and the grid of its weight."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    regularizer: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    like: str | None = None  # takes the weight that was chosen for that method


METHODS = (
    Method("LP-FT", {"head": "logistic", "head_scale": "folded", "head_bias": True}),
    Method("Lipsum exact", regularizer="lipsum", parameters={"mode": "exact", "bank": BANK}, weights=(0.01, 0.1, 1.0)),
    Method("Lipsum bank", regularizer="lipsum", parameters={"mode": "bank", "bank": BANK}, like="Lipsum exact"),
    Method("Lipsum random", regularizer="lipsum", parameters={"mode": "random"}, like="Lipsum exact"),
    Method("VC", regularizer="variance_covariance", weights=(0.1, 1.0)),
    Method("L2-SP", regularizer="l2sp", weights=(0.01, 0.1, 1.0)),
    Method("distillation", regularizer="logit_distillation", weights=(0.1, 1.0)),
    Method("EMA", {"average": "ema", "ema_decay": 0.9}),
    Method("LoRA", {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ["query", "key", "value", "out", "mlp"]}),
    Method("FLYP", {"objective": "contrastive"}),
    Method(
        "CaRot",  # weights of the paper; the average moves more often, as these runs are short
        {
            "objective": "contrastive",
            "regularizers": {"orthogonality": {"weight": 0.2}, "self_distillation": {"weight": 1.5, "every": 5}},
        },
    ),
)


@dataclass(frozen=True)
class Merged:
    """A row of the plain fine-tuned models of all seeds, merged; the setting that is chosen on the selection split."""

    name: str
    method: str
    setting: str | None = None
    values: tuple[float, ...] = ()


MERGED = (
    Merged("soup of FT", "soup"),
    Merged("task arithmetic", "task_arithmetic", "scale", (0.2, 0.3, 0.4, 0.6)),
    Merged("TIES", "ties", "scale", (0.5, 1.0, 1.5, 2.0)),
    Merged("Model Stock", "model_stock"),
    Merged("RegMean", "regmean"),
)
LRS = (1e-4, 3e-4, 1e-3)


class Table:
    """The rows of the table, each computed once."""

    def __init__(self, work: Path, epochs: int, tiny: bool) -> None:
        self.work, self.root = work, work / "cache"
        self.length = {"steps": 2} if tiny else {"epochs": epochs}
        self.lrs = LRS[:1] if tiny else LRS
        self.alphas = [0.0, 0.5, 1.0] if tiny else ALPHAS
        self.methods = METHODS[1:2] if tiny else METHODS
        self.tests = [TESTS[0], TESTS[-1]] if tiny else TESTS
        self.tiny = tiny

    def options(self, lr: float, method: Method, weight: float | None, seed: int) -> dict[str, Any]:
        """Options of one run."""
        values = {**BASE, **self.length, "lr": lr, "seed": seed, **method.changes}
        if method.regularizer:
            values["regularizers"] = {method.regularizer: {"weight": weight, **method.parameters}}
        return values

    def train(self, options: dict[str, Any], what: str) -> dict[str, Any]:
        """Fine-tune, unless the run exists; returns its best metrics on the selection split."""
        folder = self.work / "runs" / _digest(options)
        done = folder / "done.json"
        if not done.exists():
            began = time.perf_counter()
            result = finetune("digits", "tiny", out=folder, options=options, val="digits:val", root=self.root)
            best = next(row for row in result.judged if row["step"] == result.best_step)
            record = {"options": options, "seconds": round(time.perf_counter() - began, 1), "val": best}
            shutil.rmtree(result.last, ignore_errors=True)
            done.write_text(json.dumps(record))
            print(
                f"  {what}: val nll {best['nll']:.4f}, top1 {best['accuracy']:.4f}, {record['seconds']:.0f} s",
                flush=True,
            )
        return json.loads(done.read_text()) | {"folder": folder}  # type: ignore[no-any-return]

    def choose(self, name: str, candidates: Mapping[float, dict[str, Any]]) -> float:
        """The value whose run has the lowest NLL on the selection split."""
        if len(candidates) == 1:
            (only,) = candidates
            return only
        nll = {value: self.train(options, f"{name} {value:g}")["val"]["nll"] for value, options in candidates.items()}
        return min(nll, key=lambda value: nll[value])

    def row(self, name: str, seed: int | None, options: dict[str, Any] | None, make: Any) -> dict[str, Any]:
        """A row of the table: metrics on every test split."""
        path = self.work / "rows" / f"{_digest([name, seed, options, self.length, self.tiny])}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"method": name, "seed": seed, "options": options} | make()))
            print(f"{name}, seed {seed}: done", flush=True)
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def fine_tuned(self, name: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        """Row of a fine-tuned model."""

        def make() -> dict[str, Any]:
            run = self.train(options, f"{name}, seed {seed}")
            return {"val": run["val"], "seconds": run["seconds"]} | self.judge(
                heads.load(run["folder"] / "best_head.safetensors"), f"local-dir:{run['folder'] / 'best'}"
            )

        return self.row(name, seed, options, make)

    def judge(self, head: Any, model: str) -> dict[str, Any]:
        """Encode the test splits with a model and evaluate its head."""
        stores = [featcache.encode(spec, "test", model=model, root=self.root) for spec in self.tests]
        return self.metrics(heads.evaluate([head], stores)[0])

    def zero_shot(self) -> dict[str, Any]:
        """Row of the zero-shot head."""
        return self.row("zero-shot", None, None, lambda: self.judge(heads.ZeroShot().fit(self.texts()), "tiny"))

    def linear_probe(self) -> dict[str, Any]:
        """Row of logistic regression on the stored features, C chosen on the selection split."""

        def make() -> dict[str, Any]:
            train, val = (featcache.encode("digits", split, root=self.root) for split in ("train", "val"))
            probe = heads.Logistic(C=CS).fit(train, selection=val)
            return {"params": probe.linear().provenance["params"]} | self.judge(probe, "tiny")

        return self.row("LP", None, None, make)

    def wise(self, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        """Row of the interpolation between zero-shot and plain fine-tuning that is best on the selection split."""

        def make() -> dict[str, Any]:
            folder = self.train(options, f"FT, seed {seed}")["folder"]
            began = time.perf_counter()
            wise_options = WiseOptions(
                on=[open_dataset(spec, "test") for spec in self.tests],
                heads=["zero_shot", folder / "best_head.safetensors"],
                templates=TEMPLATES,
                best_only=True,
                root=self.root,
                overwrite=True,
            )
            val = open_dataset("digits", "val")
            found = sweep("tiny", folder / "best", self.alphas, folder / "wise", val, wise_options)
            shutil.rmtree(folder / "wise")
            return {"alpha": found.alpha, "seconds": time.perf_counter() - began} | self.metrics(found.best)

        return self.row("WiSE", seed, options, make)

    def merged(self, merge: Merged, folders: Sequence[Path]) -> dict[str, Any]:
        """Row of a model merged from several with their heads."""

        def make() -> dict[str, Any]:
            best, found = math.inf, {}
            for value in merge.values or (None,):
                settings: dict[str, Any] = {} if merge.setting is None else {merge.setting: value}
                head, model = self.merge(merge, folders, settings)
                val = featcache.encode("digits", "val", model=model, root=self.root)
                nll = heads.evaluate([head], [val], allow_chosen=True)[0]["digits:nll"]
                if nll < best:
                    best, found = nll, {"params": settings, "val": {"nll": nll}} | self.judge(head, model)
            return found

        return self.row(merge.name, None, {"of": [str(folder.name) for folder in folders]}, make)

    def merge(self, merge: Merged, folders: Sequence[Path], settings: Mapping[str, Any]) -> tuple[Any, str]:
        """The merged head, and the model folder."""
        models, files = [folder / "best" for folder in folders], []
        if merge.method == "regmean":
            for model in models:
                encoder = load_open_clip(f"local-dir:{model}")
                files.append(write_moments(layer_moments(encoder, open_dataset("digits", "train")), model))
        out = self.work / "merged" / merge.method / "_".join(f"{key}={value}" for key, value in settings.items())
        ft.merge(merge.method, models, out, base="tiny", moments=files, overwrite=True, **settings)
        of_base = as_linear(heads.load(folders[0] / "start_head.safetensors"))
        head = ft.merge_heads(
            merge.method,
            [as_linear(heads.load(folder / "best_head.safetensors")) for folder in folders],
            load_open_clip(f"local-dir:{out}"),
            base=of_base if "base" in needs_of(merge.method) else None,
            moments=[ft.read_state(path) for path in files],
            **settings,
        )
        return head, f"local-dir:{out}"

    def metrics(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of an evaluation that the table shows."""
        names = [spec.replace(":", "-") for spec in self.tests]
        return {"metrics": {name: {metric: row[f"{name}:{metric}"] for metric in ("top1", "nll")} for name in names}}

    def texts(self) -> Any:
        """Text store of the zero-shot head."""
        names = open_dataset("digits", "train").index.classnames
        return featcache.embed_text(names, TEMPLATES, root=self.root, name="digits")

    def all(self, seeds: Sequence[int]) -> dict[str, Any]:
        """All rows, and the chosen hyper-parameters."""
        plain = Method("FT")
        lr = self.choose("FT, lr", {lr: self.options(lr, plain, None, 0) for lr in self.lrs})
        chosen: dict[str, Any] = {"lr": lr}
        rows = [self.zero_shot(), self.linear_probe()]
        rows += [self.fine_tuned("FT", seed, self.options(lr, plain, None, seed)) for seed in seeds]
        for method in self.methods:
            weight = chosen.get(str(method.like))
            if method.weights:
                grid = method.weights[:1] if self.tiny else method.weights
                candidates = {value: self.options(lr, method, value, 0) for value in grid}
                weight = chosen[method.name] = self.choose(f"{method.name}, weight", candidates)
            options = [self.options(lr, method, weight, seed) for seed in seeds]
            rows += [self.fine_tuned(method.name, seed, own) for seed, own in zip(seeds, options, strict=True)]
        folders = [self.train(self.options(lr, plain, None, seed), f"FT, seed {seed}")["folder"] for seed in seeds]
        rows += [self.merged(merge, folders) for merge in MERGED if len(folders) > 1]
        rows += [self.wise(seed, self.options(lr, plain, None, seed)) for seed in seeds]
        return {"rows": rows, "chosen": chosen}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/table_digits.json"))
    parser.add_argument("--work", type=Path, default=Path("build/table_digits"), help="runs, stores and finished rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--tiny", action="store_true", help="one seed, two updates, one method, one shift: for the tests"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seeds = args.seeds[:1] if args.tiny else args.seeds
    table = Table(args.work / ("tiny" if args.tiny else f"epochs-{args.epochs}"), args.epochs, args.tiny)
    began = time.perf_counter()
    found = table.all(seeds)
    record = {
        "benchmark": "table_digits",
        "machine": machine_facts(),
        "seeds": seeds,
        "length": table.length,
        "base": BASE,
        "seconds_of_this_call": round(time.perf_counter() - began, 1),
        "seconds_of_training": round(sum(row.get("seconds", 0) for row in found["rows"]), 1),
        **found,
    }
    write_json(args.out, record)
    args.out.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
