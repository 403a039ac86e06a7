"""``featcache demo``, and ``featcache demo --full``: from fine-tuning to a robust checkpoint on handwritten digits.

The full demo continues `heads.cli.demo`. It fine-tunes `tiny` on the train split with Lipsum-FT's regularisation over a
stored bank of random texts, encodes and evaluates the result like any other model, interpolates it with the zero-shot
model in weight space, chooses alpha on the val split, and evaluates that checkpoint on every shift. It takes minutes on
two cores; a second run finds the finished training and its stores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import featcache
from featcache.cli.arguments import show, table_width, typed
from featcache.datasets import open_dataset
from featcache.parameters import Count
from featcache.progress import Printed, Silent, format_seconds
from heads.cli.demo import TESTS, demo_arguments, run_demo

if TYPE_CHECKING:
    from heads.evaluation.metrics import Row

OPTIONS: dict[str, object] = {
    "templates": "digits",
    "head_scale": "separate",
    "head_bias": False,
    "epochs": 2,
    "batch_size": 50,
    "lr": 3e-4,
    "schedule": "lipsum",
    "augment": "wise_ft",
    "select": "nll",
    "prior": "store",
    "regularizers": {"lipsum": {"weight": 0.01, "mode": "exact", "bank": 2000}},
}
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COMMANDS = """The same by hand:
  featcache text --random 2000
  featcache finetune digits --val digits:val --out {out}/finetuned --templates digits --head-scale separate \\
      --no-head-bias --epochs 2 --batch-size 50 --lr 3e-4 --schedule lipsum --augment wise_ft --select nll \\
      --prior store --regularizer lipsum=0.01,mode=exact,bank=2000
  featcache encode digits --split test --model local-dir:{out}/finetuned/best
  featcache evaluate {out}/finetuned/best_head.safetensors --on digits/test@best
  featcache wise tiny {out}/finetuned/best --alphas 0 0.2 0.4 0.6 0.8 1 --out {out}/wise --select digits:val \\
      --heads zero_shot {out}/finetuned/best_head.safetensors --templates digits --best-only \\
      --on {tests}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache demo``."""
    demo_arguments(parser)
    add = parser.add_argument
    add("--full", action="store_true", help="also fine-tune, encode, evaluate and interpolate (takes minutes)")
    add("--steps", type=typed(Count), metavar="N", help="with --full: train for N updates instead of two epochs")


def run(args: argparse.Namespace) -> int:
    """``featcache demo``."""
    record = run_demo(args)
    if args.full:
        record["full"] = _full(args, record["rows"])
    show(record, "", args.json)
    return 0


def _full(args: argparse.Namespace, rows: list[Row]) -> Row:
    from ft.merging.sweep import WiseOptions, sweep
    from ft.training.loop import finetune
    from heads import append_rows, evaluate, load
    from heads.report import table_text, write_report

    began, out = time.perf_counter(), Path(args.output)
    say = (lambda line: None) if args.json else print
    options = {**OPTIONS, "epochs": None, "steps": args.steps} if args.steps else OPTIONS
    progress = Silent() if args.json else Printed()
    run = finetune(
        "digits", "tiny", out=out / "finetuned", options=options, val="digits:val", root=args.root, progress=progress
    )
    say(f"\nfine-tuned: {run.steps} updates, best at {run.best_step}: {run.best}")
    model = f"local-dir:{run.best}"
    stores = [featcache.encode(spec, "test", model=model, root=args.root) for spec in TESTS]
    tuned = evaluate([load(run.best_head)], stores)[0]
    settings = WiseOptions(
        on=[open_dataset(spec, "test") for spec in TESTS],
        heads=["zero_shot", run.best_head],
        templates="digits",
        best_only=True,
        root=args.root,
        overwrite=True,
    )
    found = sweep("tiny", run.best, ALPHAS, out / "wise", open_dataset("digits", "val"), settings)
    reported = {key: value for key, value in found.best.items() if not key.startswith("digits/val:")}
    shown = [rows[0], tuned, {**reported, "head": f"wise alpha={found.alpha:g}"}]
    append_rows(out / "results.jsonl", [tuned, *found.rows, found.best])
    seconds = time.perf_counter() - began
    notes = (
        "`tiny` fine-tuned on the clean train split with Lipsum-FT's regularisation (quadratic form over a bank of "
        "2,000 random texts), and its interpolation with the zero-shot model in weight space: alpha "
        f"{found.alpha:g} is the most accurate on val."
    )
    written = write_report(shown, out / "full", title="Fine-tuning `tiny` on handwritten digits", notes=notes)
    say(f"\n{table_text(shown, width=table_width())}\n")
    say(f"alpha = {found.alpha:g} is the most accurate on digits/val: {found.folder}")
    say(f"fine-tuning, encoding, evaluation and interpolation took {format_seconds(seconds)}; report: {written[0]}\n")
    say(COMMANDS.format(out=out, tests=" ".join(f"{spec}:test" for spec in TESTS)))
    return {
        "rows": shown,
        "alpha": found.alpha,
        "model": found.folder,
        "head": found.head,
        "seconds": seconds,
        "report": written[0],
    }
