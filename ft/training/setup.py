"""Everything a run needs before its first update: model, head, regularisers, frozen prior, optimiser, data order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from featcache.datasets import dataset_key, labels_digest
from featcache.datasets.base import Dataset
from featcache.encoders import encoder_for
from featcache.encoders.openclip import OpenClipEncoder
from featcache.encoding.augment import View, make_view
from featcache.encoding.banks import SecondMoment, load_bank, load_moment
from featcache.encoding.chunks import as_stored, encoder_key
from featcache.encoding.images import encode_dataset
from featcache.encoding.texts import embed_prompts
from featcache.errors import MismatchError, TrainingError
from featcache.prompts import fill, load_prompt_file, load_templates, prompts_of
from featcache.store import TextStore, resolve_root
from ft.checkpoints.heads import load_head
from ft.checkpoints.parents import folder_of, load_open_clip
from ft.checkpoints.state import Json
from ft.distributed import Place
from ft.merging.splits import row_hashes
from ft.objectives.base import Objective
from ft.objectives.contrastive import OverPairs
from ft.objectives.cross_entropy import OverHead
from ft.objectives.head import Head
from ft.prior.prior import OnlinePrior, StoredPrior
from ft.regularizers import REGULARIZERS
from ft.regularizers.carot import SelfDistillation
from ft.training.averages import EMA, SWA, Teacher
from ft.training.data import Order, TrainedRows, few_shots
from ft.training.model import Frozen, Trainable
from ft.training.optim import make_optimizer, rates
from ft.training.options import FinetuneOptions
from ft.training.step import FROZEN, Stepper
from heads import HEADS, LinearClassifier, LinearHead, ResidentStore, ZeroShot
from heads.fitted.provenance import SplitRecord

UNTRACKED = ("workers", "log_every", "tensorboard", "prior", "eval_start", "keep_every")
"""Options that change no weights, so that a resumed run may change them."""
LATER: tuple[str, ...] = ("drop_last", "shots", "objective_weight", "eval_templates", "eval_names")
LATER += ("lora_rank", "lora_alpha", "lora_tower", "lora_targets")
"""Options that older versions do not know; recorded only where they differ from the default."""

PROBES = {name: kind for name, kind in HEADS.items() if issubclass(kind, LinearClassifier) and kind.fits_on == "images"}


@dataclass
class Run:
    """A prepared run.

    Parameters
    ----------
    source : model folder, or the model's configuration, for `ft.checkpoints.folder.write_model_folder`
    trained_on, selected_on : see `split_record`
    rate : learning rate as a function of the step 0, 1, ...
    identity : options, model and data that a resumed run must share with the saved one to continue bit for bit
    trained : rows trained on so far
    """

    place: Place
    encoder: OpenClipEncoder
    source: Path | Json
    dataset: Dataset
    val: Dataset | None
    trained_on: Json
    selected_on: Json | None
    options: FinetuneOptions
    order: Order
    view: View
    stepper: Stepper
    average: EMA | SWA | None
    rate: Callable[[int], float]
    total: int
    identity: Json
    trained: TrainedRows

    @cached_property
    def selected(self) -> SplitRecord | None:
        """`selected_on` with the hashes of its rows, for which every sample is read once."""
        if self.val is None or self.selected_on is None:
            return None
        hashes = row_hashes(self.val)
        return SplitRecord(self.selected_on, np.unique(hashes[hashes != 0]))


def prepare(
    dataset: Dataset,
    val: Dataset | None,
    model: str,
    pretrained: str | None,
    options: FinetuneOptions,
    place: Place,
    root: str | Path | None,
) -> Run:
    """Load the model and build everything else.

    Raises FeatcacheError if the model, head, data or options do not exist or do not fit together.
    """
    trained_on, selected_on = split_record(dataset, root), None if val is None else split_record(val, root)
    if options.shots:
        dataset = few_shots(dataset, options.shots, options.seed)
        trained_on["sample"] = {"shots": options.shots, "seed": options.seed}
    if options.batch_norm and place.world > 1:
        raise TrainingError("batch_norm: each of several processes would normalise its own share; leave it off")
    if val is not None and selected_on is not None:
        if val.index.classnames != dataset.index.classnames:
            raise MismatchError(f"val {val.name}/{val.split} has other classes than {dataset.name}/{dataset.split}")
        if selected_on["dataset_key"] == trained_on["dataset_key"]:
            raise TrainingError(f"val {val.name}/{val.split} is the training split; expected images that are held out")
    encoder, view = load_model(model, pretrained, dataset, options, place)
    order, total = make_order(len(dataset.index), options, place)
    samples = split_record(dataset, root)
    identity = _tracked(options) | {
        "model": [encoder.image_identity["weights"], encoder.text_digest],
        "data": samples["dataset_key"],
        "labels": samples["labels_digest"],
        "val": None if selected_on is None else selected_on["dataset_key"],
        "processes": place.world,
    }
    with place.first_goes_first():
        setting = RunSetting(encoder, dataset, options, root)
        stepper = make_stepper(setting, options, view, samples["dataset_key"], total)
    average: EMA | SWA | None = None
    if options.average != "none":
        trained = stepper.model.trained()
        average = EMA(trained, options.ema_decay) if options.average == "ema" else SWA(trained)
    return Run(
        place=place,
        encoder=encoder,
        source=folder_of(model) or encoder.configuration(),
        dataset=dataset,
        val=val,
        trained_on=trained_on,
        selected_on=selected_on,
        options=options,
        order=order,
        view=view,
        stepper=stepper,
        average=average,
        rate=rates(options, total),
        total=total,
        identity=identity,
        trained=TrainedRows(len(dataset.index)),
    )


def load_model(
    model: str, pretrained: str | None, dataset: Dataset, options: FinetuneOptions, place: Place
) -> tuple[OpenClipEncoder, View]:
    """The initial model of a run, and the augmentation of its images."""
    encoder = load_open_clip(
        model, pretrained, device=place.device, precision=options.precision, preprocess=options.preprocess
    )
    plain = encoder_for(dataset, encoder) if options.augment == "none" else encoder
    return encoder, make_view(options.augment, plain, options.seed)


def make_order(n: int, options: FinetuneOptions, place: Place) -> tuple[Order, int]:
    """The batches of a run on `n` images, and the number of updates.

    Raises TrainingError if the batch size does not suit the data set, processes, micro-batches or regularisers.
    """
    order = Order(n, options.batch_size, options.seed, options.shuffle, place.rank, place.world, options.drop_last)
    if options.accumulate > (share := options.batch_size // place.world):
        raise TrainingError(f"accumulate {options.accumulate}: a process has only {share} images per update")
    if "variance_covariance" in options.regularizers and order.images_per_epoch % options.batch_size == 1:
        raise TrainingError(
            f"variance_covariance: the last batch of {n} images would hold one image, and a covariance needs two; "
            "use another --batch-size, or --drop-last"
        )
    return order, options.steps or (options.epochs or 0) * order.steps_per_epoch


def _tracked(options: FinetuneOptions) -> Json:
    """Options that a resumed run must share."""
    values, defaults = options.to_dict(), FinetuneOptions().to_dict()
    skipped = {*UNTRACKED, *(name for name in LATER if values[name] == defaults[name])}
    return {name: value for name, value in values.items() if name not in skipped}


def split_record(dataset: Dataset, root: str | Path | None = None) -> Json:
    """Name, split and digests of a data set for provenance."""
    return {
        "name": dataset.name,
        "split": dataset.split,
        "dataset_key": dataset_key(dataset.index, resolve_root(root)),
        "labels_digest": labels_digest(dataset.index.labels, dataset.index.classnames),
    }


@dataclass
class RunSetting:
    """Model, data and options of a run, offered to regularisers as their `ft.regularizers.base.Setting`.

    `frozen` is a frozen copy of the initial model `encoder`; None if no regulariser needs one.
    """

    encoder: OpenClipEncoder
    dataset: Dataset
    options: FinetuneOptions
    root: str | Path | None
    frozen: Frozen | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.logit_scale, self.special_tokens = self.encoder.logit_scale, self.encoder.special_tokens

    def encode_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Setting`."""
        if self.frozen is None:
            raise TrainingError("this regulariser encodes texts, so its `needs` must name frozen_features")
        return self.frozen.text_features(ids)

    def bank(self, reference: str | int) -> torch.Tensor:
        """See `Setting`."""
        return load_bank(reference, as_stored(self.encoder), self.root)

    def moment(self, reference: str | int) -> SecondMoment:
        """See `Setting`."""
        return load_moment(reference, as_stored(self.encoder), self.root)

    def contexts(self, templates: str | None) -> torch.Tensor:
        """See `Setting`."""
        store = self.text_store(templates)
        if store.ctx is None:
            raise TrainingError("a prompt file has no contexts: name templates, as in car=1,templates=openai-imagenet")
        return torch.from_numpy(store.ctx.copy())

    def text_store(self, templates: str | None = None) -> TextStore:
        """Text store of the data set's classes, with the run's prompts or with other templates."""
        options, names = self.options, self.dataset.index.classnames
        prompts = load_prompt_file(options.prompts) if options.prompts and templates is None else None
        chosen = None if prompts is not None else load_templates(templates or options.templates)
        encoder = as_stored(self.encoder)
        return embed_prompts(names, chosen, encoder, prompts=prompts, name=self.dataset.name, root=self.root).store

    def captions(self) -> list[list[str]]:
        """Captions of each class: every template, or the sentences of the prompt file."""
        names = self.dataset.index.classnames
        if self.options.prompts:
            return [list(texts) for texts in prompts_of(load_prompt_file(self.options.prompts), names)]
        return fill(load_templates(self.options.templates), names)

    def evaluated_captions(self) -> list[list[str]] | None:
        """Prompts of the evaluated classifier of a contrastive run; None if they are its captions."""
        options, names = self.options, self.dataset.index.classnames
        if not options.eval_templates and not set(options.eval_names) & set(names):
            return None
        shown = [options.eval_names.get(name, name) for name in names]
        return fill(load_templates(options.eval_templates or options.templates), shown)

    def starting_head(self) -> Head:
        """The initial head, from `FinetuneOptions.head`.

        ``ridge`` and ``logistic`` are fitted on the store of the training split, which is encoded if it does not exist:
        a linear probe and the fine-tuning after it (LP-FT, arXiv 2202.10054) encode the images once. Raises HeadError
        or TrainingError for an unknown head, MismatchError for that of another encoder or class list.
        """
        options, encoder = self.options, self.encoder
        if options.head == "zeros":
            classes = self.dataset.index.classnames
            zeros = np.zeros((len(classes), encoder.dim), np.float32)
            head = LinearHead(zeros, zeros[:, 0], classes)
        elif options.head == "zero_shot":
            head = ZeroShot().fit(self.text_store()).linear()
        elif options.head in PROBES:
            store = encode_dataset(self.dataset, as_stored(encoder), root=self.root).store
            head = PROBES[options.head]().fit(store).linear()
        else:
            head = self._head_of_file()
        weights, bias = torch.from_numpy(head.weights.copy()), torch.from_numpy(head.bias.copy())
        scale = encoder.logit_scale if options.head_scale == "separate" else 1.0
        return Head(weights, bias, scale, options.head_bias)

    def _head_of_file(self) -> LinearHead:
        if not Path(self.options.head).is_file():
            raise TrainingError(
                f"head {self.options.head!r}: no such file; expected zero_shot, zeros, {', '.join(PROBES)}, a head "
                "that `featcache fit` wrote, or a .ckpt of Lipsum-FT with cls in it"
            )
        head = load_head(self.options.head, self.dataset.index.classnames, lambda: self.logit_scale)
        # check it as if against the store of the training split, which may not exist
        store = ResidentStore(
            torch.zeros(0, self.encoder.dim),
            np.zeros(0, np.int64),
            self.dataset.index.classnames,
            name=f"{self.dataset.name}/{self.dataset.split}",
            encoder_key=encoder_key(self.encoder),
            encoder_name=self.encoder.name,
            text_digests=(self.encoder.text_digest,),
        )
        head.check(store)
        return head


def make_stepper(setting: RunSetting, options: FinetuneOptions, view: View, data_key: str, total: int) -> Stepper:
    """Model, objective, regularisers and optimiser of a run."""
    encoder, contrastive = setting.encoder, options.objective == "contrastive"
    sentences = setting.captions() if contrastive else []
    head = None if contrastive else setting.starting_head()
    labels = setting.dataset.index.labels
    model = Trainable(encoder, head, options)
    needs = frozenset[str]().union(*(REGULARIZERS[name].needs for name in options.regularizers))
    frozen = setting.frozen = model.frozen() if needs & FROZEN else None
    initial = model.trained() if "initial_parameters" in needs else {}
    new = "head." if options.head == "zeros" else "\0"  # L2-SP treats a head of zeros as new: without initial values
    objective: Objective
    if model.head is None:
        evaluated = setting.evaluated_captions()
        trained = "text" in options.train
        objective = OverPairs(model, trained, sentences, labels, options.seed, options.false_negatives, evaluated)
    else:
        objective = OverHead(model.head, options.label_smoothing)
    regularizers = {}
    for name, given in options.regularizers.items():
        parameters = {key: value for key, value in given.items() if key != "weight"}
        regularizers[name] = float(given["weight"]), REGULARIZERS[name].from_setting(setting, **parameters)
    taught = [term for _, term in regularizers.values() if isinstance(term, SelfDistillation)]
    prior: OnlinePrior | None = None
    if frozen is not None:
        # autocast applies to the frozen tower too; compiling changes its rounding
        tower = encoder.image_identity | {"precision": options.precision}
        tower |= {"compiled": True} if options.compile else {}
        identity = {"tower": tower, "view": view.identity, "dataset": data_key}
        sizes = len(labels), encoder.dim
        if options.prior == "store":
            one_view = options.augment == "none"
            stamps = None if setting.dataset.index.content else setting.dataset.index.stamps  # or it is in the key
            prior = StoredPrior(frozen.image_features, identity, *sizes, setting.root, one_view=one_view, stamps=stamps)
        else:
            prior = OnlinePrior(frozen.image_features)
    return Stepper(
        model=model,
        objective=objective,
        regularizers=regularizers,
        optimizer=make_optimizer(model, options),
        scaler=torch.amp.GradScaler(encoder.device.partition(":")[0], enabled=options.precision == "fp16"),
        options=options,
        generator=setting.generator,
        prior=prior,
        frozen_head=None if frozen is None else frozen.head,
        teacher=Teacher(model.trained(), taught[0], total) if taught else None,
        initial={name: value.clone() for name, value in initial.items() if not name.startswith(new)},
    )
