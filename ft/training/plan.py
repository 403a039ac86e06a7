"""What a fine-tuning run would read, compute and write; nothing is written."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from featcache.datasets.base import Dataset
from featcache.encoders import encoder_for
from featcache.encoding.augment import make_view
from featcache.encoding.pipeline import default_workers
from ft.checkpoints.parents import load_open_clip
from ft.checkpoints.state import Json, State
from ft.distributed import Place
from ft.objectives.base import Objective
from ft.objectives.contrastive import OverPairs
from ft.objectives.cross_entropy import OverHead
from ft.objectives.head import Head
from ft.training.data import few_shots, refuse_multilabel, training_batches
from ft.training.model import Trainable
from ft.training.optim import make_optimizer
from ft.training.options import FinetuneOptions
from ft.training.setup import RunSetting, make_order
from ft.training.step import Stepper

MEASURED = 2
"""Updates that are made to measure the speed; the first is not timed."""
MOMENTS = 2  # of Adam


@dataclass(frozen=True)
class FinetunePlan:
    """What `ft.finetune` would do from the start.

    Parameters
    ----------
    images, validation_images : int
        Of the training split, after `FinetuneOptions.shots`, and of the selection split.
    updates : int
    images_to_read : int
        By all updates and all evaluations.
    trained_parameters : int
    bytes_to_write : int
        Of checkpoints and of the state from which a killed run goes on; stores of features and texts are not counted.
    seconds : float
        Of the updates, by the speed of one without regularisers, measured now.
    """

    images: int
    validation_images: int
    updates: int
    images_to_read: int
    trained_parameters: int
    bytes_to_write: int
    seconds: float

    def to_dict(self) -> Json:
        """JSON-able form."""
        return asdict(self)


def plan_finetuning(
    dataset: Dataset,
    val: Dataset | None,
    model: str,
    pretrained: str | None,
    options: FinetuneOptions,
    device: str | None = None,
    root: str | Path | None = None,
) -> FinetunePlan:
    """Plan a run of `ft.finetune`, by making two updates that are thrown away.

    Raises
    ------
    FeatcacheError
        Model, data or options that do not exist or do not fit together.
    """
    refuse_multilabel(dataset, val)
    if options.shots:
        dataset = few_shots(dataset, options.shots, options.seed)
    place = Place(0, 1, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = load_open_clip(
        model, pretrained, device=place.device, precision=options.precision, preprocess=options.preprocess
    )
    size = _nbytes(encoder.model.state_dict())
    order = make_order(len(dataset.index), options, place)
    updates = options.steps or (options.epochs or 0) * order.steps_per_epoch
    stepper = _plain_stepper(RunSetting(encoder, dataset, options, root), options)
    view = make_view(
        options.augment, encoder_for(dataset, encoder) if options.augment == "none" else encoder, options.seed
    )
    workers, seconds = options.workers or default_workers(), 0.0
    with torch.random.fork_rng(devices=[]):
        began = time.perf_counter()
        for batch in training_batches(dataset, view, order, range(MEASURED), place.device, workers, 0):
            float(stepper.update(batch, 0.0).gradient_norm)  # waits for the device
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


def _plain_stepper(setting: RunSetting, options: FinetuneOptions) -> Stepper:
    """Model and objective alone; the head is one of zeros, since a fitted one may need a store."""
    encoder, names = setting.encoder, setting.dataset.index.classnames
    contrastive = options.objective == "contrastive"
    sentences = setting.captions() if contrastive else []
    zeros = torch.zeros(len(names), encoder.dim), torch.zeros(len(names))
    model = Trainable(encoder, None if contrastive else Head(*zeros, with_bias=options.head_bias), options)
    objective: Objective
    if model.head is None:
        labels = setting.dataset.index.labels
        objective = OverPairs(model, sentences, labels, options.seed, options.false_negatives)
    else:
        objective = OverHead(model.head, options.label_smoothing)
    return Stepper(
        model=model,
        objective=objective,
        regularizers={},
        optimizer=make_optimizer(model, options),
        scaler=torch.amp.GradScaler(encoder.device.partition(":")[0], enabled=options.precision == "fp16"),
        options=options,
        generator=setting.generator,
        prior=None,
        frozen_head=None,
        initial={},
    )


def _nbytes(state: State) -> int:
    return sum(value.nbytes for value in state.values())
