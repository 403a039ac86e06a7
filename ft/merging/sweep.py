"""WiSE-FT judged: every merged model encoded into its own stores, the best one on a selection split kept.

A merged model is judged as any other is: its folder is encoded (once: the store is found again), its head is evaluated
on the store. Where the models have heads of their own, the head of alpha is merged as the weights are, plainly or by
Fisher information: in WiSE-FT the classifier is a layer like the others. Otherwise it is the zero-shot head of the
merged model's own texts.

Soups of several fine-tuned models: `uniform` averages all; `greedy` takes them from best to worst on the selection
split and keeps each that does not make the average worse there (Wortsman et al., arXiv 2203.05482).
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.datasets.base import Dataset
from featcache.encoders import load_encoder
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.chunks import encoder_key
from featcache.encoding.images import encode_dataset
from featcache.encoding.texts import embed_prompts
from featcache.errors import EncoderError, HeadError, MismatchError, TrainingError
from featcache.store import ImageStore
from ft.checkpoints.folder import read_state, write_model_folder
from ft.checkpoints.parents import Parent, parent_of
from ft.checkpoints.state import State
from ft.merging.interpolate import FISHER_FLOOR, soup
from ft.merging.wise import head_part, merged_head, read_tuned, weights_of, wise
from heads import LinearHead, ZeroShot, evaluate, load, save
from heads.evaluation.evaluate import best_of
from heads.evaluation.metrics import LOWER_IS_BETTER, METRICS
from heads.fitted.provenance import split_id

SOUPS = ("uniform", "greedy")
BEST = "best"


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Parameters
    ----------
    rows : list of dict
        One row an alpha, as `heads.evaluate` gives them; the selection split is always ``"<name>/<split>:<metric>"``.
    best : dict
        The row of the best alpha on the selection split; its figures elsewhere may be reported.
    alpha : float
    folder, head : Path
        Model folder and head of the best alpha.
    ingredients : list of int
        Which fine-tuned models are in it.
    """

    rows: list[dict[str, Any]]
    best: dict[str, Any]
    alpha: float
    folder: Path
    head: Path
    ingredients: list[int]


@dataclass
class _Judge:
    """Heads and stores of model folders."""

    selection: Dataset
    templates: str
    root: Any
    device: str | None
    preprocess: str | None
    floor: float
    fishers: Sequence[State]
    heads: list[LinearHead] | None = None

    def encoder(self, folder: Path) -> OpenClipEncoder:
        encoder = load_encoder(f"local-dir:{folder}", device=self.device, preprocess=self.preprocess)
        if not isinstance(encoder, OpenClipEncoder):
            raise EncoderError(f"{folder}: expected a model folder of open_clip")
        return encoder

    def store(self, encoder: OpenClipEncoder, dataset: Dataset) -> ImageStore:
        return encode_dataset(dataset, encoder, root=self.root).store

    def row(self, head: LinearHead, encoder: OpenClipEncoder, on: Sequence[Dataset]) -> dict[str, Any]:
        """Metrics on the selection split, under ``"<name>/<split>:<metric>"``, and on the splits to report."""
        chosen = evaluate([head], [self.store(encoder, self.selection)], allow_chosen=True)[0]
        name = f"{self.selection.name}:"
        row = {key.replace(name, f"{self.selection.name}/{self.selection.split}:", 1): chosen[key] for key in chosen}
        stores = [self.store(encoder, dataset) for dataset in on]
        return row | (evaluate([head], stores)[0] if stores else {})

    def head(self, encoder: OpenClipEncoder, alpha: float | None, chosen: Sequence[int] = ()) -> LinearHead:
        """Head of a merged model: of its own texts, or from the zero-shot one and the chosen fine-tuned ones."""
        names = self.selection.index.classnames
        if self.heads is None:
            texts = embed_prompts(names, self.templates, encoder, name=self.selection.name, root=self.root).store
            return replace(ZeroShot().fit(texts).linear(), name="wise", alpha=alpha)
        at, tuned = 1.0 if alpha is None else alpha, [self.heads[1 + k] for k in chosen]
        weights, bias = merged_head(self.heads[0], tuned, at, self.fishers, self.floor)
        used = [*([self.heads[0]] if at != 1 else []), *(tuned if at != 0 else [])]
        weighted: dict[str, Any] = {"fisher_floor": self.floor} if any(self.fishers) else {}
        provenance = {
            "head": "wise",
            "params": {"alpha": alpha, "heads": [head.name for head in self.heads], **weighted},
            "encoder_key": encoder_key(encoder),
            "text_digest": None,
            "classnames": list(names),
            "fitted_on": [entry for head in used for entry in head.provenance.get("fitted_on", [])],
            "chosen_on": [entry for head in used for entry in head.provenance.get("chosen_on", [])],
            "featcache": __version__,
        }
        return LinearHead(weights, bias, names, "wise", provenance, alpha)


def sweep(
    zero_shot: str | Path | Parent,
    fine_tuned: str | Path | Sequence[str | Path],
    alphas: Iterable[float],
    out: str | Path,
    *,
    pretrained: str | None = None,
    select: Dataset,
    on: Sequence[Dataset] = (),
    heads: Sequence[str | Path] | None = None,
    templates: str = "simple",
    metric: str = "top1",
    soup_kind: str = "uniform",
    best_only: bool = False,
    fisher: tuple[str | Path, str | Path] | None = None,
    floor: float = FISHER_FLOOR,
    root: str | Path | None = None,
    device: str | None = None,
    preprocess: str | None = None,
    overwrite: bool = False,
) -> Sweep:
    """Merge, encode and judge models for every alpha; keep the best on the selection split as one checkpoint.

    Parameters
    ----------
    zero_shot, fine_tuned, alphas, out, pretrained, fisher, floor, overwrite
        See `ft.merging.wise.wise`; beside its folders ``out/best`` and ``out/best_head.safetensors`` are written.
    select : Dataset
        Selection split: alphas (and ingredients of a greedy soup) are compared here.
    on : sequence of Dataset
        Other splits, to report.
    heads : paths, optional
        Heads of the zero-shot model and of each fine-tuned one, merged as the weights are, by Fisher information where
        the files of `fisher` hold it; the first may be ``zero_shot``. None: zero-shot heads from `templates`.
    metric : str
        What is compared: ``top1``, ``nll``, ...; ties go to the lower NLL, then to the smaller alpha.
    soup_kind : {"uniform", "greedy"}
        How several fine-tuned models are averaged.
    best_only : bool
        Encode and judge the other splits with the best model alone.
    preprocess : str, optional
        How the models' pictures are prepared: see `featcache.encoders.load_encoder`.

    Raises
    ------
    TrainingError, EncoderError, MismatchError
        As `ft.merging.wise.wise`; heads that are not as many as the models; another kind of soup.
    """
    tuned = [fine_tuned] if isinstance(fine_tuned, str | Path) else list(fine_tuned)
    steps, out = [float(alpha) for alpha in alphas], Path(out)
    if soup_kind not in SOUPS:
        raise TrainingError(f"soup {soup_kind!r}: expected one of {', '.join(SOUPS)}")
    if (out / BEST).exists() and not overwrite:
        raise EncoderError(f"{out / BEST}: there already; name another folder, or replace it (--overwrite)")
    fishers = [head_part(read_state(path)) for path in fisher or ()]
    judge = _Judge(select, templates, root, device, preprocess, floor, fishers)
    parent = parent_of(zero_shot, pretrained)
    judge.heads = _load_heads(heads, len(tuned), judge, parent)
    value = _value_of(select, metric)
    chosen = list(range(len(tuned)))
    if soup_kind == "greedy" and len(tuned) > 1:
        chosen = _greedy_soup(parent, tuned, out, judge, value)
    folders = wise(parent, [tuned[k] for k in chosen], steps, out, fisher=fisher, floor=floor, overwrite=overwrite)
    heads_of, rows = [], []
    for alpha, folder in zip(steps, folders, strict=True):
        encoder = judge.encoder(folder)
        heads_of.append(judge.head(encoder, alpha, chosen))
        rows.append(judge.row(heads_of[-1], encoder, () if best_only else on))
    place, choice = _choice(rows, steps, select, metric)
    row = dict(rows[place])
    if best_only:
        row |= judge.row(heads_of[place], judge.encoder(folders[place]), on)
    head = _mark_chosen(heads_of[place], judge, folders[place], choice)
    row["chosen_on"] = head.provenance["chosen_on"]
    record = {"alpha": steps[place], "chosen_on": row["chosen_on"], "ingredients": chosen}
    best = write_model_folder(folders[place], read_state(folders[place]), out / BEST, record, overwrite=overwrite)
    return Sweep(rows, row, steps[place], best, save(head, out / f"{BEST}_head.safetensors"), chosen)


def greedy(n: int, value: Callable[[list[int]], float]) -> list[int]:
    """Indices of a greedy soup of `n` models, in the order in which they were taken.

    From the best single model on, each next best is kept if ``value`` of the soup with it is not lower.

    Examples
    --------
    >>> quality = {(0,): 0.7, (1,): 0.9, (2,): 0.8, (1, 2): 0.95, (0, 1, 2): 0.9}
    >>> greedy(3, lambda chosen: quality[tuple(sorted(chosen))])
    [1, 2]
    """
    alone = [value([k]) for k in range(n)]
    order = sorted(range(n), key=lambda k: -alone[k])
    chosen, best = order[:1], alone[order[0]]
    for k in order[1:]:
        with_it = value([*chosen, k])
        if with_it >= best:
            chosen, best = [*chosen, k], with_it
    return chosen


def _greedy_soup(
    parent: Parent,
    tuned: Sequence[str | Path],
    out: Path,
    judge: _Judge,
    value: Callable[[dict[str, Any]], float],
) -> list[int]:
    theta0 = parent.state()
    states = [read_tuned(weights_of(parent, name), theta0) for name in tuned]
    folder = out / ".soup"

    def of(chosen: list[int]) -> float:
        write_model_folder(parent.source, soup([states[k] for k in chosen]), folder, overwrite=True)
        encoder = judge.encoder(folder)
        head = judge.head(encoder, None, chosen)
        return value(judge.row(head, encoder, ()))

    try:
        return sorted(greedy(len(tuned), of))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _value_of(select: Dataset, metric: str) -> Callable[[dict[str, Any]], float]:
    if metric not in METRICS:
        raise HeadError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def value(row: dict[str, Any]) -> float:
        return sign * float(row[f"{select.name}/{select.split}:{metric}"])

    return value


def _load_heads(
    heads: Sequence[str | Path] | None, n_tuned: int, judge: _Judge, parent: Parent
) -> list[LinearHead] | None:
    if heads is None:
        return None
    if len(heads) != n_tuned + 1:
        raise TrainingError(
            f"{len(heads)} heads for the zero-shot model and {n_tuned} fine-tuned one(s): expected {n_tuned + 1}, the "
            "zero-shot model's first (`zero_shot` makes it from the templates)"
        )
    loaded = [
        judge.head(parent.load(judge.device), None) if str(path) == "zero_shot" else load(path).linear()
        for path in heads
    ]
    names = judge.selection.index.classnames
    if wrong := [head.name for head in loaded if head.classnames != names]:
        raise MismatchError(f"heads {', '.join(wrong)} have other classes than {judge.selection.name}; fit them alike")
    return loaded


def _choice(
    rows: Sequence[dict[str, Any]], alphas: Sequence[float], select: Dataset, metric: str
) -> tuple[int, dict[str, Any]]:
    """Place of the best row on the selection split, and the record of the choice."""
    order = sorted(range(len(rows)), key=lambda number: alphas[number])
    of_metric, nll = (
        [float(rows[number][f"{select.name}/{select.split}:{name}"]) for number in order] for name in (metric, "nll")
    )
    best, record = best_of(of_metric, nll, metric)
    return order[best], record


def _mark_chosen(head: LinearHead, judge: _Judge, folder: Path, choice: dict[str, Any]) -> LinearHead:
    """The head with the record that it was chosen: it will not be reported on the selection split."""
    store = judge.store(judge.encoder(folder), judge.selection)
    entry = {**split_id(store), **choice}
    return head.with_provenance({**head.provenance, "chosen_on": [*head.provenance.get("chosen_on", []), entry]})
