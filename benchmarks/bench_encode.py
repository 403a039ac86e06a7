"""Encoding against its two unavoidable parts: a bare forward pass and a bare decode of the same batches.

``python -m benchmarks.bench_encode [--tiny] [--device cpu] [--model ViT-L-14] [--precision bf16] [--out FILE]``

ViT-B-32 with random weights on JPEG files, and the embedded `tiny` on the digits. A round times the whole encode run
(reading, hashing, decoding, forward pass, checksums, synced writes, finalising), then the decode alone on the same
number of threads, then the forward pass alone on ready float batches in the same precision. Bars: on a CPU the whole
run takes at most 1.10 times the sum of the two; on a GPU, which computes while others decode, the forward pass alone
takes at least 0.95 of the whole run. With ``--compile``, the run is compiled, and the compiled forward pass is timed
beside the eager one; the ratio is the time of compiled over that of eager.
"""

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import at_least, at_most, benchmark_parser, interleaved, median, ratio, report
from featcache import EncodeOptions, encode_dataset, load_encoder
from featcache.datasets import Dataset, open_dataset
from featcache.encoders.preparation import PREPARATIONS, decoded_for
from featcache.encoders.torch_images import PRECISIONS, Computing
from featcache.encoding.pipeline import batches_of, default_workers

BAR, GPU_BAR = 1.10, 0.95


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


def encode_image(model: Any, pixels: torch.Tensor) -> Any:
    """The forward pass, one function for all batches, so that torch compiles it once."""
    return model.encode_image(pixels)


def parts(
    dataset: Dataset, encoder: Any, batch_size: int, root: Path, *, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """The whole run, into a new root each time, and its two parts."""
    batches, decoded = batches_of(range(len(dataset.index)), batch_size), decoded_for(dataset, encoder)
    pool, computing = ThreadPoolExecutor(default_workers()), Computing(encoder.model, encoder.device, encoder.precision)
    runs = iter(range(10**6))

    def prepared(row: int) -> Any:
        return encoder.prepare(decoded.decode(decoded.read(row), row))

    def tensor(rows: range) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([prepared(row) for row in rows])).to(encoder.device)
        return (pixels.permute(0, 3, 1, 2).float() / 255).contiguous()

    ready = [tensor(rows) for rows in batches]

    def whole() -> None:
        options = EncodeOptions(batch_size=batch_size, compiled=compiled)
        encode_dataset(dataset, encoder, root=root / str(next(runs)), options=options)

    def decode() -> None:
        for rows in batches:
            list(pool.map(prepared, rows))

    def forward(compute: Callable[..., object] = computing) -> None:
        with torch.inference_mode():
            for batch in ready:
                compute(encode_image, batch)
        if encoder.device.startswith("cuda"):
            torch.cuda.synchronize()

    found: dict[str, Callable[[], object]] = {"whole run": whole, "bare forward": forward, "bare decode": decode}
    if compiled:
        mode = "reduce-overhead" if encoder.device.startswith("cuda") else "default"
        found |= {"compiled forward": partial(forward, torch.compile(computing, dynamic=False, mode=mode))}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--images", type=int, default=64, help="JPEG files (default: 64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture, with random weights")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--preprocess", choices=PREPARATIONS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="compile the model; also time its forward pass")
    args = parser.parse_args(argv)
    n_images, rounds = (4, 1) if args.tiny else (args.images, args.rounds)
    how = {"device": args.device, "precision": args.precision}
    big = load_encoder("RN50" if args.tiny else args.model, "random", preprocess=args.preprocess, **how)
    small = load_encoder("tiny", **how)
    seconds: dict[str, list[float]] = {}
    bars, extra = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "jpegs", n_images)
        contests = {
            f"{big.name} on JPEGs": (open_dataset(f"imagefolder:{folder}/jpegs", "train"), big, args.batch_size),
            "tiny on digits": (open_dataset("digits", "val" if args.tiny else "train"), small, 64),
        }
        for name, (dataset, encoder, batch_size) in contests.items():
            root = Path(folder) / encoder.name.replace("/", "-")
            timers = parts(dataset, encoder, batch_size, root, compiled=args.compile)
            found = interleaved(timers, rounds, warmup=0 if args.tiny else 1)
            seconds |= {f"{name}: {part}": values for part, values in found.items()}
            rounds_of = list(zip(*(found[part] for part in ("whole run", "bare forward", "bare decode")), strict=True))
            if args.compile:
                extra[f"{name}: compiled over eager forward"] = ratio(found["compiled forward"], found["bare forward"])
            if args.device == "cpu":
                value = median(whole / (forward + decode) for whole, forward, decode in rounds_of)
                bars.append(at_most(f"{name}, at most", value, BAR))
            elif encoder is big:
                value = median(forward / whole for whole, forward, _ in rounds_of)
                bars.append(at_least(f"{name}, share of the forward pass", value, GPU_BAR))
    report(
        "Encoding",
        {
            "jpegs": n_images,
            "jpeg_size": "500x375",
            **how,
            "preprocess": args.preprocess,
            "compiled": args.compile,
            "batch_size": args.batch_size,
            "digits": len(contests["tiny on digits"][0].index),
            "torch_threads": torch.get_num_threads(),
        },
        seconds,
        bars=bars,
        extra=extra,
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
