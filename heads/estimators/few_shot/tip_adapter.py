"""Tip-Adapter (Zhang et al. 2022): zero-shot logits plus votes of a few labelled rows, optionally trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.parameters import Count, NotNegative, Positive, Range, Rate, Seed
from heads.estimators.base import Metric, NonlinearClassifier, best_setting
from heads.estimators.few_shot.base import FewShotClassifier, FewShotRows, held_out_masks, validation_folds
from heads.fitted.base import label_values
from heads.fitted.linear import LinearHead
from heads.fitted.tip_adapter import QUERY_ROWS, KeyBank, TipAdapterHead
from heads.kernels.tally import stats_of_arrays
from heads.rows.lengths import unit_rows
from heads.rows.samples import Array, Features, Float, Float32, Ints, overflow
from heads.solvers.parallel import map_pieces, one_torch_thread, side_by_side

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0, 9.0, 16.0)
BETAS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.5, 7.0, 10.0, 15.0, 22.0)
PAPER = (1.0, 5.5)
"""The paper's initial alpha and beta: used to train keys, and when no row can be held out."""


class Grid(NamedTuple):
    """Alphas (A,) and betas (B,) to choose from."""

    alphas: Float
    betas: Float


@dataclass(eq=False, repr=False)
class TipAdapter(FewShotClassifier, NonlinearClassifier):
    """Zero-shot logits plus votes of the training rows by their similarity to the image; not trained, not linear.

    With X the image features, V the same scaled to unit length, K and Y the unit features and one-hot labels of the
    training rows, and W, b the zero-shot head::

        logits = X W.T + b + alpha exp(-beta (1 - V K.T)) Y

    In the paper, as in stores, all features have unit length: X is V. For arrays of other lengths the votes use only
    the direction, while the zero-shot head uses the rows unscaled, so that alpha = 0 is exactly that head; give unit
    rows for the paper's balance between the two.

    Parameters
    ----------
    alphas : non-negative strengths to choose from; 0 is the zero-shot head
    betas : positive sharpnesses to choose from
    metric : criterion for the choice: "top1" (ties by NLL) or "nll"

    Attributes
    ----------
    alpha_, beta_ : float
        The best pair on the selection split, or by k-fold cross-validation on the training rows: each row is scored by
        the zero-shot head and the keys of the other folds. Folds are stratified, at most 5 and at most the number of
        rows of the largest class; rows whose class has no key in other folds are ignored. With one row per class none
        can be held out, and the pair is the paper's (1, 5.5), or the nearest one of the grids.
    top1_, nll_ : (A, B) float64; for every pair, on the rows used for the choice; NaN if there was nothing to choose
    head_

    Notes
    -----
    The votes of a class grow with its number of keys. Cross-validation has one fold of keys fewer than the head, so
    votes are multiplied by the ratio of the two numbers. The original code searches both settings on the test split.

    References
    ----------
    Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])   # the text head is unsure of the cats
    >>> head = TipAdapter().fit(X, [0, 0, 1, 1], texts=text)
    >>> head.predict([[0.9, 0.95]]).tolist(), text.predict(np.array([[0.9, 0.95]])).tolist()
    ([0], [1])
    """

    name = "tip_adapter"

    alphas: NotNegative | Sequence[NotNegative] = ALPHAS
    betas: Positive | Sequence[Positive] = BETAS
    metric: Metric = "top1"

    def path_heads(self) -> list[TipAdapterHead]:
        """One head per pair, ordered by beta, then by alpha; none of them is chosen, and all share one bank.

        `heads.evaluate` computes their affinities once, and votes once per beta.
        """
        self.frozen()
        heads = []
        for beta, alpha in product(self._grid.betas.tolist(), self._grid.alphas.tolist()):
            name = f"{self.name} alpha={alpha:.6g} beta={beta:.6g}"
            record = self._path_record.with_params(alpha=alpha, beta=beta)
            heads.append(replace(self.head_, strength=alpha, sharpness=beta, name=name, provenance=record))
        return heads

    def _check_parameters(self) -> None:
        """Also set the grids as arrays."""
        super()._check_parameters()
        alphas, betas = (np.atleast_1d(np.asarray(grid, dtype=np.float64)) for grid in (self.alphas, self.betas))
        self._grid = Grid(alphas, betas)

    def _fit(self, rows: FewShotRows) -> None:
        bank = self._bank(rows.features, rows.labels, rows.text)
        how = self._choose(bank, rows)
        settings = {"alpha": self.alpha_, "beta": self.beta_}
        self.provenance_ = self._record(rows, settings, how)
        self._path_record = self._record(rows, settings, how, of_path=True)
        columns = np.arange(len(self.classnames_))
        names = self.classnames_, self.name, self.provenance_, label_values(self.classes_)
        self.head_: TipAdapterHead = TipAdapterHead(rows.text, bank, self.alpha_, self.beta_, columns, *names)

    def _bank(self, features: Features, labels: Ints, text: LinearHead) -> KeyBank:
        """The training rows as keys."""
        return KeyBank(features, labels, len(text.classnames))

    def _choose(self, bank: KeyBank, rows: FewShotRows) -> str:
        """Set the best pair; returns how it was chosen."""
        alphas, betas = self._grid
        self.top1_ = np.full((len(alphas), len(betas)), np.nan)
        self.nll_ = self.top1_.copy()
        if self.top1_.size == 1:
            self.alpha_, self.beta_ = float(alphas[0]), float(betas[0])
            return "given"
        if rows.validation is not None:
            found: Float | None = scored(rows.text, bank, self._grid, rows.validation.blocks())
        else:
            found = self._fold_scores(bank, rows)
        if found is None:
            self.alpha_ = float(alphas[np.abs(alphas - PAPER[0]).argmin()])
            self.beta_ = float(betas[np.abs(betas - PAPER[1]).argmin()])
            return "paper"
        self.top1_, self.nll_ = found[0], found[1]
        a, b = divmod(best_setting(self.top1_, self.nll_, self.metric), len(betas))
        self.alpha_, self.beta_ = float(alphas[a]), float(betas[b])
        return "folds" if rows.validation is None else "split"

    def _fold_scores(self, bank: KeyBank, rows: FewShotRows) -> Float | None:
        """Accuracy and NLL (2, A, B) of each row under the keys of the other folds; None if nothing can be held out."""
        found = validation_folds(bank.labels, bank.n_classes)
        if found is None:
            return None
        folds, validation = found
        queries = bank.features[validation], bank.labels[validation], folds[validation]
        return scored(rows.text, bank, self._grid, [queries], folds)


@dataclass(eq=False, repr=False)
class TipAdapterF(TipAdapter):
    """`TipAdapter` with keys trained by cross entropy at the paper's alpha and beta, before both are chosen.

    ``logits = V W.T + b + alpha exp(-beta (1 - V K.T)) Y``, K the trained keys. AdamW (epsilon 1e-4) with a cosine
    schedule, as published. The original code trains on augmented views of the rows. Here, on cached features, a row's
    own key is the row itself and would explain it alone, so a row does not vote in its own loss. Keys are not
    normalised, as published.

    Parameters
    ----------
    alphas, betas, metric : as in `TipAdapter`
    epochs, learning_rate, batch_size : 20, 1e-3 and 256, as published
    seed : order of the rows

    Attributes
    ----------
    alpha_, beta_, top1_, nll_ and the rest as in `TipAdapter`; cross-validation trains keys for each fold.

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> TipAdapterF(epochs=2).fit(X, [0, 0, 1, 1], texts=text).predict([[0.9, 0.95]]).tolist()
    [0]
    """

    name = "tip_adapter_f"

    epochs: Annotated[int, Range(0, 2**31 - 1)] = 20
    learning_rate: Rate = 1e-3
    batch_size: Count = 256
    seed: Seed = 0

    def _bank(self, features: Features, labels: Ints, text: LinearHead) -> KeyBank:
        """The training rows as keys, trained."""
        names = ("epochs", "learning_rate", "batch_size", "seed")
        keys = train_keys(features, labels, text, **{name: vars(self)[name] for name in names})
        return KeyBank(keys, labels, len(text.classnames), free=True)

    def _fold_scores(self, bank: KeyBank, rows: FewShotRows) -> Float | None:
        """Score each fold's rows by keys trained on the other folds; `bank` is not used."""
        masks = held_out_masks(rows.labels, len(rows.text.classnames))
        masks = [(keep, held) for keep, held in masks if keep.any() and held.any()]
        if not masks:
            return None

        def of_fold(fold: slice) -> KeyBank:
            keep = masks[fold.start][0]
            return self._bank(rows.features[keep], rows.labels[keep], rows.text)

        with one_torch_thread() as threads:  # folds side by side, one thread each
            banks = list(side_by_side(len(masks), 1, of_fold, threads))
        total, n = np.zeros((2, len(self._grid.alphas), len(self._grid.betas))), 0
        for bank_of_fold, (keep, held) in zip(banks, masks, strict=True):
            queries, share = (rows.features[held], rows.labels[held]), keep.mean()
            total += scored(rows.text, bank_of_fold, self._grid, [queries], share=float(share)) * held.sum()
            n += int(held.sum())
        return total / n


def scored(
    text: LinearHead,
    bank: KeyBank,
    grid: Grid,
    queries: Iterable[tuple[Array, ...]],
    folds: Ints | None = None,
    share: float = 1.0,
) -> Float:
    """Accuracy and NLL (2, A, B) of every pair of the grid on blocks of rows ``(X, y)``.

    Given the `folds` (M,) of the keys, blocks are ``(X, y, folds)``, and keys of a row's own fold do not vote for it.
    If only a `share` of the head's keys votes, votes are divided by it.
    """

    def of_piece(features: Features, labels: Ints, *own: Ints) -> Float:
        sums = np.zeros((2, len(grid.alphas), len(grid.betas)))
        for start in range(0, len(labels), QUERY_ROWS):
            some = slice(start, start + QUERY_ROWS)
            kept = None if folds is None else own[0][some, None] != folds
            voting = share if kept is None else kept.mean(axis=1, keepdims=True, dtype=np.float32)
            base, affinities = text.logits(features[some]), bank.affinities(features[some])
            for b, beta in enumerate(grid.betas.tolist()):
                votes = bank.votes(affinities, beta, kept) / voting
                for a, alpha in enumerate(grid.alphas.tolist()):
                    statistics = stats_of_arrays(base + np.float32(alpha) * votes, labels[some])
                    sums[:, a, b] += int((statistics.rank == 0).sum()), float(statistics.nll.sum())
        return sums

    total, n = np.zeros((2, len(grid.alphas), len(grid.betas))), 0
    for block in queries:
        n += len(block[1])
        for sums in map_pieces([block], of_piece):
            total += sums
    return total / n


def train_keys(
    features: Features,
    labels: NDArray[np.integer],
    text: LinearHead,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> Float32:
    """Train keys (M, D) from the unit rows to lower the rows' cross entropy, at the paper's alpha and beta.

    Features are (M, D), labels (M,) class indices of `text`. No row votes for itself.
    """
    alpha, beta = PAPER
    rows = torch.from_numpy(unit_rows(np.asarray(features)))
    with np.errstate(over="ignore", invalid="ignore"):
        base = torch.from_numpy(text.logits(np.asarray(features)))
    if not torch.isfinite(base).all():
        raise overflow("zero-shot logits overflow", features)
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    keys = rows.clone(memory_format=torch.contiguous_format)  # as its gradient: the fused step ignores strides
    optimiser = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4, fused=True)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator)
        for batch in order.split(batch_size):  # type: ignore[no-untyped-call]
            # Keys (M) by rows (b) throughout, so that sums over the keys of a class run along memory.
            queries, place = rows[batch], torch.arange(len(batch))
            weights = (keys @ queries.T).sub_(1.0).mul_(beta).exp_()
            weights[batch, place] = 0.0  # no row votes in its own loss
            votes = torch.zeros(base.shape[1], len(batch)).index_add_(0, targets, weights)
            # The gradient of the mean cross entropy with respect to the logits, then to the keys.
            slope = torch.softmax(votes.mul_(alpha).add_(base[batch].T), dim=0)
            slope[targets[batch], place] -= 1.0
            slope *= alpha * beta / len(batch)
            keys.grad = weights.mul_(slope[targets]) @ queries
            optimiser.step()
            schedule.step()
    trained: Float32 = keys.numpy()
    if not np.isfinite(trained).all():
        raise HeadError(f"training the keys diverged at learning_rate={learning_rate:g}; try a smaller one")
    return trained
