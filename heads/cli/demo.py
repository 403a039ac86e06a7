"""``featcache demo``: handwritten digits and their shifted domains under the embedded model, from images to report.

The heads are zero-shot from eight templates, ridge on the train split (alpha and temperature by exact leave-one-out),
and all interpolations between the two; the best alpha is chosen on the val split. All are evaluated on six test sets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.cli.arguments import root_argument, table_width
from featcache.cli.encode import describe_encoded
from featcache.cli.text import describe_text
from featcache.datasets import open_dataset
from featcache.encoders import load_encoder
from featcache.errors import OutputError
from featcache.progress import Silent, format_seconds
from featcache.prompts import load_templates

if TYPE_CHECKING:
    from featcache.encoding.images import EncodeResult
    from featcache.encoding.texts import TextResult
    from heads.evaluation.metrics import Row
    from heads.fitted.base import LogitHead
    from heads.report.web import Background

ALPHAS = tuple(step / 10 for step in range(11))
TESTS = ("digits", *(f"digits:{shift}" for shift in ("sketch", "inverted", "noisy", "rotated", "lowres")))
NOTES = """\
Real 8x8 handwritten digits (scikit-learn) and five fixed shifts of the test split, encoded by a small model that was \
trained on rendered glyphs only. The ridge head is fitted on the clean train split; its alpha and temperature come \
from exact leave-one-out. Of the interpolations between zero-shot and ridge, one was {choice}.

{summary}."""


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the short demo."""
    parser.add_argument("--output", default="demo", metavar="FOLDER", help="where report and heads go (default: demo)")
    root_argument(parser)


def run_demo(args: argparse.Namespace) -> Row:
    """Encode, fit, evaluate, report; the results, JSON-able."""
    from heads import append_rows, save
    from heads.report import table_text, write_report
    from heads.report.remarks import choice_line

    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output}: is a file; name a folder")
    began = time.perf_counter()
    say = (lambda line: None) if args.json else print
    images, texts = _encode(args.root, say)
    encoded = time.perf_counter() - began
    heads, rows, path = _fit_and_evaluate(images, texts)
    choice = choice_line(heads[-1])
    for head in heads:
        save(head, output / f"{head.linear().name.replace('+', '-')}.safetensors")
    everything = [*rows[:-1], *path]  # the chosen interpolation is one of the path
    append_rows(output / "results.jsonl", everything)
    hits = sum(result.hit for result in images.values()) + texts.hit
    total = time.perf_counter() - began
    summary = (
        f"{hits} of {len(images) + 1} stores were cached; encoding took {format_seconds(encoded)}, "
        f"everything {format_seconds(total)}"
    )
    written = write_report(
        everything,
        output,
        title="Handwritten digits under the embedded tiny model",
        notes=NOTES.format(choice=choice, summary=summary),
        background=_background(images, heads[-1], rows, encoded, total),
    )
    say(f"\n{table_text(rows, width=table_width())}\n")
    say(f"* the best of each column; third head: the interpolation {choice}")
    say(f"{summary}\nreport: {written[0]} for the browser; tables, plots, heads and results.jsonl beside it")
    return {"rows": rows, "hits": hits, "stores": len(images) + 1, "seconds": total, "report": str(written[0])}


def _background(
    images: dict[str, EncodeResult], chosen: LogitHead, rows: Sequence[Row], encoded: float, total: float
) -> Background:
    """Details of the chosen head, and costs, for the page."""
    from heads import calibrate
    from heads.report.details import head_details, provenance_facts, store_facts
    from heads.report.web import Background

    tests = [result.store for name, result in images.items() if name.endswith("/test")]
    names = [store.name for store in tests]
    details = head_details(chosen, tests, names, calibrated=calibrate(chosen, images["digits/val"].store))
    fresh = sum(result.encoded_rows for result in images.values())
    rate = f", {fresh / encoded:,.0f} images/s, other work included" if fresh else ""
    cost = {
        "encoding": f"{format_seconds(encoded)} for {fresh:,} images{rate}",
        "cache": f"{sum(result.hit for result in images.values())} of {len(images)} image stores were cached",
        "everything": format_seconds(total),
    }
    facts = {"Cost": cost, "Stores": store_facts(tests, names), "Heads": provenance_facts(rows)}
    return Background(details=details, facts=facts)


def _encode(root: str | None, say: Callable[[str], None]) -> tuple[dict[str, EncodeResult], TextResult]:
    from featcache.encoding.images import encode_dataset
    from featcache.encoding.texts import embed_prompts

    encoder = load_encoder("tiny")
    images = {}
    for spec, split in [("digits", "train"), ("digits", "val"), *((spec, "test") for spec in TESTS)]:
        dataset = open_dataset(spec, split)
        result = encode_dataset(dataset, encoder, root=root, progress=Silent())
        images[f"{dataset.name}/{split}"] = result
        say(describe_encoded(result).partition("\n")[0])
    names = images["digits/train"].store.classnames
    texts = embed_prompts(names, load_templates("digits"), encoder, name="digits", root=root)
    say(describe_text(texts).partition("\n")[0])
    return images, texts


def _fit_and_evaluate(
    images: dict[str, EncodeResult], texts: TextResult
) -> tuple[Sequence[LogitHead], list[Row], list[Row]]:
    """The three heads, their rows, and the rows of the whole interpolation."""
    from heads import Ridge, ZeroShot, choose, evaluate, interpolate
    from heads.fitted.base import as_head

    tests = [result.store for name, result in images.items() if name.endswith("/test")]
    zero_shot = ZeroShot().fit(texts.store)
    ridge = Ridge().fit(images["digits/train"].store)
    path = interpolate(zero_shot, ridge, ALPHAS)
    chosen = choose(path, images["digits/val"].store)
    heads = [as_head(zero_shot), as_head(ridge), chosen]
    rows = evaluate([*heads, *path], tests)
    return heads, rows[: len(heads)], rows[len(heads) :]
