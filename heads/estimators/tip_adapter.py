"""Tip-Adapter without training (Zhang et al. 2022): zero-shot logits plus votes of a few labelled rows.

Tip-Adapter-F (Zhang et al. 2022): Tip-Adapter whose keys are then trained on the labelled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.estimators.base import NonlinearClassifier
from heads.estimators.text_prior import samples_of, text_head, text_identity
from heads.fitted.linear import LinearHead
from heads.fitted.tip_adapter import QUERY_ROWS, KeyBank, TipAdapterHead, unit_rows
from heads.kernels.tally import stats_of_arrays
from heads.rows.samples import Samples, gathered, require_finite
from heads.rows.selection import selection_samples
from heads.solvers.folds import FOLDS, FoldAssigner
from heads.solvers.parallel import map_pieces

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0, 9.0, 16.0)
BETAS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.5, 7.0, 10.0, 15.0, 22.0)
PAPER = (1.0, 5.5)
"""Alpha and beta that the paper begins with, for where no row can be held out."""


class TipAdapter(NonlinearClassifier):
    """Zero-shot logits plus what the training rows near the image vote: no training, not linear.

    With X the image features and V the same of unit length, K and Y the unit features and one-hot labels of the
    training rows, and W, b the zero-shot head::

        logits = X W.T + b + alpha exp(-beta (1 - V K.T)) Y

    In the paper features are of unit length everywhere, as those of stores are: X is V. Of arrays whose rows have other
    lengths the votes take the direction alone, while the zero-shot head takes the rows as they are, so that alpha = 0
    is that head whatever linear head it is; give unit rows for the paper's balance of the two.

    Parameters
    ----------
    alphas
        Strengths to choose from, not negative; 0 is the zero-shot head.
    betas
        Sharpnesses to choose from, positive.
    metric
        "top1" or "nll": what the choice maximises or minimises; equals in accuracy are decided by the NLL.

    Attributes
    ----------
    alpha_, beta_ : float
        The best pair on the selection split, or by k-fold cross-validation on the training rows: each row is scored
        by zero-shot and the keys of the other folds. Folds are stratified, at most 5 and as many as the largest class
        has rows; rows of a class without a key in other folds do not count. With one row in every class nothing can
        be held out, and the pair is the paper's (1, 5.5), or the one of the grids that is nearest.
    top1_, nll_ : (A, B) float64
        Of every pair, there; NaN where there was nothing to choose.
    classes_, classnames_, n_features_in_, provenance_, head_

    Notes
    -----
    The votes of a class grow with its number of keys, and cross-validation has a fold fewer of them than the head.
    The original code searches both on the test split.

    References
    ----------
    Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])   # cats that the text head takes for unsure
    >>> head = TipAdapter().fit(X, [0, 0, 1, 1], texts=text)
    >>> head.predict([[0.9, 0.95]]).tolist(), text.predict(np.array([[0.9, 0.95]])).tolist()
    ([0], [1])
    """

    name = "tip_adapter"
    takes_texts = True

    head_: TipAdapterHead
    alpha_: float
    beta_: float
    top1_: NDArray[np.float64]
    nll_: NDArray[np.float64]

    def __init__(self, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS, metric: str = "top1") -> None:
        self.alphas = alphas
        self.betas = betas
        self.metric = metric

    def fit(self, X: Any, y: Any = None, *, texts: Any, selection: Any = None) -> Self:
        """Keep the rows of arrays, tensors or an image store; choose alpha and beta.

        Parameters
        ----------
        X
            Image store, or array-like (N, D).
        y
            Labels (N,), with arrays: class indices of the zero-shot head.
        texts
            Text store, or a zero-shot head (any linear one).
        selection
            Store, or ``(X, y)``, on which alpha and beta are chosen; None cross-validates on the training rows.

        Raises
        ------
        HeadError
            For grids or a metric that do not fit, labels out of range, NaN or infinite features (naming rows).
        MismatchError
            If the rows, the texts and the selection split differ in encoder, width or class list.
        """
        alphas, betas = self._grids()
        text = text_head(texts)
        samples = samples_of(X, y, text)
        self._set_classes(samples)
        features, labels = gathered(samples)
        require_finite(samples, np.square(features, dtype=np.float64).sum(axis=0))
        bank = self._bank(features, labels, text)
        rows = Samples(samples.dim, samples.classes, samples.classnames, (features, labels))
        held_out = None if selection is None else selection_samples(selection, samples)
        how = self._choose(alphas, betas, text, bank, rows, held_out)
        chosen = held_out.store if how == "split" and held_out is not None else None
        params = {"alpha": self.alpha_, "beta": self.beta_, "metric": self.metric, "selection": how}
        identity = text_identity(text, self.classnames_)
        self.provenance_ = self._provenance(params, samples.store, chosen, **identity)
        self._path = alphas.tolist(), betas.tolist(), self._provenance(params, samples.store, **identity)
        columns = np.arange(len(self.classnames_))
        self.head_ = TipAdapterHead(
            text, bank, self.alpha_, self.beta_, columns, self.classnames_, self.name, self.provenance_
        )
        return self

    def path_heads(self) -> list[TipAdapterHead]:
        """A head for every pair of the grids: `heads.evaluate` takes the affinities once, and votes once a beta.

        Pairs come by beta, then by alpha. None of them is chosen; all have the one bank (and its trained keys).
        """
        self.frozen()
        alphas, betas, record = self._path
        heads = []
        for beta, alpha in product(betas, alphas):
            own = {**record, "params": {**record["params"], "alpha": alpha, "beta": beta}}
            name = f"{self.name} alpha={alpha:.6g} beta={beta:.6g}"
            heads.append(replace(self.head_, strength=alpha, sharpness=beta, name=name, provenance=own))
        return heads

    def _bank(self, features: NDArray[np.floating], labels: NDArray[np.int64], text: LinearHead) -> KeyBank:
        """The rows as keys."""
        return KeyBank(features, labels, len(text.classnames))

    def _grids(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The grids as arrays, checked."""
        alphas, betas = (np.atleast_1d(np.asarray(grid, dtype=np.float64)) for grid in (self.alphas, self.betas))
        right = alphas.ndim == betas.ndim == 1 and alphas.size and betas.size
        if not right or not (np.isfinite(alphas) & (alphas >= 0)).all() or not (np.isfinite(betas) & (betas > 0)).all():
            raise HeadError(f"alphas {self.alphas!r} must be numbers from 0, and betas {self.betas!r} positive numbers")
        if self.metric not in ("top1", "nll"):
            raise HeadError(f"metric is {self.metric!r}, expected 'top1' or 'nll'")
        return alphas, betas

    def _choose(
        self,
        alphas: NDArray[np.float64],
        betas: NDArray[np.float64],
        text: LinearHead,
        bank: KeyBank,
        rows: Samples,
        held_out: Samples | None,
    ) -> str:
        """Set the best pair, and say how it was chosen."""
        self.top1_ = np.full((len(alphas), len(betas)), np.nan)
        self.nll_ = self.top1_.copy()
        if self.top1_.size == 1:
            self.alpha_, self.beta_ = float(alphas[0]), float(betas[0])
            return "given"
        if held_out is not None:
            found: NDArray[np.float64] | None = scored(text, bank, alphas, betas, held_out)
        else:
            found = self._fold_scores(text, bank, alphas, betas, rows)
        if found is None:
            self.alpha_ = float(alphas[np.abs(alphas - PAPER[0]).argmin()])
            self.beta_ = float(betas[np.abs(betas - PAPER[1]).argmin()])
            return "paper"
        self.top1_, self.nll_ = found[0], found[1]
        losses = self.nll_ if self.metric == "nll" else -self.top1_
        ties = np.where(losses == losses.min(), self.nll_, np.inf)
        best = np.unravel_index(int(ties.argmin()), ties.shape)
        self.alpha_, self.beta_ = float(alphas[best[0]]), float(betas[best[1]])
        return "folds" if held_out is None else "split"

    def _fold_scores(
        self, text: LinearHead, bank: KeyBank, alphas: NDArray[np.float64], betas: NDArray[np.float64], samples: Samples
    ) -> NDArray[np.float64] | None:
        """Accuracy and NLL (2, A, B) of each row by the keys of the other folds; None where nothing can be held out."""
        folds = fold_keys(bank.labels, bank.n_classes)
        return None if folds is None or not folds[1].any() else scored(text, bank, alphas, betas, None, folds)


def fold_keys(labels: NDArray[np.int64], n_classes: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
    """Fold of each key, and whether its class has keys in other folds; None where no class has two."""
    counts = np.bincount(labels, minlength=n_classes)
    if counts.max() < 2:
        return None
    return FoldAssigner(n_classes, min(FOLDS, int(counts.max())))(labels), counts[labels] > 1


def scored(
    text: LinearHead,
    bank: KeyBank,
    alphas: NDArray[np.float64],
    betas: NDArray[np.float64],
    held_out: Samples | None,
    folds: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None,
) -> NDArray[np.float64]:
    """Accuracy and NLL (2, A, B) of every pair: on the selection split, or on the keys by those of other folds."""

    def of_piece(features: NDArray[np.floating], places: NDArray[np.integer]) -> NDArray[np.float64]:
        sums = np.zeros((2, len(alphas), len(betas)))
        for start in range(0, len(places), QUERY_ROWS):
            x, at = features[start : start + QUERY_ROWS], places[start : start + QUERY_ROWS]
            labels = at if folds is None else bank.labels[at]
            kept = None if folds is None else folds[0][at][:, None] != folds[0]
            base, affinities = text.logits(x), bank.affinities(x)
            for b, beta in enumerate(betas.tolist()):
                votes = bank.votes(affinities, beta, kept)
                for a, alpha in enumerate(alphas.tolist()):
                    rows = stats_of_arrays(base + np.float32(alpha) * votes, labels)
                    sums[:, a, b] += int((rows.rank == 0).sum()), float(rows.nll.sum())
        return sums

    total, n = np.zeros((2, len(alphas), len(betas))), 0
    for features, places in _queries(bank, held_out, folds):
        n += len(places)
        for sums in map_pieces([(features, places)], of_piece):
            total += sums
    return total / n


def _queries(
    bank: KeyBank, held_out: Samples | None, folds: tuple[NDArray[np.int64], NDArray[np.bool_]] | None
) -> Iterator[tuple[NDArray[np.floating], NDArray[np.integer]]]:
    """Rows to score with their labels, or with their places among the keys where folds are scored."""
    if held_out is not None:
        yield from held_out.blocks()
    elif folds is not None:
        places = np.flatnonzero(folds[1])
        yield bank.features[places], places


class TipAdapterF(TipAdapter):
    """`TipAdapter` with keys trained by cross-entropy, at the paper's alpha and beta, before both are chosen.

    ``logits = V W.T + b + alpha exp(-beta (1 - V K.T)) Y``, K the trained keys. AdamW (epsilon 1e-4) with a cosine
    schedule, as published. The original code trains on augmented views of the rows; here a row does not vote for
    itself while its own loss is taken, because on cached features its key is the row itself and would explain it alone.
    The keys' lengths are free, as published.

    Parameters
    ----------
    alphas, betas, metric
        As in `TipAdapter`.
    epochs, learning_rate, batch_size
        20, 1e-3 and 256, as published.
    seed
        Order of the rows.

    Attributes
    ----------
    alpha_, beta_, top1_, nll_ and the rest as in `TipAdapter`; cross-validation trains the keys of each fold anew.

    References
    ----------
    Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> TipAdapterF(epochs=2).fit(X, [0, 0, 1, 1], texts=text).predict([[0.9, 0.95]]).tolist()
    [0]
    """

    name = "tip_adapter_f"

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        betas: Sequence[float] = BETAS,
        metric: str = "top1",
        epochs: int = 20,
        learning_rate: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(alphas, betas, metric)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.seed = seed

    def _bank(self, features: NDArray[np.floating], labels: NDArray[np.int64], text: LinearHead) -> KeyBank:
        """The rows as keys, trained."""
        if self.epochs < 0 or self.batch_size < 1 or not self.learning_rate > 0:
            raise HeadError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, learning_rate {self.learning_rate!r}; expected "
                "from 0, from 1, and a positive number"
            )
        keys = train_keys(
            features,
            labels,
            text,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return KeyBank(keys, labels, len(text.classnames), free=True)

    def _fold_scores(
        self, text: LinearHead, bank: KeyBank, alphas: NDArray[np.float64], betas: NDArray[np.float64], samples: Samples
    ) -> NDArray[np.float64] | None:
        """Each fold's rows by keys trained on the other folds; `bank` is not looked at."""
        ((features, labels),) = samples.blocks()
        folds = fold_keys(labels, len(samples.classnames))
        if folds is None or not folds[1].any():
            return None
        total, n = np.zeros((2, len(alphas), len(betas))), 0
        for fold in range(int(folds[0].max()) + 1):
            out, rest = (folds[0] == fold) & folds[1], folds[0] != fold
            if not out.any() or not rest.any():
                continue
            held_out = Samples(samples.dim, samples.classes, samples.classnames, (features[out], labels[out]))
            trained = self._bank(features[rest], labels[rest], text)
            total += scored(text, trained, alphas, betas, held_out) * out.sum()
            n += int(out.sum())
        return total / n


def train_keys(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    text: LinearHead,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    alpha: float = PAPER[0],
    beta: float = PAPER[1],
) -> NDArray[np.float32]:
    """Keys (M, D) that start as the unit rows and lower the rows' cross-entropy, no row voting for itself.

    Parameters
    ----------
    features : (M, D); labels : (M,) class indices of `text`
    alpha, beta
        Strength and sharpness while training.
    """
    rows = torch.from_numpy(unit_rows(np.asarray(features)))
    base = torch.from_numpy(text.logits(np.asarray(features)))
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    keys = rows.clone().requires_grad_()
    optimiser = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * batches))
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(batch_size):  # type: ignore[no-untyped-call]
            weights = torch.exp(beta * (rows[batch] @ keys.T - 1.0))
            weights = weights.scatter(1, batch[:, None], 0.0)  # a row has no vote in its own loss
            votes = torch.zeros_like(base[batch]).index_add(1, targets, weights)
            loss = torch.nn.functional.cross_entropy(base[batch] + alpha * votes, targets[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    trained: NDArray[np.float32] = keys.detach().numpy()
    if not np.isfinite(trained).all():
        raise HeadError(f"training the keys diverged at learning_rate {learning_rate:g}; try a smaller one")
    return trained
