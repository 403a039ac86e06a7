"""Encoding prompts: featcache's batches sorted by length, against plain batches in the given order.

``python -m benchmarks.bench_texts [--tiny] [--classes 8] [--device cpu] [--out FILE]``

ViT-B-32 with random weights; ImageNet's first classes in all 80 templates. Both tokenise, encode in batches of 256 and
normalise. The plain version passes all 77 tokens of every prompt to open_clip's ``encode_text``, as open_clip's
``build_zero_shot_classifier`` does class by class. Bar: at least 1.5 times as fast.
"""

import sys

import numpy as np
import torch

from benchmarks.common import at_least, benchmark_parser, interleaved, ratio, report
from featcache import load_encoder
from featcache.encoders.openclip.texts import TEXT_BATCH
from featcache.prompts import fill, load_classnames, load_templates

BAR = 1.5


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--classes", type=int, default=8, help="of ImageNet's 1,000 (default: 8)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    n_classes, rounds = (2, 1) if args.tiny else (args.classes, args.rounds)
    encoder = load_encoder(*(("tiny", None) if args.tiny else ("ViT-B-32", "random")), device=args.device)
    names, templates = load_classnames("imagenet")[:n_classes], load_templates("openai-imagenet")
    prompts = [text for texts in fill(templates, names) for text in texts]
    found: dict[str, np.ndarray] = {}

    def plain() -> None:
        parts = []
        for start in range(0, len(prompts), TEXT_BATCH):
            ids = encoder.tokenize(prompts[start : start + TEXT_BATCH]).to(args.device)
            with torch.inference_mode():
                parts.append(encoder.model.encode_text(ids).float().cpu().numpy())  # type: ignore[attr-defined]
        found["plain"] = np.concatenate(parts)

    def ours() -> None:
        found["ours"] = encoder.encode_texts(prompts)

    seconds = interleaved({"plain": plain, "ours": ours}, rounds, warmup=0 if args.tiny else 1)
    speed = ratio(seconds["plain"], seconds["ours"])
    error = np.abs(found["ours"] - found["plain"]).max() / np.abs(found["plain"]).max()
    report(
        "Prompts through the text tower",
        {"classes": n_classes, "templates": len(templates), "prompts": len(prompts), "batch": TEXT_BATCH},
        seconds,
        bars=[at_least("ours over plain", speed["of_medians"], BAR)],
        extra={"speed": speed, "largest relative difference": float(error)},
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
