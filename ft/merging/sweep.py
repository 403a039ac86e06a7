"""WiSE-FT with evaluation: merge for every alpha, encode and evaluate each model, keep the best on a selection split.

A merged model is encoded and evaluated like any other. Heads are merged like the weights, with or without Fisher
information; without heads, the zero-shot head of the merged model is used. The head of every alpha is saved beside its
model.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featcache.datasets.base import Dataset
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.images import encode_dataset
from featcache.encoding.options import EncodeOptions
from featcache.encoding.texts import embed_prompts
from featcache.errors import FeatcacheError, HeadError, MismatchError, TrainingError
from featcache.store import ImageStore
from featcache.store.protocol import FeatureTable
from ft.checkpoints.folder import BEST, check_targets, head_path, read_state, write_model_folder
from ft.checkpoints.heads import load_head
from ft.checkpoints.parents import Parent, load_open_clip, parent_of
from ft.checkpoints.state import Json
from ft.merging.greedy import greedy_soup
from ft.merging.interpolate import FISHER_FLOOR
from ft.merging.splits import check_splits
from ft.merging.wise import head_part, merged_head, recorded_head, wise
from heads import LinearHead, ZeroShot, calibrate, evaluate, load, save
from heads.evaluation.evaluate import best_of, store_labels
from heads.evaluation.metrics import LOWER_IS_BETTER, metric_of
from heads.evaluation.passes import ClassSubset
from heads.evaluation.seen import Seen, check_seen, excluded, unseen_by
from heads.fitted.base import LogitHead
from heads.fitted.provenance import ROLES
from heads.report.details import Detail, head_details

SOUPS = ("uniform", "greedy")


@dataclass(frozen=True)
class WiseOptions:
    """How `sweep` merges and evaluates models.

    Parameters
    ----------
    pretrained, fisher, floor, overwrite : see `ft.merging.wise.wise`
    on : splits to report
    names : their names in the rows' keys, and in `class_subset`; default: those of the data sets
    class_subset : classes of the splits in `on`, see `heads.evaluate`
    heads
        Heads of the zero-shot model and of each fine-tuned one, merged like the weights; the first may be
        ``zero_shot``. None: zero-shot heads from `templates`.
    templates : template set, file, or one template with ``{}``
    metric
        Metric compared on the selection split: ``top1``, ``nll``, ...; ties go to the lower NLL, then to the smaller
        alpha.
    soup : {"uniform", "greedy"}, how several fine-tuned models are averaged
    best_only : encode and evaluate the splits in `on` with the best model only
    seen : {"refuse", "exclude", "allow"}
        What to do about rows that a head was fitted or chosen on, see `heads.evaluate`; on the selection split only
        fitted rows count. Checked before merging. With "exclude", every alpha is evaluated on the same rows.
    update_labels : replace the labels of stores if those of the data set have changed, see `EncodeOptions`
    root : folder of all stores
    device, preprocess : see `featcache.encoders.load_encoder`

    Raises
    ------
    TrainingError, HeadError
        The kind of soup or the metric is unknown.
    """

    pretrained: str | None = None
    fisher: tuple[str | Path, str | Path] | None = None
    floor: float = FISHER_FLOOR
    overwrite: bool = False
    on: Sequence[Dataset] = ()
    names: Sequence[str] | None = None
    class_subset: ClassSubset = None
    heads: Sequence[str | Path] | None = None
    templates: str = "simple"
    metric: str = "top1"
    soup: str = "uniform"
    best_only: bool = False
    seen: Seen = "refuse"
    update_labels: bool = False
    root: str | Path | None = None
    device: str | None = None
    preprocess: str | None = None

    def __post_init__(self) -> None:
        if self.soup not in SOUPS:
            raise TrainingError(f"soup {self.soup!r}: expected one of {', '.join(SOUPS)}")
        metric_of(self.metric)
        check_seen(self.seen)


@dataclass(frozen=True)
class Sweep:
    """Results of a sweep.

    Parameters
    ----------
    rows : one results row of `heads.evaluate` per alpha; keys of the selection split are ``"<name>/<split>:<metric>"``
    folders, heads : model folder and head of each alpha
    ingredients : numbers of the fine-tuned models in the soup
    """

    rows: list[Json]
    folders: list[Path]
    heads: list[Path]
    ingredients: list[int]


@dataclass(frozen=True)
class ChosenSweep(Sweep):
    """Results of a sweep with a selection split.

    Parameters
    ----------
    best : row of the best alpha on the selection split; its metrics on other splits may be reported
    alpha, folder, head : the best alpha, its model folder and its head
    selection : name of the selection split in the rows' keys
    """

    best: Json
    alpha: float
    folder: Path
    head: Path
    selection: str


def sweep(
    zero_shot: str | Path | Parent,
    fine_tuned: str | Path | Sequence[str | Path],
    alphas: Iterable[float],
    out: str | Path,
    select: Dataset,
    options: WiseOptions | None = None,
) -> ChosenSweep:
    """Merge, encode and evaluate a model for every alpha; keep the best on the selection split as one checkpoint.

    Parameters
    ----------
    zero_shot, fine_tuned, alphas, out
        See `ft.merging.wise.wise`. Beside each model folder its head is written, ``alpha=0.500_head.safetensors``, and
        the best are copied to ``out/best`` and ``out/best_head.safetensors``.
    select : selection split, on which alphas and the models of a greedy soup are compared

    Raises
    ------
    TrainingError, EncoderError, MismatchError
        See `ft.merging.wise.wise`; also if the number of heads does not match that of the models.
    """
    options, out = options or WiseOptions(), Path(out).expanduser()
    steps = [float(alpha) for alpha in alphas]
    check_targets([out / BEST], options.overwrite)
    run = _Evaluation(select, options)
    found, heads = run.merge(zero_shot, fine_tuned, steps, out)
    place, choice = run.choice(found.rows, steps)
    folder, encoder = found.folders[place], run.encoder(found.folders[place])
    row = found.rows[place] | (run.row(heads[place], encoder, options.on) if options.best_only else {})
    # the head records the selection split, so that it is never reported on it
    provenance = heads[place].provenance.chosen(run.rows(encoder, select, ROLES[:1]), **choice)
    row["chosen_on"] = provenance.chosen_on
    head = heads[place].with_provenance(provenance)
    record = {"alpha": steps[place], "chosen_on": row["chosen_on"], "ingredients": found.ingredients}
    best = write_model_folder(folder, read_state(folder), out / BEST, record, overwrite=options.overwrite)
    written = save(head, head_path(out, BEST))
    return ChosenSweep(**vars(found), best=row, alpha=steps[place], folder=best, head=written, selection=run.split)


def sweep_unchosen(
    zero_shot: str | Path | Parent,
    fine_tuned: str | Path | Sequence[str | Path],
    alphas: Iterable[float],
    out: str | Path,
    options: WiseOptions,
) -> Sweep:
    """`sweep` without a selection split: every alpha is evaluated on the splits to report, and none is chosen.

    Without splits to report, models and heads are merged but not evaluated.

    Raises
    ------
    TrainingError, EncoderError, MismatchError
        See `sweep`; also for a greedy soup or `best_only`, which need a selection split.
    """
    if options.best_only or options.soup == "greedy":
        raise TrainingError("best_only and a greedy soup choose on a selection split; give one (--select)")
    run, out = _Evaluation(None, options), Path(out).expanduser()
    return run.merge(zero_shot, fine_tuned, [float(alpha) for alpha in alphas], out)[0]


def best_in(found: Sweep, on: Sequence[Dataset], select: Dataset | None, options: WiseOptions) -> list[Detail]:
    """Results by class and calibration of the chosen model on the splits in `on`, from its stores.

    Without a selection split, this is the most accurate model on the first split.
    """
    evaluation = _Evaluation(select, options)
    if isinstance(found, ChosenSweep):
        folder, file = found.folder, found.head
    else:
        values = [float(row[f"{evaluation.labels[0]}:top1"]) for row in found.rows]
        folder, file = (places[values.index(max(values))] for places in (found.folders, found.heads))
    encoder, head, after = evaluation.encoder(folder), load(file), None
    evaluation.used = [load(path) for path in found.heads]
    if select is not None:
        with contextlib.suppress(FeatcacheError):  # raised if a head was fitted on these rows
            after = calibrate(head, evaluation.rows(encoder, select, ROLES[:1]))
    stores = [evaluation.rows(encoder, dataset) for dataset in on]
    return head_details(head, stores, evaluation.labels, class_subset=options.class_subset, calibrated=after)


class _Evaluation:
    """Merges and evaluates the models of a sweep."""

    def __init__(self, select: Dataset | None, options: WiseOptions) -> None:
        self.select, self.options = select, options
        self.fishers = [head_part(read_state(path)) for path in options.fisher or ()]
        self.split = "" if select is None else f"{select.name}/{select.split}"
        self.labels = store_labels(options.on, options.names)
        self.heads: list[LinearHead] | None = None
        self.used: list[LogitHead] = []
        splits = [*([] if select is None else [select]), *options.on]
        self.classnames = splits[0].index.classnames if splits else ()
        self.of = splits[0].name if splits else "wise"

    def merge(
        self,
        zero_shot: str | Path | Parent,
        fine_tuned: str | Path | Sequence[str | Path],
        steps: Sequence[float],
        out: Path,
    ) -> tuple[Sweep, list[LinearHead]]:
        """Write and evaluate the models and heads of all alphas."""
        options = self.options
        tuned = [fine_tuned] if isinstance(fine_tuned, str | Path) else list(fine_tuned)
        parent = parent_of(zero_shot, options.pretrained)
        self.load_heads(parent, len(tuned))
        self.check(steps)
        chosen = list(range(len(tuned)))
        if options.soup == "greedy" and len(tuned) > 1:
            folder = out / ".soup"
            chosen = greedy_soup(parent, tuned, folder, lambda chosen: self.value(self.encoder(folder), chosen))
        parts = [tuned[k] for k in chosen]
        fisher, floor, overwrite = options.fisher, options.floor, options.overwrite
        folders = wise(parent, parts, steps, out, fisher=fisher, floor=floor, overwrite=overwrite)
        heads, rows = [], []
        for alpha, folder in zip(steps, folders, strict=True):
            encoder = self.encoder(folder)
            heads.append(self.head(encoder, alpha, chosen))
            save(heads[-1], head_path(out, folder.name))
            rows.append(self.row(heads[-1], encoder, () if options.best_only else options.on))
        return Sweep(rows, folders, [head_path(out, folder.name) for folder in folders], chosen), heads

    def load_heads(self, parent: Parent, n_tuned: int) -> None:
        """Load the heads to merge, if the options name any.

        Their classes must be those of the selection split, else of the first split to report, else of the first head.
        """
        paths = self.options.heads
        if paths is None:
            if not self.classnames:
                raise HeadError("the classes of zero-shot heads are unknown; give a split (--on, --select) or --heads")
            return
        if len(paths) != n_tuned + 1:
            raise TrainingError(
                f"{len(paths)} heads for the zero-shot model and {n_tuned} fine-tuned one(s): expected {n_tuned + 1}, "
                "the zero-shot model's first (`zero_shot` builds it from the templates)"
            )
        files = [path for path in paths if str(path) != "zero_shot"]
        if not self.classnames and files:
            self.classnames = load(files[0]).classnames
        heads = [self._head_of(path, parent) for path in paths]
        if wrong := [head.name for head in heads if head.classnames != self.classnames]:
            of = self.of if self.select or self.options.on else "the first"
            raise MismatchError(f"heads {', '.join(wrong)} have other classes than {of}; expected the same")
        self.heads = heads

    def check(self, alphas: Sequence[float]) -> None:
        """Refuse splits with other classes than the heads, and rows that a head with nonzero weight has seen."""
        if self.heads is None:
            zeros = np.zeros((len(self.classnames), 1), np.float32)
            heads = [LinearHead(zeros, zeros[:, 0], self.classnames)]
        else:
            heads = [*self.heads[: any(alpha != 1 for alpha in alphas)], *(self.heads[1:] if any(alphas) else [])]
            self.used = [*heads]
        seen, root = self.options.seen, self.options.root
        if self.select is not None:
            check_splits(heads, [self.select], {"seen": seen, "allow_chosen": True}, root=root)
        subset = self.options.class_subset
        check_splits(heads, self.options.on, {"seen": seen}, labels=self.labels, class_subset=subset, root=root)

    def _head_of(self, path: str | Path, parent: Parent) -> LinearHead:
        if str(path) == "zero_shot":
            return self.head(parent.load(self.options.device), None)
        head = load_head(path, self.classnames, lambda: parent.load(self.options.device).logit_scale)
        return replace(head, name=Path(path).stem)  # its name in errors and in the record of a merged head

    def encoder(self, folder: Path) -> OpenClipEncoder:
        options = self.options
        return load_open_clip(f"local-dir:{folder}", device=options.device, preprocess=options.preprocess)

    def store(self, encoder: OpenClipEncoder, dataset: Dataset) -> ImageStore:
        options = EncodeOptions(update_labels=self.options.update_labels)
        return encode_dataset(dataset, encoder, root=self.options.root, options=options).store

    def rows(self, encoder: OpenClipEncoder, dataset: Dataset, roles: Sequence[str] = ROLES) -> FeatureTable:
        """The store of a split; with "exclude", without the rows that one of the heads has seen."""
        store = self.store(encoder, dataset)
        return unseen_by(store, self.used, roles) if self.options.seen == "exclude" else store

    def row(self, head: LinearHead, encoder: OpenClipEncoder, on: Sequence[Dataset] = ()) -> Json:
        """Metrics on the selection split and on the splits to report."""
        row: Json = {}
        if self.select is not None:
            chosen_from = self.rows(encoder, self.select, ROLES[:1])
            seen: Seen = "refuse" if self.options.seen == "refuse" else "allow"  # fitted rows are left out already
            row = evaluate([head], [chosen_from], allow_chosen=True, seen=seen, names=[self.split])[0]
        stores = [self.rows(encoder, dataset) for dataset in on]
        options = self.options
        if not stores:
            return row
        (told,) = evaluate([head], stores, names=self.labels, class_subset=options.class_subset, seen=options.seen)
        row |= told | {"splits": row.get("splits", {}) | told["splits"]}
        if options.seen == "exclude":
            left = zip(self.labels, on, stores, strict=True)
            row |= {f"{label}:n_excluded": excluded(self.store(encoder, data), rest) for label, data, rest in left}
        return row

    def value(self, encoder: OpenClipEncoder, chosen: Sequence[int]) -> float:
        """The metric of a soup of some models on the selection split, negated where lower is better."""
        row = self.row(self.head(encoder, None, chosen), encoder)
        value = float(row[f"{self.split}:{self.options.metric}"])
        return -value if self.options.metric in LOWER_IS_BETTER else value

    def choice(self, rows: Sequence[Json], alphas: Sequence[float]) -> tuple[int, Json]:
        """Index of the best row on the selection split, and the record of the choice."""
        order = sorted(range(len(rows)), key=lambda number: alphas[number])
        values, nll = (
            [float(rows[number][f"{self.split}:{name}"]) for number in order] for name in (self.options.metric, "nll")
        )
        best, record = best_of(values, nll, self.options.metric)
        return order[best], record

    def head(self, encoder: OpenClipEncoder, alpha: float | None, chosen: Sequence[int] = ()) -> LinearHead:
        """Head of a merged model: zero-shot, or merged from that of the zero-shot model and those of the soup."""
        if self.heads is None:
            names = self.classnames
            embedded = embed_prompts(names, self.options.templates, encoder, name=self.of, root=self.options.root)
            return replace(ZeroShot().fit(embedded.store).linear(), name="wise", alpha=alpha)
        at, tuned = 1.0 if alpha is None else alpha, [self.heads[1 + k] for k in chosen]
        merged = merged_head(self.heads[0], tuned, at, self.fishers, self.options.floor)
        used = [*([self.heads[0]] if at != 1 else []), *(tuned if at != 0 else [])]
        weighted = {"fisher_floor": self.options.floor} if any(self.fishers) else {}
        params = {"alpha": alpha, "heads": [head.name for head in self.heads], **weighted}
        return recorded_head(merged, used, encoder, "wise", params, alpha)
