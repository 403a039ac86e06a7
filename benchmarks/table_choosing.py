"""What each way of choosing gives on real CLIP features: ridge's alpha, kNN's k, beside the zero-shot head.

    python -m benchmarks.table_choosing DIR --out benchmarks/results

DIR is as for `benchmarks.table_heads`. Nothing is chosen on a test split. On ImageNet every head is compared with the
zero-shot head, of the same run, by a paired bootstrap over the test rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import heads
from benchmarks.common import machine_facts, write_json
from benchmarks.table_heads import SETS, stores_of, zero_shot_head
from heads import GDA, KNN, Ridge, TipAdapter
from heads.estimators.base import METRICS
from heads.evaluation.compare import compare

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


def of_set(folder: Path, name: str) -> list[dict[str, Any]]:
    """Ridge and kNN on one data set, chosen by leaving training rows out, and on the validation split."""
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
    """Few-shot ImageNet: the zero-shot head, and ridge that shrinks to it."""
    stores = stores_of(folder, "imagenet_fewshot")
    prior = zero_shot_head(folder, stores["train"])
    rows = [_row("imagenet_fewshot", "zero-shot", None, prior, stores["test"], 0.0)]
    fits: dict[str, Callable[[], Any]] = {
        label: partial(Ridge(prior=prior, **options).fit, stores["train"]) for label, options in TO_PRIOR.items()
    }
    fits["gda"] = partial(GDA().fit, stores["train"], texts=prior)
    for metric in METRICS:
        fits[f"Tip-Adapter, {metric}"] = partial(TipAdapter(metric=metric).fit, stores["train"], texts=prior)
    for label, fit in fits.items():
        began = time.process_time()
        head = fit()
        rows.append(_row("imagenet_fewshot", label, None, head, stores["test"], time.process_time() - began))
        (found,) = compare(prior, head, [stores["test"]], draws=draws)
        rows[-1]["against zero-shot"] = {key: found[key]["difference"] for key in ("top1", "nll")}
    return rows


def _row(data: str, label: str, split: str | None, head: Any, test: Any, seconds: float) -> dict[str, Any]:
    (row,) = heads.evaluate([head], [test])
    found = {"data": data, "head": label, "chosen on": split or "training rows"}
    return {**found, "top1": row[f"{data}:top1"], "nll": row[f"{data}:nll"], "cpu_s": seconds, "params": row["params"]}


def page(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Ways of choosing, on real CLIP features",
        "",
        f"ViT-B/32 features of OpenAI's CLIP; {facts['cpu']}, {facts['cores']} cores, {facts['date']}. CPU seconds "
        "are those of the fit. Differences against zero-shot have 95% paired bootstrap intervals.",
        "",
        "| data | head | chosen on | accuracy, % | NLL | accuracy against zero-shot | CPU, s |",
        "|:---|:---|:---|---:|---:|---:|---:|",
    ]
    for row in rows:
        against = "–"
        if "against zero-shot" in row:
            value, low, high = (100 * v for v in row["against zero-shot"]["top1"])
            against = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        figures = f"{100 * row['top1']:.1f} | {row['nll']:.3f} | {against} | {row['cpu_s']:.1f}"
        lines.append(f"| {row['data']} | {row['head']} | {row['chosen on']} | {figures} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for choosing.md and choosing.json")
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--no-imagenet", action="store_true")
    args = parser.parse_args(arguments)
    rows = [row for name in args.sets for row in of_set(args.folder, name)]
    rows += [] if args.no_imagenet else of_imagenet(args.folder)
    facts = machine_facts()
    write_json(args.out / "choosing.json", {"machine": facts, "rows": rows})
    text = page(rows, facts)
    (args.out / "choosing.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
