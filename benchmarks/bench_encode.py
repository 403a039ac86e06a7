"""Encoding against its two unavoidable parts: a bare forward pass and a bare decode of the same batches.

``python -m benchmarks.bench_encode [--tiny] [--device cpu] [--out FILE]``

ViT-B-32 with random weights on JPEG files, and the embedded `tiny` on the digits. A round times the whole encode run
(reading, hashing, decoding, forward pass, checksums, synced writes, finalising), then the decode alone on the same
number of threads, then the forward pass alone on ready float batches with the same torch threads. Bar: the whole run
takes at most 1.10 times the sum of the two.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import at_most, benchmark_parser, interleaved, report
from featcache import EncodeOptions, encode_dataset, load_encoder
from featcache.datasets import Dataset, open_dataset
from featcache.encoding.pipeline import batches_of, default_workers

BAR = 1.10


def write_jpegs(folder: Path, n: int) -> None:
    """JPEGs of 500 x 375 with smooth noise, which take as long to decode as photographs."""
    chance = np.random.default_rng(0)
    target = folder / "train" / "noise"
    target.mkdir(parents=True)
    for number in range(n):
        coarse = Image.fromarray(chance.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(fine + chance.normal(0, 12, fine.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(target / f"{number:05d}.jpg", quality=90)


def parts(dataset: Dataset, encoder: Any, batch_size: int, root: Path) -> dict[str, Callable[[], object]]:
    """The whole run, into a new root each time, and its two parts."""
    batches = batches_of(range(len(dataset.index)), batch_size)
    pool = ThreadPoolExecutor(default_workers())
    runs = iter(range(10**6))

    def prepared(row: int) -> Any:
        return encoder.prepare(dataset.decode(dataset.read(row), row))

    def tensor(rows: range) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([prepared(row) for row in rows])).to(encoder.device)
        return (pixels.permute(0, 3, 1, 2).float() / 255).contiguous()

    ready = [tensor(rows) for rows in batches]

    def whole() -> None:
        options = EncodeOptions(batch_size=batch_size)
        encode_dataset(dataset, encoder, root=root / str(next(runs)), options=options)

    def decode() -> None:
        for rows in batches:
            list(pool.map(prepared, rows))

    def forward() -> None:
        with torch.inference_mode():
            for batch in ready:
                encoder.model.encode_image(batch)
            if encoder.device.startswith("cuda"):
                torch.cuda.synchronize()

    return {"whole run": whole, "bare forward": forward, "bare decode": decode}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--images", type=int, default=64, help="JPEG files (default: 64)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    n_images, rounds = (4, 1) if args.tiny else (args.images, args.rounds)
    big = load_encoder("RN50" if args.tiny else "ViT-B-32", "random", device=args.device)
    small = load_encoder("tiny", device=args.device)
    seconds: dict[str, list[float]] = {}
    bars = []
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "jpegs", n_images)
        contests = {
            f"{big.name} on JPEGs": (open_dataset(f"imagefolder:{folder}/jpegs", "train"), big, 32),
            "tiny on digits": (open_dataset("digits", "val" if args.tiny else "train"), small, 64),
        }
        for name, (dataset, encoder, batch_size) in contests.items():
            timers = parts(dataset, encoder, batch_size, Path(folder) / encoder.name.replace("/", "-"))
            found = interleaved(timers, rounds, warmup=0 if args.tiny else 1)
            seconds |= {f"{name}: {part}": values for part, values in found.items()}
            rounds_of = zip(*(found[part] for part in ("whole run", "bare forward", "bare decode")), strict=True)
            value = statistics.median(whole / (forward + decode) for whole, forward, decode in rounds_of)
            bars.append(at_most(f"{name}, at most", value, BAR))
    report(
        "Encoding",
        {
            "jpegs": n_images,
            "jpeg_size": "500x375",
            "digits": len(contests["tiny on digits"][0].index),
            "torch_threads": torch.get_num_threads(),
        },
        seconds,
        bars=bars,
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
