"""The attentive probe: learned queries pool the patch tokens; trained by AdamW on streamed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from featcache.errors import HeadError
from featcache.parameters import Count, Decay, Range, Rate, Seed
from featcache.processes import checked_device
from heads.estimators.base import NonlinearClassifier, RowsClassifier, criterion
from heads.estimators.few_shot.base import held_out_masks
from heads.fitted.attentive import AttentiveHead, attentive_logits
from heads.fitted.base import label_values
from heads.fitted.provenance import Provenance
from heads.kernels.tally import row_stats
from heads.rows.device import device_rows
from heads.rows.samples import Float, Float32, Ints, Samples, finite_blocks, gathered, is_table
from heads.rows.scaling import Scaling
from heads.solvers.schedule import wise_ft_schedule

EPOCHS, UPDATES = 20, 200
CLIP = 1.0  # maximum gradient norm
WARMUP = 0.1  # fraction of the updates
QUERY_SCALE, WEIGHT_SCALE = 0.02, 0.01  # standard deviations of the initial parameters


@dataclass(eq=False, repr=False)
class Attentive(RowsClassifier, NonlinearClassifier):
    """Linear classifier on tokens pooled by Q learned queries, trained with cross entropy by AdamW.

    With tokens x (P, D) of an image, queries u, values V and class weights W::

        logits = sum over q of W[q] V[q] (sum over p of softmax_p(u[q] . x[p]) x[p]) + b

    This is multi-query cross-attention without a key projection ("efficient probing"); `heads` splits each query into
    pieces that each attend over their share of the D dimensions, as in multi-head attention. Tokens are standardised
    per dimension over the training tokens; this is folded into the parameters afterwards.

    Parameters
    ----------
    queries : Q
    heads : pieces of each query
    lr
        Peak learning rate. Given several, the one with the best accuracy (ties by NLL) on the selection split, or else
        on a held-out fifth of the training rows, is used. The first tenth of the updates is a linear warm-up, followed
        by a cosine decay to zero.
    weight_decay : decoupled, multiplied by the learning rate; applies to values and class weights
    epochs : passes over the rows; None: 20, or for a small set as many as make 200 updates
    batch_size : images per update
    device : where batches are computed, such as ``cuda``; None: the device of the rows
    seed : for the initial parameters and the order of the rows

    Attributes
    ----------
    lr_ : the chosen learning rate
    losses_ : (epochs,) float64; mean loss of the updates of each epoch, in nats
    head_

    Notes
    -----
    Batches of a store are read on demand: one is in memory at a time, and the store is read once per epoch. Features
    (N, D) count as one token per image, which makes the head a linear probe. Training is in float32.

    References
    ----------
    Psomas et al. 2026, "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency"
    (arXiv 2506.10178).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, 200)
    >>> X = rng.normal(size=(200, 9, 6))
    >>> X[np.arange(200), rng.integers(0, 9, 200)] = np.where(y, 5.0, -5.0)[:, None]   # one of nine tokens tells
    >>> Attentive(queries=2, lr=1e-2, batch_size=50).fit(X, y).score(X, y) > 0.95
    True
    """

    name = "attentive"
    takes_tokens = True

    queries: Annotated[int, Range(1, 4096)] = 32
    heads: Annotated[int, Range(1, 4096)] = 1
    lr: Rate | Sequence[Rate] = 1e-3
    weight_decay: Decay = 0.1
    epochs: Count | None = None
    batch_size: Count = 128
    device: str | None = None
    seed: Seed = 0

    def _fit(self, samples: Samples, validation: Samples | None) -> None:
        rates: list[float] = np.unique(np.asarray(self.lr, np.float64)).tolist()
        for _ in () if validation is None else validation.blocks():
            pass  # refuses features that are not finite
        scaling = Scaling.of(finite_blocks(samples.blocks), samples.dim)
        rows = _TokenBatches(samples, self.device)
        everything = np.arange(len(rows))
        trained = [self._train(rate, rows, everything, scaling) for rate in rates]
        best, how = self._choice(rates, trained, rows, scaling, validation)
        self.lr_, self.losses_ = rates[best], trained[best][1]
        names = ("queries", "heads", "weight_decay", "batch_size", "seed")
        params = {name: vars(self)[name] for name in names}
        params |= {"epochs": len(self.losses_), "lr": self.lr_, "selection": how}
        self.provenance_ = self._provenance(params, samples, validation)
        record = self._provenance(params, samples)
        self._path = [(rate, self._head(arrays, record)) for rate, (arrays, _) in zip(rates, trained, strict=True)]
        self.head_ = self._head(trained[best][0], self.provenance_)

    def path_heads(self) -> list[AttentiveHead]:
        """One head per learning rate."""
        self.frozen()
        return [head.renamed(f"{self.name} lr={rate:g}", lr=rate) for rate, head in self._path]

    def _head(self, arrays: Sequence[Float32], record: Provenance) -> AttentiveHead:
        queries, values, weights, bias = arrays
        classes = label_values(self.classes_)
        return AttentiveHead(queries, values, weights, bias, self.classnames_, self.name, record, classes)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.device is not None:
            checked_device(self.device)

    def _choice(
        self,
        rates: Sequence[float],
        trained: Sequence[_Trained],
        rows: _TokenBatches,
        scaling: Scaling,
        validation: Samples | None,
    ) -> tuple[int, str]:
        """Index of the best learning rate, and how it was chosen."""
        if len(rates) == 1:
            return 0, "given"
        if validation is not None:
            held_out = _TokenBatches(validation, self.device)
            return self._best(trained, held_out, np.arange(len(held_out))), "split"
        folds = held_out_masks(rows.labels, len(self.classnames_))
        if not folds:
            return int(np.argmin([losses[-1] for _, losses in trained])), "none"
        kept, scored = map(np.flatnonzero, folds[0])
        return self._best([self._train(rate, rows, kept, scaling) for rate in rates], rows, scored), "held-out fifth"

    def _best(self, trained: Sequence[_Trained], rows: _TokenBatches, which: Ints) -> int:
        """Index of the most accurate probe on some rows; ties by NLL."""
        found = np.zeros((len(trained), 2))
        for own, (arrays, _) in zip(found, trained, strict=True):
            parameters = [torch.from_numpy(values).to(rows.device) for values in arrays]
            with torch.inference_mode():
                for tokens, labels in rows.batches(which, int(self.batch_size)):
                    own += criterion(row_stats(attentive_logits(tokens, *parameters), labels), "top1")
        return int(np.lexsort((found[:, 1], found[:, 0]))[0])

    def _train(self, lr: float, rows: _TokenBatches, which: Ints, scaling: Scaling) -> _Trained:
        """Train on some rows; the folded parameters, and the mean loss of every epoch."""
        probe = _Probe(self, scaling, rows.device)
        per_epoch = -(-len(which) // int(self.batch_size))
        epochs = max(EPOCHS, -(-UPDATES // per_epoch)) if self.epochs is None else int(self.epochs)
        total = per_epoch * epochs
        decayed = {"params": [probe.values, probe.weights], "weight_decay": float(self.weight_decay)}
        others = {"params": [probe.queries, probe.bias], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([decayed, others], lr=lr)
        losses, step = np.zeros((epochs, per_epoch)), 0
        self.progress.start(f"attentive probe, lr {lr:g}", total, 0)
        for epoch in range(epochs):
            order = np.random.default_rng([int(self.seed), epoch]).permutation(which)
            for place, (tokens, labels) in enumerate(rows.batches(order, int(self.batch_size))):
                logits = attentive_logits(probe.standardised(tokens), *probe.parameters())
                loss = torch.nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(probe.trained, CLIP)
                for group in optimizer.param_groups:
                    group["lr"] = wise_ft_schedule(step, lr, int(WARMUP * total), total)
                optimizer.step()
                losses[epoch, place], step = loss.detach(), step + 1
                self.progress.advance(1)
        self.progress.finish()
        arrays, means = probe.folded(), losses.mean(axis=1)
        if not all(np.isfinite(values).all() for values in (means, *arrays)):
            raise HeadError(f"training at lr {lr:g} diverged: a loss or a parameter is not finite; take a smaller lr")
        return arrays, means


_Trained = tuple[list[Float32], Float]


class _Probe:
    """The parameters during training, on standardised tokens."""

    def __init__(self, head: Attentive, scaling: Scaling, device: torch.device) -> None:
        queries, pieces, dim = int(head.queries), int(head.heads), head.n_features_in_
        width = -(-dim // (queries * pieces))
        generator = torch.Generator().manual_seed(int(head.seed))

        def drawn(scale: float, *shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device).requires_grad_()

        self.queries = drawn(QUERY_SCALE, queries, 1, dim)
        self.values = drawn(dim**-0.5, queries * pieces, width, dim)
        self.weights = drawn(WEIGHT_SCALE, len(head.classnames_), queries * pieces, width)
        self.bias = torch.zeros(len(head.classnames_), device=device, requires_grad=True)
        self.trained = [self.queries, self.values, self.weights, self.bias]
        # The dimensions that each piece of a query attends over, with the scaling of multi-head attention.
        piece = torch.arange(dim) * pieces // dim
        self._mask = (piece == torch.arange(pieces)[:, None]).float().to(device) * (dim / pieces) ** -0.5
        self._scaling = scaling
        self._mean, self._deviation = (
            torch.from_numpy(values).float().to(device) for values in (scaling.mean, scaling.deviation)
        )

    def standardised(self, tokens: Tensor) -> Tensor:
        """Tokens (n, P, D) with mean zero and standard deviation one per dimension."""
        return (tokens - self._mean) / self._deviation

    def parameters(self) -> list[Tensor]:
        """Arguments for `attentive_logits`: each piece of a query counts as a query."""
        return [(self.queries * self._mask).flatten(0, 1), self.values, self.weights, self.bias]

    def folded(self) -> list[Float32]:
        """The same for raw tokens: the mean shifts all scores of a query alike, and goes into the bias."""
        queries, values, weights, bias = (value.detach().cpu().double().numpy() for value in self.parameters())
        queries, values = queries / self._scaling.deviation, values / self._scaling.deviation
        shift = np.einsum("cqe,qe->c", weights, values @ self._scaling.mean)
        return [value.astype(np.float32) for value in (queries, values, weights, bias - shift)]


class _TokenBatches:
    """The valid rows of some samples, by number: rows (N, P, D), or (N, D), which count as one token each.

    Batches are on `device`; None is where the rows are.

    >>> from heads.rows.samples import as_samples
    >>> rows = _TokenBatches(as_samples(np.eye(3), [0, 1, 1]))
    >>> [(tokens.shape, labels.tolist()) for tokens, labels in rows.batches(np.array([2, 0]), 1)]
    [(torch.Size([1, 1, 3]), [1]), (torch.Size([1, 1, 3]), [0])]
    """

    def __init__(self, samples: Samples, device: str | None = None) -> None:
        on_device, source = device_rows(samples), samples.source
        self.device = torch.device(device or ("cpu" if on_device is None else on_device[0].device))
        self._fetch: Callable[[Ints], Tensor]
        if on_device is not None:
            features, self.labels = on_device[0], samples.labels()
            self._fetch = lambda rows: features[torch.from_numpy(rows).to(features.device)]
        elif not isinstance(source, tuple) and is_table(source):
            valid, gather = np.flatnonzero(source.valid), source.gather
            self.labels = np.asarray(source.labels)[valid]
            self._fetch = lambda rows: torch.from_numpy(np.asarray(gather(valid[rows])))
        else:
            held, labels = gathered(samples)
            self.labels = np.asarray(labels, np.int64)
            self._fetch = lambda rows: torch.from_numpy(np.asarray(held[rows]))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: Ints, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (n, P, D) float32 and labels (n,) of some rows, in that order, `size` at a time."""
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            tokens = self._fetch(some).to(self.device).float()
            labels = torch.from_numpy(self.labels[some]).to(self.device)
            yield tokens if tokens.ndim == 3 else tokens[:, None], labels
