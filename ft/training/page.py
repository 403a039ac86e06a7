"""The report page of a fine-tuning run: losses and evaluations, read from the files of the run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from featcache.datasets.base import Dataset
from featcache.progress import counted, format_seconds
from ft.checkpoints.folder import LOG, OPTIONS
from ft.checkpoints.state import Json
from ft.training.validation import best_details, best_step
from heads.report.charts import Curve
from heads.report.page import PAGE
from heads.report.web import Background, write_page

MEASURES = {"accuracy": ("top1", "Accuracy (%)", 100.0), "nll": ("nll", "NLL (nats)", 1.0)}
CURVES = {"lr": "learning rate", "gradient_norm": "norm of the gradient"}
ORIGIN = ("featcache", "start", "dataset", "val", "processes")
OWN_SPLIT = (
    "Calibration, classes and confusions are those of update {} on {}. This split chose the update, and the new "
    "temperature was fitted on it: expect worse results on other data."
)


def write_run_page(folder: str | Path, val: Dataset | None = None) -> Path:
    """Write ``report.html`` into the folder of a run, from its ``log.jsonl`` and ``options.json``.

    It has a row per evaluation, curves of losses and metrics, and with the selection split `val` the results of the
    best checkpoint by class.
    """
    folder = Path(folder).expanduser()
    options: Json = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    steps = dict(_lines(folder / LOG))
    judged = {step: line["val"] for step, line in steps.items() if "val" in line}
    selected = options.get("val") or {}
    name = f"{selected.get('name', 'selection')}/{selected.get('split', 'split')}"
    rows = [
        {"head": f"update {step:,}"} | {f"{name}:{key}": found[own] for own, (key, *_) in MEASURES.items()}
        for step, found in judged.items()
    ]
    data = options["dataset"]
    title = f"{options['model']} fine-tuned on {data['name']}/{data['split']}"
    details = [] if val is None else best_details(folder, val)
    notes = [] if rows else ["There is no selection split, so nothing was evaluated; give one with --val."]
    notes += [OWN_SPLIT.format(f"{best_step(folder):,}", name)] if details else []
    origin = {key: _text(options[key]) for key in ORIGIN if options.get(key)}
    shown = {key: value for key, value in options["options"].items() if value not in (None, "", [], {})}
    settings = {key.replace("_", " "): _text(value) for key, value in shown.items()}
    background = Background(
        notes=notes,
        details=details,
        curves=list(_curves(steps, judged)),
        facts={"Cost": _cost(steps, options), "Options": settings, "Provenance": origin},
    )
    return write_page(rows, folder / PAGE, title=title, background=background)


def _lines(path: Path) -> Iterator[tuple[int, Json]]:
    """Log records by update; records of one update are merged, later ones winning."""
    found: dict[int, Json] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found[line["step"]] = found.get(line["step"], {}) | line
    yield from sorted(found.items())


def _curves(steps: Mapping[int, Json], judged: Mapping[int, Json]) -> Iterator[Curve]:
    logged = [(float(step), line) for step, line in steps.items() if "loss" in line]
    lines = {"loss": [(step, float(line["loss"])) for step, line in logged]}
    terms = dict.fromkeys(term for _, line in logged for term in line.get("terms", {}))
    for name in terms if len(terms) > 1 else ():  # a single term is the loss itself
        lines[name] = [(step, float(line["terms"][name])) for step, line in logged if name in line.get("terms", {})]
    if logged:
        yield Curve("Loss and its terms" if len(terms) > 1 else "Loss", "update", "loss", lines)
    for own, (_, label, factor) in MEASURES.items():
        points = [(float(step), factor * float(found[own])) for step, found in judged.items() if own in found]
        if points:
            yield Curve(f"{label.partition(' (')[0]} on the selection split", "update", label, {own: points})
    for key, title in CURVES.items():
        points = [(step, float(line[key])) for step, line in logged if isinstance(line.get(key), int | float)]
        if points:
            yield Curve(title.capitalize(), "update", title, {title: points})


def _cost(steps: Mapping[int, Json], options: Json) -> dict[str, str]:
    seconds = [float(line["seconds"]) for line in steps.values() if "seconds" in line]
    total = int(options.get("steps") or 0)
    batch = int(options["options"].get("batch_size") or 0)
    images = int(options.get("images") or total * batch)  # earlier versions kept no number of images
    facts = {"updates": f"{total:,}, over {counted(images, 'image')}", "device": str(options.get("device"))}
    if seconds and seconds[-1] > 0:
        last = max(step for step, line in steps.items() if "seconds" in line)
        speed = images * last / max(total, 1) / seconds[-1]
        facts["time"] = f"{format_seconds(seconds[-1])}, {speed:,.1f} images/s, evaluations included"
    return facts


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
