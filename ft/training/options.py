"""Everything that a fine-tuning run can be told, with its checks: flags, recipes and Python share these names."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from featcache.errors import TrainingError
from ft.regularizers import REGULARIZERS

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("cross_entropy", "contrastive"),
    "head_scale": ("folded", "separate"),
    "optimizer": ("adamw", "adam"),
    "schedule": ("wise_ft", "lipsum", "constant"),
    "precision": ("fp32", "bf16", "fp16"),
    "average": ("none", "ema", "swa"),
    "prior": ("online", "store"),
    "select": ("accuracy", "nll"),
}
PARTS = ("image", "text", "head", "logit_scale")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; every field is a flag of ``featcache finetune`` and a key of a recipe.

    Parameters
    ----------
    objective : {"cross_entropy", "contrastive"}
        Over a head, or between images and their captions (templates x class names).
    head : str
        Where the head starts: ``zero_shot``, ``zeros``, ``ridge`` or ``logistic`` (fitted here from the store of the
        training split), or a file that ``featcache fit`` wrote. A contrastive run has none.
    head_scale : {"folded", "separate"}
        Logits are ``W v + b`` with the logit scale s inside W (WiSE-FT), or ``s W v + b`` (Lipsum-FT): W then moves
        s times less for the same effect, so that the same learning rate trains the head s times faster.
    head_bias : bool
        Whether the head has a trained bias.
    templates : str
        Template set, file, or one template with ``{}``: of zero-shot heads and captions.
    prompts : str, optional
        JSON file of sentences for each class, instead of templates, for a zero-shot head.
    false_negatives : bool
        Contrastive: pair i is right and all others wrong, equal captions included, as the original has it.
    train : tuple of "image", "text", "head", "logit_scale"
        What is trained; empty: image and head, or with the contrastive objective image, text and logit scale.
    regularizers : mapping of name -> {"weight": lambda, parameter: value, ...}
        A bare number is taken as the weight.
    epochs, steps : int
        Length of the run, one of the two; neither: 10 epochs.
    batch_size : int
        Images of an update, over all processes and micro-batches.
    accumulate : int
        Micro-batches that each process makes of its share; the update equals that of the whole batch.
    optimizer : {"adamw", "adam"}
        ``adam`` decays weights through the gradient (L2), as torch's Adam does.
    lr, weight_decay, betas, eps
        Weight decay is applied to all trained parameters.
    schedule : {"wise_ft", "lipsum", "constant"}
        See `ft.training.optim`; ``constant`` has a linear warm-up too.
    warmup : int
        Updates of the warm-up; Lipsum-FT's schedule has a tenth of the run of its own.
    clip : float, optional
        Largest global norm of the gradient.
    label_smoothing : float
        Of the cross entropy.
    layer_decay : float
        Factor on the learning rate for each layer further from the output.
    freeze_layers : int
        Image tower: the embedding and the first layers that stay as they are (0: none, 1: the embedding and one).
    batch_norm : bool
        Whether batch normalisation (ResNets) uses and updates batch statistics while it trains; judging and the frozen
        model use running ones, and layers that are not trained keep theirs. Not under several processes, with
        micro-batches, or with `checkpoint_activations`.
    precision : {"fp32", "bf16", "fp16"}
        Of the towers' products (autocast); weights, heads and losses are float32.
    compile, checkpoint_activations : bool
        ``torch.compile`` of the image tower; recompute activations in the backward pass to save memory.
    average : {"none", "ema", "swa"}
        Average of the weights along the run, which is then what is judged and saved.
    ema_decay : float
    swa_start : float
        Share of the run after which the plain mean begins, one model an epoch.
    preprocess : str, optional
        How pictures are prepared where they are not augmented, as for `featcache.encoders.load_encoder`: heads then
        belong to the features that ``featcache encode --preprocess`` of the same name makes.
    augment : str
        Views of the training images: a name of `featcache.encoding.augment`.
    seed : int
    shuffle : bool
        False keeps the data set's order.
    prior : {"online", "store"}
        Frozen features of the initial tower: computed, or kept in a store from which later runs read them.
    select : {"accuracy", "nll"}
        What makes a checkpoint the best one on the selection split.
    eval_every, save_every, log_every : int
        Updates between judging, resume checkpoints, and log lines; 0: once an epoch (20 updates for the log).
    workers : int
        Threads that read, decode and crop; 0: one a core.
    tensorboard : bool
        Log for TensorBoard too (extra ``finetune``).

    Raises
    ------
    TrainingError
        Naming the option, what it was, and what it may be.

    Examples
    --------
    >>> FinetuneOptions(steps=10, regularizers={"l2sp": 0.1}).regularizers
    {'l2sp': {'weight': 0.1}}
    """

    objective: str = "cross_entropy"
    head: str = "zero_shot"
    head_scale: str = "folded"
    head_bias: bool = True
    templates: str = "simple"
    prompts: str | None = None
    false_negatives: bool = False
    train: tuple[str, ...] = ()
    regularizers: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "wise_ft"
    warmup: int = 0
    clip: float | None = None
    label_smoothing: float = 0.0
    layer_decay: float = 1.0
    freeze_layers: int = 0
    batch_norm: bool = False
    precision: str = "fp32"
    compile: bool = False
    checkpoint_activations: bool = False
    average: str = "none"
    ema_decay: float = 0.9999
    swa_start: float = 0.75
    preprocess: str | None = None
    augment: str = "wise_ft"
    seed: int = 0
    shuffle: bool = True
    prior: str = "online"
    select: str = "accuracy"
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 20
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        default = ("image", "head") if self.objective == "cross_entropy" else ("image", "text", "logit_scale")
        object.__setattr__(self, "train", tuple(self.train) or default)
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "regularizers", {k: _weighted(k, v) for k, v in self.regularizers.items()})
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise TrainingError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        self._check_numbers()
        self._check_parts()

    def _check_numbers(self) -> None:
        positive = ("epochs", "steps", "batch_size", "accumulate", "lr", "eps", "clip", "log_every")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{name} {value!r}: expected a positive number")
        for name in ("weight_decay", "warmup", "freeze_layers", "eval_every", "save_every", "workers", "seed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise TrainingError(f"{name} {getattr(self, name)!r}: expected zero or more")
        for name, value in (("label_smoothing", self.label_smoothing), ("ema_decay", self.ema_decay)):
            if not 0 <= value < 1:
                raise TrainingError(f"{name} {value!r}: expected a number in [0, 1)")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.swa_start <= 1:
            raise TrainingError(
                f"layer_decay {self.layer_decay!r}, swa_start {self.swa_start!r}: expected (0, 1] and [0, 1]"
            )
        if self.epochs is not None and self.steps is not None:
            raise TrainingError(f"epochs {self.epochs} and steps {self.steps}: give one of the two")
        if self.schedule == "lipsum" and self.warmup:
            raise TrainingError("schedule lipsum warms up over a tenth of the run; leave warmup out, or take wise_ft")
        if self.batch_norm and self.accumulate > 1:
            raise TrainingError("batch_norm needs the whole batch at once; leave accumulate at 1")
        if self.batch_norm and self.checkpoint_activations:
            raise TrainingError(
                "batch_norm with checkpoint_activations: layers that are computed twice would count each batch twice "
                "in their running statistics; leave one of the two off"
            )

    def _check_parts(self) -> None:
        if wrong := [part for part in self.train if part not in PARTS]:
            raise TrainingError(f"train {', '.join(wrong)}: expected some of {', '.join(PARTS)}")
        contrastive = self.objective == "contrastive"
        useless = ("head",) if contrastive else ("text", "logit_scale")
        if found := [part for part in self.train if part in useless]:
            raise TrainingError(
                f"train {', '.join(found)}: no part of the objective {self.objective}; it trains "
                f"{', '.join(part for part in PARTS if part not in useless)}"
            )
        if contrastive and self.label_smoothing:
            raise TrainingError("label_smoothing belongs to the objective cross_entropy; leave it out")
        if contrastive and "logit_distillation" in self.regularizers:
            raise TrainingError("logit_distillation needs a head; take the objective cross_entropy, or `car`")
        if self.head == "zeros" and "logit_distillation" in self.regularizers:
            raise TrainingError(
                "logit_distillation with head 'zeros': the initial model would give every class the same probability, "
                "and the trained one be pulled there; expected a head that predicts something: zero_shot, ridge, "
                "logistic or a file, or take feature_distillation"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The options of a recipe or of a run's record.

        Raises
        ------
        TrainingError
            A name that is no option, or a value that none can have.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise TrainingError(f"unknown options {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same options back."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def _weighted(name: str, value: Any) -> dict[str, Any]:
    """``{"weight": lambda, ...}`` of a bare number or a mapping."""
    if name not in REGULARIZERS:
        raise TrainingError(f"regularizer {name!r}: expected one of {', '.join(REGULARIZERS)}")
    given = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = given.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise TrainingError(f"regularizer {name}: weight {weight!r}; expected a number, zero or more: {name}=1.0")
    return given


def parse_regularizer(text: str) -> tuple[str, dict[str, Any]]:
    """A regulariser as the command line writes it: ``NAME=LAMBDA[,PARAMETER=VALUE...]``, values in JSON or bare words.

    Raises
    ------
    TrainingError
        It is not written like that.

    Examples
    --------
    >>> parse_regularizer("lipsum=1.0,mode=exact,bank=10000")
    ('lipsum', {'weight': 1.0, 'mode': 'exact', 'bank': 10000})
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise TrainingError(f"regularizer {text!r}: expected NAME=LAMBDA[,PARAMETER=VALUE...], as in lipsum=1.0")
    (name, _, weight), *others = pairs
    return name, {"weight": _value(weight)} | {key: _value(value) for key, _, value in others}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
