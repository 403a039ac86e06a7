"""Gather the records of several seeds: ``python -m tools.train_tiny.summarise DIR... --out FILE`` (no training)."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

SHARED = ("recipe", "machine", "parameters", "fonts", "fonts_sha256")
FIGURES = ("zero_shot_top1", "zero_shot_top1_first_template", "ridge_top1")


def gather(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs share, each run's figures, and mean, lowest and highest over the seeds.

    Raises ValueError if the runs differ in recipe, machine or fonts: their spread would not be one over seeds.
    """
    first = records[0]
    for key in SHARED:
        if any(record[key] != first[key] for record in records):
            raise ValueError(f"the runs differ in {key!r}; train every seed with one recipe on one machine")
    scores = {name: [r["digits"][name] for r in records] for name in FIGURES}
    scores["held_out_fonts_mean"] = [r["held_out_fonts"]["mean"] for r in records]
    spread = {
        name: {"mean": round(float(np.mean(v)), 4), "lowest": min(v), "highest": max(v)} for name, v in scores.items()
    }
    runs = [{k: v for k, v in record.items() if k not in SHARED} for record in records]
    return {key: first[key] for key in SHARED} | {"spread": spread, "runs": runs}


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a seed."""
    head = "| seed | held-out fonts | digits zero-shot | digits ridge | loss | minutes |\n|---|---|---|---|---|---|"
    rows = [
        f"| {r['seed']} | {r['held_out_fonts']['mean']:.1%} | {r['digits']['zero_shot_top1']:.1%} "
        f"| {r['digits']['ridge_top1']:.1%} | {r['loss_last_100_steps']:.2f} | {r['seconds'] / 60:.0f} |"
        for r in records
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny.summarise", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="model folders that hold a training.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    records = [json.loads((folder / "training.json").read_text()) for folder in options.folders]
    options.out.write_text(json.dumps(gather(records), indent=2) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
