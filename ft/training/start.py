"""Where a run begins: the head of the cross entropy, from texts, zeros, or a probe fitted on stored features."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from featcache.datasets.base import Dataset
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.chunks import as_stored, encoder_key
from featcache.encoding.images import encode_dataset
from featcache.encoding.texts import embed_prompts
from featcache.errors import TrainingError
from featcache.prompts import fill, load_prompt_file, load_templates, prompts_of
from featcache.store import TextStore
from ft.objectives.head import Head
from ft.training.options import FinetuneOptions
from heads import HEADS, LinearClassifier, LinearHead, ZeroShot, load

PROBES = tuple(name for name, kind in HEADS.items() if issubclass(kind, LinearClassifier) and kind.fits_on == "images")


def starting_head(
    options: FinetuneOptions, encoder: OpenClipEncoder, dataset: Dataset, root: str | Path | None
) -> Head:
    """The head as training begins, from `FinetuneOptions.head`.

    ``ridge`` and ``logistic`` are fitted on the store of the training split, which is made where there is none yet:
    a probe and the fine-tuning after it (LP-FT, arXiv 2202.10054) encode the images once.

    Raises
    ------
    HeadError, TrainingError
        A head that is neither known nor a file.
    MismatchError
        A fitted head of another encoder or class list.
    """
    scale = encoder.logit_scale if options.head_scale == "separate" else 1.0
    if options.head == "zeros":
        classes = len(dataset.index.classnames)
        return Head(torch.zeros(classes, encoder.dim), torch.zeros(classes), scale, options.head_bias)
    head = _linear(options, encoder, dataset, root)
    weights, bias = torch.from_numpy(head.weights.copy()), torch.from_numpy(head.bias.copy())
    return Head(weights, bias, scale, options.head_bias)


def _linear(
    options: FinetuneOptions, encoder: OpenClipEncoder, dataset: Dataset, root: str | Path | None
) -> LinearHead:
    if options.head == "zero_shot":
        return ZeroShot().fit(text_store(options, encoder, dataset, root)).linear()
    if options.head in PROBES:
        probe: Any = HEADS[options.head]()
        fitted: LinearHead = probe.fit(encode_dataset(dataset, as_stored(encoder), root=root).store).linear()
        return fitted
    if not Path(options.head).is_file():
        raise TrainingError(
            f"head {options.head!r}: no such file; expected zero_shot, zeros, {', '.join(PROBES)}, or a head that "
            "`featcache fit` wrote"
        )
    head = load(options.head)
    head.check(_store_like(encoder, dataset))
    return head.linear()


def _store_like(encoder: OpenClipEncoder, dataset: Dataset) -> Any:
    """What a head's checks ask of a store, for the store that encoding the training split would make."""
    return SimpleNamespace(
        name=f"{dataset.name}/{dataset.split}",
        encoder_key=encoder_key(encoder),
        encoder_name=encoder.name,
        text_digests=[encoder.text_digest],
        dim=encoder.dim,
        classnames=dataset.index.classnames,
    )


def text_store(
    options: FinetuneOptions,
    encoder: OpenClipEncoder,
    dataset: Dataset,
    root: str | Path | None,
    templates: str | None = None,
) -> TextStore:
    """Text store of the data set's classes under the run's prompts, or under other templates."""
    prompts = load_prompt_file(options.prompts) if options.prompts and templates is None else None
    chosen = None if prompts is not None else load_templates(templates or options.templates)
    names = dataset.index.classnames
    return embed_prompts(names, chosen, as_stored(encoder), prompts=prompts, name=dataset.name, root=root).store


def sentences(options: FinetuneOptions, classnames: Sequence[str]) -> list[list[str]]:
    """Captions of each class: every template, or the sentences of the prompt file."""
    if options.prompts:
        return [list(texts) for texts in prompts_of(load_prompt_file(options.prompts), classnames)]
    return fill(load_templates(options.templates), classnames)
