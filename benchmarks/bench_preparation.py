"""Preprocessing of images: ``--preprocess fast`` against Pillow and torchvision's decoder.

``python -m benchmarks.bench_preparation [--tiny] [--images 64 | --images FOLDER] [--rounds 15] [--out FILE]``

JPEG bytes in memory to (224, 224, 3) in one thread. The images are 500 x 375 crops of scikit-learn's two photographs,
or the JPEG files below a folder, duplicates left out. A round preprocesses all images with each method in turn. Pillow
is the default (and open_clip's); torchvision is ``torchvision.io.decode_jpeg`` with the same resizing of 8-bit tensors.
Also reported: the pixel differences from Pillow in levels of 255, and, for a ViT-B-32 with random weights and for the
embedded model, cosines between the features of both methods and the agreement of zero-shot classes. Neither model was
trained on photographs. Bar, for the crops: 2.5 times as fast as Pillow.
"""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.common import at_least, benchmark_parser, interleaved, ratio, report
from featcache import load_encoder
from featcache.datasets.decode import decode_image
from featcache.datasets.fast_jpeg import decode_jpeg
from featcache.encoders import Encoder
from featcache.encoders.preparation import SMALLEST

BAR = 2.5
SIZE = (500, 375)
CLASSES = ["a flower", "a building", "a sky", "grass", "a roof", "a tree"]


def photographs(count: int) -> list[bytes]:
    """Random crops of scikit-learn's photographs as JPEG files, half of them mirrored."""
    rng, files = np.random.default_rng(0), []
    photos = load_sample_images().images
    for number in range(count):
        photo = photos[number % len(photos)][:, :: 1 if number % 4 < 2 else -1]
        top, left = (int(rng.integers(0, have - want + 1)) for have, want in zip(photo.shape, SIZE[::-1], strict=False))
        file = io.BytesIO()
        Image.fromarray(photo[top : top + SIZE[1], left : left + SIZE[0]]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=15)
    parser.add_argument("--images", default="64", help="number of crops, or a folder of JPEG files (default: 64)")
    args = parser.parse_args(argv)
    rounds = 1 if args.tiny else args.rounds
    crops = args.images.isdecimal()
    files = photographs(4 if args.tiny else int(args.images)) if crops else jpegs(Path(args.images))
    torch.set_num_threads(1)
    model = ("tiny", None) if args.tiny else ("ViT-B-32", "random")
    seconds, prepared = timed(files, load_encoder(*model), load_encoder(*model, preprocess="fast"), rounds)
    speed = ratio(seconds["Pillow"], seconds["fast"])
    levels = np.abs(np.subtract(prepared["Pillow"], prepared["fast"], dtype=np.int16))
    report(
        "Preparing pictures, one thread",
        {"images": len(files), "size": "500x375" if crops else "as in the files", "to": prepared["fast"].shape[1]},
        seconds,
        bars=[at_least("fast over Pillow", speed["of_medians"], BAR)] if crops else [],
        extra={
            "speed": speed,
            "milliseconds per image": {k: round(1e3 * min(v) / len(files), 3) for k, v in seconds.items()},
            "share of values that differ by 0, 1, 2, ... levels": (np.bincount(levels.ravel()) / levels.size).tolist(),
            **agreement(files, *model),
            **agreement(files, "tiny", None),
        },
        out=args.out,
    )
    return 0


def jpegs(folder: Path) -> list[bytes]:
    """Contents of the JPEG files that both methods decode."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    contents = dict.fromkeys(path.read_bytes() for path in paths)  # without copies, in order
    found = [content for content in contents if decode_jpeg(content, SMALLEST) is not None]
    if not found:
        raise SystemExit(f"{folder}: no JPEG file that the fast preparation decodes; name a folder of photographs")
    return found


def timed(
    files: Sequence[bytes], plain: Encoder, fast: Encoder, rounds: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of each method, and the images it prepared."""
    found: dict[str, np.ndarray] = {}
    smallest = SMALLEST * max(fast.image_size or (0,))

    def by_torchvision(file: bytes) -> np.ndarray:
        content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        pixels = torchvision.io.decode_jpeg(content, mode=torchvision.io.ImageReadMode.RGB)
        return fast.prepare(pixels.permute(1, 2, 0).numpy())

    def by_us(file: bytes) -> np.ndarray:
        pixels = decode_jpeg(file, smallest)
        assert pixels is not None
        return fast.prepare(pixels)

    ways: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow": lambda file: plain.prepare(decode_image(file)),
        "torchvision": by_torchvision,
        "fast": by_us,
    }

    def run(name: str) -> Callable[[], None]:
        return lambda: found.__setitem__(name, np.stack([ways[name](file) for file in files]))

    return interleaved({name: run(name) for name in ways}, rounds), found


def agreement(files: Sequence[bytes], name: str, pretrained: str | None) -> dict[str, object]:
    """Cosines between the features of both methods, and the share of images whose zero-shot class is the same."""
    plain, fast = (load_encoder(name, pretrained, preprocess=way) for way in (None, "fast"))

    def features(encoder: Encoder) -> np.ndarray:
        smallest = SMALLEST * max(encoder.image_size or (0,))
        ours = encoder is fast
        made = []
        for file in files:  # one at a time: decoded photographs are large
            picture = decode_jpeg(file, smallest) if ours else decode_image(file)
            assert picture is not None
            made.append(encoder.encode_images([encoder.prepare(picture)])[0])
        rows = np.stack(made).astype(np.float64)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    one, other = features(plain), features(fast)
    texts = plain.encode_texts(CLASSES).T
    cosines, model = (one * other).sum(1), plain.name
    return {
        f"smallest cosine, {model}": float(cosines.min()),
        f"median cosine, {model}": float(np.median(cosines)),
        f"equal zero-shot classes, {model}": float(((one @ texts).argmax(1) == (other @ texts).argmax(1)).mean()),
    }


if __name__ == "__main__":
    sys.exit(main())
