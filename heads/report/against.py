"""Compare measured results with published ones, each with its source and protocol.

The published figures are in ``heads/report/published/*.toml``, one file per system. A file contains tables::

    system = "WiSE-FT"

    [[table]]
    title = "End-to-end fine-tuning, interpolated with zero-shot"
    source = "Wortsman et al., arXiv 2109.01903, Table 5"
    model = "ViT-B/16"              # OpenAI's weights; a row may name its own, as any key below
    method = "wise"                 # zero_shot, wise, linear (a probe, or its interpolation) or finetuned
    name = "WiSE-FT, end to end"    # of the method, for people; optional
    prompts = "openai-imagenet"     # optional
    preprocess = "central-crop"     # optional: an encoder's option, in place of the model's own preprocessing
    preprocessing = "..."           # in words
    protocol = "..."
    shots = 16                      # optional: rows per class
    on_request = true               # optional: compared only where the file is named
    tolerance = { top1 = 0.6 }      # in the unit of the values: percentage points, or nats
    datasets = ["imagenet", "imagenet-v2"]
    rows = [{ alpha = 0.5, top1 = [81.7, 72.8] }]   # metrics by data set, "" where there is none; average = their mean
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from featcache.encoders import PREPARATIONS
from featcache.errors import HeadError
from featcache.parameters import OneOf, check_record, check_regular
from heads.evaluation.metrics import METRICS, Metric, Row
from heads.report.rows import alpha_of, is_wise_ft, label_of, mean_of, name_of
from heads.report.tables import aligned_lines

PUBLISHED = "published"
FOLDER = Path(__file__).parent / PUBLISHED
METHODS = ("zero_shot", "wise", "linear", "finetuned")
PROBES = ("logistic", "ridge")
KEYS = {
    *("title", "source", "model", "method", "name", "prompts", "preprocess", "preprocessing", "protocol"),
    *("on_request", "datasets", "rows", "average_of", "alpha", "shots", "settings", "tolerance", "average"),
}
KINDS: dict[str, object] = {
    **dict.fromkeys(("datasets", "average_of"), list[str]),
    **dict.fromkeys(("tolerance", "settings"), dict[str, float]),
    **dict.fromkeys(("alpha", "shots", "average"), float),
    "method": Annotated[str, OneOf(*METHODS)],
}
VALUES = list[float | Literal[""]]
UNKNOWN = Metric("", "%", higher_is_better=True)


@dataclass(frozen=True)
class Figure:
    """One published value; percentages are fractions, as in results rows."""

    file: str
    system: str
    title: str
    source: str
    preprocessing: str
    protocol: str
    model: str  # one of OpenAI's
    method: str  # one of `METHODS`
    name: str  # the authors' name of the method
    datasets: tuple[str, ...]  # several if the value is their mean
    metric: str
    value: float
    tolerance: float
    alpha: float  # interpolation coefficient; 0 for zero-shot, 1 for what is not interpolated
    shots: int | None = None  # rows per class, None for all
    prompts: str | None = None  # None where not stated
    preprocess: str | None = None  # None for the model's own
    on_request: bool = False  # whether to compare only where the file is named
    settings: Mapping[str, float] = field(default_factory=dict)  # further parameters of the method

    @property
    def label(self) -> str:
        """Method and source in a few words."""
        setting = "".join(f", {name} {value:g}" for name, value in self.settings.items())
        return f"{self.name}{setting}: {self.source}"


@dataclass(frozen=True)
class Comparison:
    """A measured value and the published one."""

    head: str
    dataset: str
    measured: float  # as in results rows
    figure: Figure
    other: str = ""  # known differences between the settings, such as preprocessing

    @property
    def difference(self) -> float:
        """Measured minus published."""
        return self.measured - self.figure.value

    @property
    def beyond(self) -> bool:
        """Whether the settings are alike and the difference exceeds the tolerance."""
        return not self.other and abs(self.difference) > self.figure.tolerance + 1e-9

    @property
    def shown(self) -> Metric:
        """How the metric is displayed."""
        return METRICS.get(self.figure.metric, UNKNOWN)

    def text(self, value: float, sign: str = "") -> str:
        """A value in the metric's unit, with two decimals for percentages and three for nats."""
        digits = 2 if self.shown.unit == "%" else 3
        return f"{value * self.shown.factor:{sign}.{digits}f}"

    def to_json(self) -> Row:
        """All fields as JSON types."""
        figure = self.figure
        row: Row = {"head": self.head, "data": self.dataset, "metric": figure.metric}
        row |= {"measured": self.measured, "published": figure.value, "difference": self.difference}
        row |= {"tolerance": figure.tolerance, "beyond": self.beyond, "other": self.other, "method": figure.name}
        return row | {key: vars(figure)[key] for key in ("source", "title", "preprocessing", "protocol")}


@cache
def published_figures() -> tuple[Figure, ...]:
    """All figures that the package holds."""
    return tuple(figure for path in sorted(FOLDER.glob("*.toml")) for figure in read_figures(path))


def read_figures(path: str | Path) -> list[Figure]:
    """The figures in one file; see the module for its form.

    HeadError for a file that cannot be read, an unknown method, or more values than data sets.
    """
    path = Path(path)
    try:
        check_regular(path)
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HeadError(f"{path}: cannot be read as published figures ({error}); it is a TOML file") from error
    try:
        return [
            figure
            for table in record.get("table", ())
            for row in table["rows"]
            for figure in _figures(path, str(record["system"]), {k: v for k, v in table.items() if k != "rows"} | row)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HeadError(f"{path}: {error!r}; expected system, and tables with rows of lists by data set") from error


def _figures(path: Path, system: str, known: Row) -> Iterator[Figure]:
    """The figures of a row, to which the keys of its table have been added."""
    metrics = [key for key in known if key not in KEYS]
    check_record(known, KINDS | dict.fromkeys(metrics, VALUES), system, ("datasets", "method", "tolerance"))
    names, method, tolerances = known["datasets"], known["method"], known["tolerance"]

    def figure(datasets: Sequence[str], metric: str, value: float) -> Figure:
        factor = METRICS.get(metric, UNKNOWN).factor
        return Figure(
            file=path.stem,
            system=system,
            **{key: str(known[key]) for key in ("title", "source", "preprocessing", "protocol", "model")},
            method=method,
            name=str(known.get("name", method.replace("_", "-"))),
            datasets=tuple(datasets),
            metric=metric,
            value=round(value / factor, 10),
            tolerance=tolerances[metric] / factor,
            alpha=float(known.get("alpha", method != "zero_shot")),
            shots=int(known["shots"]) if "shots" in known else None,
            **{key: str(known[key]) for key in ("prompts", "preprocess") if key in known},
            on_request=bool(known.get("on_request", False)),
            settings={key: float(value) for key, value in known.get("settings", {}).items()},
        )

    for metric in metrics:
        values = known[metric]
        if len(values) > len(names):
            raise ValueError(f"{metric} has {len(values)} values for {len(names)} data sets")
        yield from (figure([name], metric, v) for name, v in zip(names, values, strict=False) if v != "")
    if "average" in known:
        yield figure(known.get("average_of") or names, metrics[0], known["average"])


def compare_published(rows: Sequence[Row], against: str = PUBLISHED, *, prompts: str | None = None) -> list[Comparison]:
    """Compare measured values with published ones of the same model, method, data set and metric, in order of the rows.

    `against` is ``published`` for all figures of the package; ``published:WORD[,WORD...]`` with the name of a file (to
    use only its figures) or of a model (for rows of a fine-tuned model, whose folder name does not say); or a TOML file
    of your own figures. `prompts` is the template set of the zero-shot rows, if known. Where preprocessing or prompts
    are known to differ, `Comparison.other` says so. HeadError for an unknown word or a file that cannot be read.
    """
    figures, model = _chosen(against)
    by_place: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        by_place.setdefault((plain_dataset(figure.datasets[-1]), figure.metric), []).append(figure)
    found = []
    for row in rows:
        keys = [key.rpartition(":") for key in row if ":" in key]
        keys = [key for key in keys if key[0] not in row.get("training_rows", ())]
        known = {plain_dataset(name): name for name, *_ in keys}
        of_row = model or plain_model(_model_of(row))
        for name, _, metric in keys:
            names = known | {plain_dataset(name): name}
            for figure in by_place.get((plain_dataset(name), metric), ()):
                parts = [names[plain] for part in figure.datasets if (plain := plain_dataset(part)) in names]
                measured = mean_of(row, parts, metric)
                if measured is None or len(parts) < len(figure.datasets) or not _same(row, figure, of_row):
                    continue
                shown = name if len(parts) == 1 else f"mean of {len(parts)}"
                found.append(Comparison(label_of(row), shown, measured, figure, _other(row, figure, prompts)))
    return found


def _chosen(against: str) -> tuple[list[Figure], str | None]:
    """The selected figures, and the model that the user says the rows belong to."""
    first, colon, words = against.partition(":")
    if first != PUBLISHED:
        if not Path(against).is_file():
            raise HeadError(
                f"--against {against}: expected {PUBLISHED}, {PUBLISHED}:NAME with a file's or a model's name, or a "
                "TOML file of figures"
            )
        return read_figures(against), None
    figures = published_figures()
    files, models = {figure.file for figure in figures}, {figure.model for figure in figures}
    wanted, model = set(), None
    for word in words.split(",") if colon else ():
        if word in files:
            wanted.add(word)
        elif plain_model(word) in map(plain_model, models):
            model = plain_model(word)
        else:
            raise HeadError(f"--against {against}: {word!r} is none of {', '.join([*sorted(files), *sorted(models)])}")
    return [figure for figure in figures if (figure.file in wanted if wanted else not figure.on_request)], model


def _model_of(row: Row) -> str:
    return str(row.get("encoder") or row.get("model") or "")


def plain_model(name: str) -> str:
    """Canonical form of a model name, which includes the weights unless they are OpenAI's.

    >>> plain_model("ViT-B-16-quickgelu/openai/central-crop"), plain_model("ViT-B/16"), plain_model("ViT-L/14@336px")
    ('vitb16', 'vitb16', 'vitl14336')
    >>> plain_model("ViT-B-16/laion2b_s34b_b88k")
    'vitb16laion2bs34bb88k'
    """
    kept = [part for part in name.lower().split("/") if part not in ("openai", *PREPARATIONS)]
    return re.sub(r"quickgelu|[^a-z0-9]", "", "/".join(kept)).removesuffix("px")


def plain_dataset(name: str) -> str:
    """Canonical form of a data set name (featcache's, WiSE-FT's or Lipsum-FT's), without the split.

    >>> plain_dataset("ImageNetV2"), plain_dataset("imagenet-v2/test"), plain_dataset("DomainNetReal_x224")
    ('imagenetv2', 'imagenetv2', 'domainnetreal')
    """
    plain = re.sub(r"[^a-z0-9]", "", name.partition("/")[0].lower().removesuffix("_x224"))
    return plain.removesuffix("matchedfrequency")


def _same(row: Row, figure: Figure, model: str) -> bool:
    """Whether a row has the model, method, interpolation coefficient and shots of a figure."""
    if plain_model(figure.model) != model or figure.shots != row.get("shots"):
        return False
    method, alpha = method_of(row)
    return abs(alpha - figure.alpha) < 1e-6 and (alpha == 0 or method == figure.method)


def method_of(row: Row) -> tuple[str | None, float]:
    """The method of a row, one of `METHODS` or None, and its interpolation coefficient; at 0 all are zero-shot.

    >>> method_of({"head": "zero_shot"}), method_of({"head": "zero_shot+ridge", "alpha": 0.5})
    (('zero_shot', 0.0), ('linear', 0.5))
    >>> method_of({"alpha": 0.5, "freeze_encoder": False, "results_db": "results.jsonl"})   # WiSE-FT's own row
    ('wise', 0.5)
    """
    name = name_of(row).partition(":")[0]
    alpha = alpha_of(row)
    if is_wise_ft(row) and alpha is not None:
        return ("linear" if row.get("freeze_encoder") else "wise"), alpha
    first, _, second = name.partition("+")
    if first == "zero_shot":
        return ("linear", alpha) if second and alpha is not None else ("zero_shot", 0.0)
    kinds = {"wise": "wise", "finetuned": "finetuned", **dict.fromkeys(PROBES, "linear")}
    return kinds.get(first), 1.0 if alpha is None else alpha


def _other(row: Row, figure: Figure, prompts: str | None) -> str:
    """Known differences between the settings of a row and a figure."""
    parts = _model_of(row).lower().split("/")
    own = next((part for part in parts if part in PREPARATIONS), None)
    differs = ["preprocessing"] if own != figure.preprocess else []
    if prompts is not None and figure.prompts is not None and prompts != figure.prompts:
        differs.append("prompts")
    return " and ".join(differs)


HEADER = ("head", "data set", "metric", "measured", "published", "difference", "", "source")


def comparison_cells(found: Sequence[Comparison]) -> list[list[str]]:
    """A line of texts for each comparison, under `HEADER`; ``!`` marks a difference beyond the tolerance."""
    return [
        [
            one.head,
            one.dataset,
            f"{one.figure.metric} {one.shown.unit}".strip(),
            f"{one.text(one.measured):>8}",
            f"{one.text(one.figure.value):>9}",
            f"{one.text(one.difference, '+'):>10}",
            "!" if one.beyond else f"other {one.other}" if one.other else "",
            one.figure.label,
        ]
        for one in found
    ]


def comparison_text(found: Sequence[Comparison], rows: Sequence[Row] = ()) -> str:
    """The comparisons as a plain table, and a summary of those beyond their tolerance."""
    if not found:
        models = ", ".join(sorted({_model_of(row) or "not named" for row in rows}))
        return (
            f"no published figure for these results (model: {models}); --against published:MODEL says which of "
            "OpenAI's models they are of, benchmarks/published has all figures"
        )
    beyond = [one for one in found if one.beyond]
    alike = sum(not one.other for one in found)
    tail = f"{len(beyond)} of {alike} differences in comparable settings are beyond their tolerance"
    tail += "".join(sorted({f"; ! {one.figure.metric}: {one.text(one.figure.tolerance)}" for one in beyond}))
    return "\n".join([*aligned_lines([HEADER, *comparison_cells(found)]), tail])
