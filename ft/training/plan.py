"""Dry runs of fine-tuning: what a run would read, compute and write."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from featcache.datasets.base import PlainDataset, whole_dataset
from featcache.encoding.pipeline import default_workers
from ft.checkpoints.state import State
from ft.distributed import Place
from ft.training.data import few_shots, refuse_multilabel, training_batches
from ft.training.options import FinetuneOptions
from ft.training.setup import RunSetting, load_model, make_order, make_stepper

MEASURED = 2
"""Updates made to measure the speed; the first is not timed."""
MOMENTS = 2  # Adam's first and second


@dataclass(frozen=True)
class FinetunePlan:
    """What `ft.finetune` would do from the start.

    Parameters
    ----------
    images, validation_images : size of the training split, after `FinetuneOptions.shots`, and of the selection split
    updates, trained_parameters : their numbers
    images_to_read : over all updates and evaluations
    bytes_to_write : checkpoints and the state for resuming, without stores of features and texts
    seconds : time of the updates, from one that was measured without regularisers
    """

    images: int
    validation_images: int
    updates: int
    images_to_read: int
    trained_parameters: int
    bytes_to_write: int
    seconds: float


def plan_finetuning(
    dataset: PlainDataset,
    val: PlainDataset | None,
    model: str,
    pretrained: str | None,
    options: FinetuneOptions,
    device: str | None = None,
    root: str | Path | None = None,
) -> FinetunePlan:
    """Plan a run of `ft.finetune` by making two updates, which are thrown away.

    Raises FeatcacheError if the model, data or options do not exist or do not fit together.
    """
    refuse_multilabel(dataset, val)
    dataset = whole_dataset(dataset)
    if options.shots:
        dataset = few_shots(dataset, options.shots, options.seed)
    place = Place(0, 1, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder, view = load_model(model, pretrained, dataset, options, place)
    size = _nbytes(encoder.model.state_dict())
    order, updates = make_order(len(dataset.index), options, place)
    plain = replace(options, head="zeros", regularizers={})  # a fitted head or a regulariser may need a store
    stepper = make_stepper(RunSetting(encoder, dataset, plain, root), plain, view, "", updates)
    workers, seconds = options.workers or default_workers(), 0.0
    with torch.random.fork_rng(devices=[]):
        began = time.perf_counter()
        for batch in training_batches(dataset, view, order, range(MEASURED), place.device, workers, 0):
            float(stepper.update(batch, 0.0).gradient_norm)  # reading the value waits for the device
            seconds, began = time.perf_counter() - began, time.perf_counter()
    trained = stepper.model.trained()
    kept = updates // (options.keep_every * order.steps_per_epoch) if options.keep_every else 0
    models = 1 + (val is not None) + kept
    state = _nbytes(trained) * (1 + MOMENTS + (options.average != "none"))
    validated = 0 if val is None else len(val.index)
    evaluations = -(-updates // (options.eval_every or order.steps_per_epoch)) + options.eval_start
    return FinetunePlan(
        images=len(dataset.index),
        validation_images=validated,
        updates=updates,
        images_to_read=order.images(updates) + evaluations * validated,
        trained_parameters=sum(value.numel() for value in trained.values()),
        bytes_to_write=models * size + state,
        seconds=seconds * updates,
    )


def _nbytes(state: State) -> int:
    return sum(value.nbytes for value in state.values())
