"""Encoding with bfloat16 weights, with autocast, and in float32: run time and cosines.

``python -m benchmarks.bench_precision [--tiny] [--device cpu] [--out FILE]``

ViT-B-32 with random weights on JPEG files of 500 x 375. A round times three whole encode runs (reading, hashing,
decoding, forward pass, checksums, synced writes), each into a new root: `--precision fp32`, `--precision bf16`, and the
same model under autocast. Bar: bfloat16 weights give at least 1.8 times the images per second of float32 if the CPU
supports bfloat16 products natively.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_encode import write_jpegs
from benchmarks.common import at_least, benchmark_parser, interleaved, median, report
from featcache import EncodeOptions, ImageStore, encode_dataset, load_encoder
from featcache.datasets import open_dataset
from featcache.encoders.base import PROJECTED
from featcache.encoders.openclip import OpenClipEncoder
from heads.solvers.logistic.precision import has_bfloat16

BAR = 1.8


class Autocast(OpenClipEncoder):
    """Image features by autocast over float32 weights."""

    def forward(self, images, taps):  # type: ignore[no-untyped-def]  # noqa: D102
        with torch.inference_mode(), self.autocast():
            return {PROJECTED: self.model.encode_image(self.pixels(images))}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=128, help="JPEG files (default: 128)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    n_images, rounds = (4, 1) if args.tiny else (args.images, args.rounds)
    name = ("tiny", None) if args.tiny else ("ViT-B-32", "random")
    encoders = {p: load_encoder(*name, device=args.device, precision=p) for p in ("fp32", "bf16")}
    encoders["autocast"] = load_encoder(*name, device=args.device, precision="bf16")
    encoders["autocast"].__class__ = Autocast
    stores: dict[str, ImageStore] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "jpegs", n_images)
        dataset = open_dataset(f"imagefolder:{folder}/jpegs", "train")
        runs = iter(range(10**6))

        def encode(kind: str) -> Callable[[], None]:
            def run() -> None:
                options = EncodeOptions(batch_size=args.batch_size)
                root = f"{folder}/{next(runs)}"
                stores[kind] = encode_dataset(dataset, encoders[kind], root=root, options=options).store

            return run

        seconds = interleaved({kind: encode(kind) for kind in encoders}, rounds, warmup=0 if args.tiny else 1)
        features = {kind: store.numpy()[0].astype(np.float64) for kind, store in stores.items()}
    cosines = {k: float((features["fp32"] * features[k]).sum(1).min()) for k in ("bf16", "autocast")}
    value = median([a / b for a, b in zip(seconds["fp32"], seconds["bf16"], strict=True)])
    native = args.device != "cpu" or has_bfloat16()
    report(
        "Encoding in bfloat16",
        {"jpegs": n_images, "batch_size": args.batch_size, "torch_threads": torch.get_num_threads(), "native": native},
        seconds,
        bars=[at_least("bf16 over fp32, images/s", value, BAR)],
        extra={
            "images per second": {kind: round(n_images / median(values), 1) for kind, values in seconds.items()},
            "smallest cosine to float32 features": cosines,
        },
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
