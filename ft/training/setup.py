"""A run before its first update: model, head, regularisers, frozen prior, optimiser, data.

What a run offers to its regularisers: the initial model's texts, stored banks, contexts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcache.datasets import dataset_key, labels_digest
from featcache.datasets.base import Dataset
from featcache.encoders import load_encoder
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.augment import View, make_view
from featcache.encoding.banks import load_bank, load_moment
from featcache.encoding.chunks import as_stored
from featcache.errors import EncoderError, MismatchError, TrainingError
from ft.distributed import Place
from ft.objectives.base import Objective
from ft.objectives.captions import Captions
from ft.objectives.contrastive import OverPairs
from ft.objectives.cross_entropy import OverHead
from ft.prior.prior import Prior, make_prior
from ft.regularizers import REGULARIZERS, Regularizer
from ft.regularizers.base import build
from ft.training.averages import EMA, SWA
from ft.training.data import Order
from ft.training.model import Frozen, Trainable
from ft.training.optim import make_optimizer, rates
from ft.training.options import FinetuneOptions
from ft.training.start import sentences, starting_head, text_store
from ft.training.step import FROZEN, Stepper


@dataclass
class RunSetting:
    """`ft.regularizers.base.Setting` of a run.

    Parameters
    ----------
    encoder : OpenClipEncoder
        Before it is trained.
    frozen : Frozen or None
        Its frozen copy; None where no regulariser needs one.
    """

    encoder: OpenClipEncoder
    frozen: Frozen | None
    dataset: Dataset
    options: FinetuneOptions
    root: str | Path | None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.logit_scale = self.encoder.logit_scale

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """See `Setting`."""
        return self.encoder.special_tokens

    def encode_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Setting`."""
        if self.frozen is None:
            raise TrainingError("this regulariser encodes texts, so its `needs` must name frozen_features")
        return self.frozen.text_features(ids)

    def bank(self, reference: Any) -> torch.Tensor:
        """See `Setting`."""
        return load_bank(reference, as_stored(self.encoder), self.root)

    def moment(self, reference: Any) -> Any:
        """See `Setting`."""
        return load_moment(reference, as_stored(self.encoder), self.root)

    def contexts(self, templates: str | None) -> torch.Tensor:
        """See `Setting`."""
        store = text_store(self.options, self.encoder, self.dataset, self.root, templates)
        if store.ctx is None:
            raise TrainingError("a prompt file has no contexts: name templates, as in car=1,templates=openai-imagenet")
        return torch.from_numpy(store.ctx.copy())


@dataclass
class Run:
    """Everything that the loop holds."""

    place: Place
    encoder: OpenClipEncoder
    source: str | dict[str, Any]
    dataset: Dataset
    val: Dataset | None
    options: FinetuneOptions
    order: Order
    view: View
    stepper: Stepper
    average: EMA | SWA | None
    rate: Callable[[int], float]
    total: int
    identity: Mapping[str, Any]

    @property
    def what(self) -> str:
        """For people: which model on which data."""
        return f"finetune {self.encoder.name} on {self.dataset.name}/{self.dataset.split}"


def prepare(
    dataset: Dataset,
    val: Dataset | None,
    model: str,
    pretrained: str | None,
    options: FinetuneOptions,
    place: Place,
    root: str | Path | None,
) -> Run:
    """Load and build everything.

    Raises
    ------
    FeatcacheError
        Whatever cannot be had as asked: model, head, data, options that do not fit together.
    """
    _check(dataset, val, options, place)
    encoder = load_encoder(
        model, pretrained, device=place.device, precision=options.precision, preprocess=options.preprocess
    )
    if not isinstance(encoder, OpenClipEncoder):
        raise EncoderError(f"model {model}: only open_clip models can be fine-tuned")
    order = Order(len(dataset.index), options.batch_size, options.seed, options.shuffle, place.rank, place.world)
    total = options.steps or (options.epochs or 0) * order.steps_per_epoch
    view = make_view(options.augment, encoder, options.seed)
    identity = _identity(encoder, dataset, val, options, place)
    with place.first_goes_first():
        stepper = _stepper(encoder, dataset, view, options, root)
    average: EMA | SWA | None = None
    if options.average != "none":
        trained = stepper.model.trained()
        average = EMA(trained, options.ema_decay) if options.average == "ema" else SWA(trained)
    local = model == "tiny" or model.startswith("local-dir:")
    return Run(
        place=place,
        encoder=encoder,
        source=model if local else encoder.configuration(),
        dataset=dataset,
        val=val,
        options=options,
        order=order,
        view=view,
        stepper=stepper,
        average=average,
        rate=rates(options, total),
        total=total,
        identity=identity,
    )


def _check(dataset: Dataset, val: Dataset | None, options: FinetuneOptions, place: Place) -> None:
    if options.batch_norm and place.world > 1:
        raise TrainingError("batch_norm under several processes would see each share alone; leave it off")
    if val is None:
        return
    if val.index.classnames != dataset.index.classnames:
        raise MismatchError(f"{val.name}/{val.split} has other classes than {dataset.name}/{dataset.split}")
    if dataset_key(val.index) == dataset_key(dataset.index):
        raise TrainingError(f"val {val.name}/{val.split} is the training split; select on images that do not train")


def _stepper(
    encoder: OpenClipEncoder, dataset: Dataset, view: View, options: FinetuneOptions, root: str | Path | None
) -> Stepper:
    head = None if options.objective == "contrastive" else starting_head(options, encoder, dataset, root)
    model = Trainable(encoder, head, options)
    kinds = {name: REGULARIZERS[name] for name in options.regularizers}
    frozen = model.frozen() if any(kind.needs & FROZEN for kind in kinds.values()) else None
    setting = RunSetting(encoder, frozen, dataset, options, root)
    objective: Objective
    if model.head is None:
        captions = Captions(sentences(options, dataset.index.classnames), options.seed)
        objective = OverPairs(model, captions, dataset.index.labels, options.false_negatives)
    else:
        objective = OverHead(model.head, options.label_smoothing)
    return Stepper(
        model=model,
        objective=objective,
        regularizers={name: _weighted(kind, setting, options.regularizers[name]) for name, kind in kinds.items()},
        optimizer=make_optimizer(model, options),
        scaler=torch.amp.GradScaler(encoder.device.partition(":")[0], enabled=options.precision == "fp16"),
        options=options,
        generator=setting.generator,
        prior=None if frozen is None else _prior(frozen, encoder, dataset, view, options, root),
        frozen_head=None if frozen is None else frozen.head,
        initial=_initial(model, options) if any("initial_parameters" in kind.needs for kind in kinds.values()) else {},
    )


def _weighted(kind: type[Regularizer], setting: RunSetting, given: Mapping[str, Any]) -> tuple[float, Regularizer]:
    parameters = {name: value for name, value in given.items() if name != "weight"}
    return float(given["weight"]), build(kind, setting, parameters)


def _prior(
    frozen: Frozen,
    encoder: OpenClipEncoder,
    dataset: Dataset,
    view: View,
    options: FinetuneOptions,
    root: str | Path | None,
) -> Prior:
    """v0; a compiled tower rounds in its own way, so it has stores of its own."""
    tower = encoder.image_identity | ({"compiled": True} if options.compile else {})
    identity = {"tower": tower, "view": view.identity, "dataset": dataset_key(dataset.index)}
    n_rows, one_view = len(dataset.index), options.augment == "none"
    return make_prior(options.prior, frozen.image_features, identity, n_rows, encoder.dim, root, one_view=one_view)


def _initial(model: Trainable, options: FinetuneOptions) -> dict[str, torch.Tensor]:
    """Where the parameters began; a head of zeros is new and began nowhere."""
    new = "head." if options.head == "zeros" else "\0"
    return {name: value.clone() for name, value in model.trained().items() if not name.startswith(new)}


def _identity(
    encoder: OpenClipEncoder, dataset: Dataset, val: Dataset | None, options: FinetuneOptions, place: Place
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was killed, to go on bit for bit."""
    chosen = {k: v for k, v in options.to_dict().items() if k not in ("workers", "log_every", "tensorboard", "prior")}
    return chosen | {
        "model": [encoder.image_identity["weights"], encoder.text_digest],
        "data": dataset_key(dataset.index),
        "labels": labels_digest(dataset.index.labels, dataset.index.classnames),
        "val": None if val is None else dataset_key(val.index),
        "processes": place.world,
    }
