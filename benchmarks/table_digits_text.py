"""The Markdown of `benchmarks.table_digits`: mean and spread over seeds, and what the figures do and do not say."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SHIFTED = "mean of shifts"
# Two-sided 95 % quantile of Student's t with n - 1 degrees of freedom, for n = 2, 3, ... seeds
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
CAVEAT = """What the random texts can show here. `tiny` was trained on captions of rendered glyphs that hold 315 of its
1,037 tokens; the embeddings of the other 722 never got a gradient from a caption that held them. A random text draws
its ids uniformly, so about seven in ten of them are noise that was never trained, and its feature is hardly a statement
about an image. The three modes of Lipsum-FT can therefore be compared with each other here (they have one expectation,
and should agree), and so can their cost and their effect as a quadratic penalty on `v - v0`. Whether guidance by a
language tower that knows its words preserves robustness, which is the paper's claim, cannot be seen on this model."""


def markdown(record: Mapping[str, Any]) -> str:
    """Tables of accuracy and NLL, choices, differences to plain fine-tuning, caveats."""
    groups = _groups(record["rows"])
    names = list(next(iter(groups.values()))[0]["metrics"])
    parts = [
        "# Robust fine-tuning of `tiny` on handwritten digits",
        _how(record),
        "## Accuracy, %",
        _table(groups, names, "top1", 100.0, 1),
        "## NLL, nats",
        _table(groups, names, "nll", 1.0, 3),
        "## Against plain fine-tuning",
        _differences(groups, names),
        CAVEAT,
    ]
    return "\n\n".join(parts) + "\n"


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def _how(record: Mapping[str, Any]) -> str:
    chosen = ", ".join(f"{name}: {value:g}" for name, value in record["chosen"].items())
    alphas = [f"{row['alpha']:g}" for row in record["rows"] if "alpha" in row]
    length = ", ".join(f"{value} {name}" for name, value in record["length"].items())
    return (
        f"Trained on digits/train (1,000 images; {length}, batch {record['base']['batch_size']}), judged on the 500 "
        "test images and on five shifts of them. Mean and standard deviation over the training seeds "
        f"{', '.join(map(str, record['seeds']))}; zero-shot and LP (logistic regression on stored features) involve no "
        "draw and have no spread, nor have merged models, which are made of the plain fine-tuned ones of all seeds. "
        "Learning rate and weights of the regularisers (at seed 0), C of the probe, the scale of task arithmetic and "
        "TIES and the checkpoint of each run were chosen on digits/val (all but C by NLL), WiSE's alpha there by "
        "accuracy, ties going to the lower NLL; digits/val is not shifted, and no shifted image was used for any "
        "choice. "
        f"Chosen: {chosen}; alpha of WiSE: {', '.join(alphas)}. "
        f"Machine: {record['machine']['cpu']}, {record['machine']['cores']} cores; training took "
        f"{record['seconds_of_training'] / 60:.0f} minutes in all. Made by `python -m benchmarks.table_digits`."
    )


def _table(
    groups: Mapping[str, list[Mapping[str, Any]]], names: Sequence[str], metric: str, factor: float, digits: int
) -> str:
    head = ["method", *(name.removeprefix("digits-") for name in names), SHIFTED]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, rows in groups.items():
        cells = []
        for name in [*names, SHIFTED]:
            values = [factor * _value(row, names, name, metric) for row in rows]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(row: Mapping[str, Any], names: Sequence[str], name: str, metric: str) -> float:
    if name != SHIFTED:
        return float(row["metrics"][name][metric])
    return float(statistics.mean(row["metrics"][shift][metric] for shift in names if shift != "digits"))


def _differences(groups: Mapping[str, list[Mapping[str, Any]]], names: Sequence[str]) -> str:
    """Differences paired by seed; those within their 95 % interval are reported as no difference."""
    plain = groups.get("FT", [])
    if len(plain) < 2:
        return "One seed: no spread, so no difference is called a result."
    lines = [
        "Differences in the mean of the shifts, paired by seed, with the half-width of their 95 % interval (Student's "
        "t); one within it is no result. Methods with one row have no spread of their own: their half-width is that of "
        "the interval in which another plain run would lie.",
        "",
    ]
    for method, rows in groups.items():
        if method == "FT" or len(rows) not in (1, len(plain)):
            continue
        told = []
        for metric, factor, digits, unit in (("top1", 100.0, 1, "points"), ("nll", 1.0, 3, "nats")):
            pairs = zip(rows if len(rows) > 1 else rows * len(plain), plain, strict=True)
            gaps = [factor * (_value(a, names, SHIFTED, metric) - _value(b, names, SHIFTED, metric)) for a, b in pairs]
            share = 1 / len(gaps) + (len(rows) == 1)
            mean, half = statistics.mean(gaps), T95.get(len(gaps), 2.5) * statistics.stdev(gaps) * share**0.5
            verdict = "null result" if abs(mean) <= half else "better" if (mean > 0) == (metric == "top1") else "worse"
            told.append(f"{mean:+.{digits}f} ± {half:.{digits}f} {unit} ({verdict})")
        lines.append(f"- {method}: {'; '.join(told)}")
    return "\n".join(lines)
