"""A training step with Lipsum in its modes, against plain fine-tuning and one frozen forward pass, in one run.

``python -m benchmarks.bench_finetune [--tiny] [--device cpu] [--batch-size 8] [--precision fp32] [--out FILE]``

ViT-B/16 with random weights, 224 pixels, a head of 1,000 classes, AdamW. The timers are interleaved and share one model
and one optimiser:

plain       forward, cross entropy, backward, AdamW
frozen      the initial tower's forward pass alone, on the same batch
exact       plain + frozen + the quadratic form over a moment of 4,096 texts
bank        plain + frozen + 80 rows of a bank
random      plain + frozen + 80 fresh texts through the text tower
stored v0   plain + exact, the initial tower's features read from a store

Bars: exact at most 1.02 times (plain + frozen), stored v0 at most 1.05 times plain; medians of the ratios within a
round. The input pipeline (reading and decoding JPEGs, random resized crop, flip, batch) is timed alone, in the same
rounds, with the threads that training has, and compared with plain. On a CPU both use the same cores in turn; on a GPU
the pipeline runs ahead, and costs nothing as long as it takes less time than the step.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_encode import write_jpegs
from benchmarks.common import at_most, benchmark_parser, interleaved, median, report
from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset, SampleIndex, WrappedDataset
from featcache.encoding.pipeline import default_workers
from ft.distributed import Place
from ft.prior.prior import StoredPrior
from ft.regularizers.lipsum import Lipsum
from ft.training.data import training_batches
from ft.training.options import FinetuneOptions
from ft.training.setup import Run, prepare

EXACT_BAR, STORED_BAR = 1.02, 1.05
CLASSES, BANK = 1000, 4096


class Relabelled(WrappedDataset):
    """JPEGs of one folder as images of 1,000 classes."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        n, index = len(data.index), data.index
        labels = np.arange(n, dtype=np.int64) * 37 % CLASSES
        names = tuple(f"class {number}" for number in range(CLASSES))
        self.index = SampleIndex(index.ids, index.sizes, index.stamps, labels, names)


def setup(folder: Path, args: argparse.Namespace) -> Run:
    """A run with Lipsum over fresh texts; the other steppers reuse its parts."""
    write_jpegs(folder / "jpegs", args.batch_size)
    dataset = Relabelled(open_dataset(f"imagefolder:{folder}/jpegs", "train"))
    options = FinetuneOptions(
        head="zeros",
        head_scale="separate",
        steps=10**6,
        batch_size=args.batch_size,
        precision=args.precision,
        augment="lipsum",
        compile=args.compile,
        regularizers={"lipsum": {"weight": 1.0, "mode": "random"}},
    )
    name, weights = ("tiny", None) if args.tiny else ("ViT-B-16", "random")
    return prepare(dataset, None, name, weights, options, Place(0, 1, args.device), folder)


def timers(run: Run, folder: Path) -> dict[str, Callable[[], object]]:
    """The work that each timer measures."""
    step, device = run.stepper, run.encoder.device
    workers = default_workers()
    one = range(1)

    def pipeline() -> Any:
        return next(training_batches(run.dataset, run.view, run.order, one, device, workers, 0))

    batch = pipeline()
    rate, scale, dim = 1e-7, run.encoder.logit_scale, run.encoder.dim
    bank = torch.nn.functional.normalize(torch.randn(BANK, dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    tower = step.prior
    assert tower is not None
    identity = {"tower": run.encoder.image_identity, "view": run.view.identity, "dataset": "benchmark"}
    online = lambda images: tower.features(batch.rows, 0, images)  # noqa: E731 - the frozen tower itself
    stored = StoredPrior(online, identity, len(run.dataset.index), dim, folder)
    for _ in range(2):  # computed and recorded, then read
        stored.features(batch.rows, 0, batch.images)
    exact = {"lipsum": (1.0, Lipsum.exact(bank, scale))}
    steppers = {
        "plain": replace(step, regularizers={}, prior=None, frozen_head=None),
        "exact": replace(step, regularizers=exact),
        "bank": replace(step, regularizers={"lipsum": (1.0, Lipsum.bank(bank, scale, generator=step.generator))}),
        "random": step,
        "stored v0": replace(step, regularizers=exact, prior=stored),
    }

    def synced(work: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return timed

    found = {name: synced(partial(stepper.update, batch, rate)) for name, stepper in steppers.items()}
    found["frozen"] = synced(lambda: tower.features(batch.rows, 0, batch.images))
    found["input pipeline"] = pipeline
    order = ("plain", "frozen", "exact", "stored v0", "bank", "random", "input pipeline")
    return {name: found[name] for name in order}


def bars_of(seconds: dict[str, list[float]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Bars and other ratios, as medians over rounds."""

    def of(name: str, *others: str) -> float:
        below = [sum(parts) for parts in zip(*(seconds[other] for other in others), strict=True)]
        return float(median(a / b for a, b in zip(seconds[name], below, strict=True)))

    exact, stored = of("exact", "plain", "frozen"), of("stored v0", "plain")
    bars = [
        at_most("exact over (plain + frozen)", exact, EXACT_BAR),
        at_most("stored v0 over plain", stored, STORED_BAR),
    ]
    others = {
        "bank over (plain + frozen)": of("bank", "plain", "frozen"),
        "random over (plain + frozen)": of("random", "plain", "frozen"),
        "frozen over plain": of("frozen", "plain"),
        "input pipeline over plain": of("input pipeline", "plain"),
    }
    return bars, {name: round(value, 4) for name, value in others.items()}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images of 224 x 224 (default: 8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile of both image towers")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch_size, args.rounds = 4, 1
    with tempfile.TemporaryDirectory() as folder:
        run = setup(Path(folder), args)
        seconds = interleaved(timers(run, Path(folder)), args.rounds, warmup=1)
    bars, extra = bars_of(seconds)
    sizes = {
        "model": run.encoder.name,
        "batch": args.batch_size,
        "image": run.encoder.image_size[0],
        "classes": CLASSES,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "precision": args.precision,
        "compile": args.compile,
        "torch_threads": torch.get_num_threads(),
        "decode_threads": default_workers(),
    }
    report("Fine-tuning step", sizes, seconds, bars=bars, extra=extra, out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
