"""Two writers of one store against one: separate processes, one thread each, no decode workers.

``python -m benchmarks.bench_writers [--tiny] [--model ViT-B-32] [--images N] [--out FILE]``

Each writer loads the encoder and then waits; the clock runs from the start signal until the last writer has opened the
finished store. One writer and two take turns, each with a new root. Bar: two are at least 1.7 times faster than one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bench_encode import write_jpegs
from benchmarks.common import at_least, benchmark_parser, median, report
from featcache import EncodeOptions, encode_dataset, load_encoder, open_store
from featcache.datasets import open_dataset

BAR = 1.7
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def work(args: argparse.Namespace) -> int:
    """One writer: load, print "ready", then encode into each root named on standard input and print "done"."""
    import torch

    torch.set_num_threads(1)
    encoder = load_encoder(args.model, args.pretrained or None, device="cpu")
    dataset = open_dataset(args.data, "train")
    encoder.encode_images([encoder.prepare(dataset.decode(dataset.read(0), 0))] * args.batch_size)  # warm up
    print("ready", flush=True)
    options = EncodeOptions(chunk_rows=args.chunk_rows, batch_size=args.batch_size, workers=1, ahead=0)
    for line in sys.stdin:
        encode_dataset(dataset, encoder, root=line.strip(), options=options)
        print("done", flush=True)
    return 0


class Writer:
    """A process that runs `work`."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_writers", "--work", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stdin=pipe, stdout=pipe, text=True)

    def wait(self, word: str) -> None:
        """Wait until it prints that word."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != word:
            raise RuntimeError(f"a writer printed {said!r}, expected {word!r}")

    def go(self, root: Path) -> None:
        """Let it encode into that root."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Close its input, and wait until it has ended."""
        self._process.communicate()


def seconds_of(writers: list[Writer], root: Path) -> float:
    """Time until the last of some writers has the store."""
    began = time.perf_counter()
    for writer in writers:
        writer.go(root)
    for writer in writers:
        writer.wait("done")
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--images", type=int, default=256, help="JPEG files of 500 x 375 (default: 256)")
    parser.add_argument("--chunk-rows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        return work(args)
    if args.tiny:
        args.model, args.pretrained, args.images, args.rounds = "tiny", "", 12, 1
        args.chunk_rows = args.batch_size = 3
    seconds: dict[str, list[float]] = {"one writer": [], "two writers": []}
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "jpegs", args.images)
        passed = ["--model", args.model, "--data", f"imagefolder:{folder}/jpegs"]
        passed += ["--pretrained", args.pretrained]
        passed += ["--chunk-rows", str(args.chunk_rows), "--batch-size", str(args.batch_size)]
        writers = [Writer(passed) for _ in range(2)]
        for writer in writers:
            writer.wait("ready")
        for turn in range(args.rounds):
            for number, (name, values) in enumerate(seconds.items(), start=1):
                root = Path(folder) / f"{turn}-{number}"
                values.append(seconds_of(writers[:number], root))
                [store] = root.glob("images/*/*")
                assert len(open_store(store)) == args.images, name
        for writer in writers:
            writer.stop()
    value = median(one / two for one, two in zip(*seconds.values(), strict=True))
    report(
        "Two writers of one store against one",
        {
            "encoder": f"{args.model} {args.pretrained or ''}".strip(),
            "images": args.images,
            "jpeg_size": "500x375",
            "chunk_rows": args.chunk_rows,
            "batch_size": args.batch_size,
            "threads_a_writer": 1,
            "rounds": args.rounds,
        },
        seconds,
        bars=[at_least("two writers, times faster, at least", value, BAR)],
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
