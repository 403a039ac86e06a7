"""The options of fine-tuning and their checks; the command line, recipes and Python share their names."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Self

from featcache.errors import TrainingError
from featcache.parameters import (
    Count,
    Fraction,
    NotNegative,
    OneOf,
    Parameter,
    Positive,
    Precision,
    Range,
    Whole,
    check_parameters,
    json_value,
    parameters_of,
)
from ft.regularizers import REGULARIZERS

PARTS = ("image", "text", "head", "logit_scale")
TOWERS = {"image": ("image",), "text": ("text",), "trained": ("image", "text"), "both": ("image", "text")}
"""Towers of each value of ``lora_tower``, before those that are not trained are left out."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; each field is a flag of ``featcache finetune`` and a key of recipes.

    Parameters
    ----------
    objective
        ``cross_entropy`` of a head, or ``contrastive`` loss of images and captions (templates filled with class names).
    objective_weight : weight of the objective in the loss, as the regularisers have theirs (RegFT's lambda)
    head
        Initial head: ``zero_shot``, ``zeros``, ``ridge`` or ``logistic`` (fitted on the store of the training split),
        or a file written by ``featcache fit``. Contrastive runs have none.
    head_scale
        Logits are ``W v + b`` with the logit scale s inside W (``folded``, as WiSE-FT), or ``s W v + b`` (``separate``,
        as Lipsum-FT). The gradient of a separate W is s times larger, so at the same learning rate the head learns
        faster.
    head_bias : give the head a trainable bias
    templates : template set, file, or one template with ``{}``, for zero-shot heads and captions
    prompts : JSON file ``{class: [sentences]}``, instead of templates
    false_negatives : contrastive: count equal captions of other pairs as negatives, as the original does
    eval_templates : contrastive: templates of the classifier that is evaluated and saved (default: `templates`)
    eval_names : contrastive: other class names in the prompts of that classifier, such as ``{"0": "zero"}``
    train
        Parts to train: image, text, head, logit_scale (default: image and head; for the contrastive objective, image,
        text and logit scale).
    regularizers : terms added to the loss: name -> weight, or name -> ``{"weight": lambda, parameter: value, ...}``
    shots : train on this many samples of each class, drawn with `seed` as `heads.few_shot` draws them
    epochs : passes over the data (default: 10, without `steps`)
    steps : updates, instead of epochs
    batch_size : images per update, over all processes and micro-batches
    drop_last : leave out the last batch of an epoch if it is smaller; otherwise train on it, as WiSE-FT does
    accumulate : micro-batches per update in each process; the update is that of the whole batch
    optimizer : ``adam`` adds weight decay to the gradient (L2), as torch's Adam does
    lr : learning rate
    weight_decay : weight decay, of all trained parameters
    betas : decay rates of the optimiser's two moments
    eps : added to the denominator of the optimiser's steps
    schedule : learning-rate schedule (see `ft.training.optim`); ``constant`` has a linear warm-up too
    warmup : warm-up updates; the schedule ``lipsum`` warms up over a tenth of the run instead
    clip : maximum norm of the gradient
    label_smoothing : label smoothing of the cross entropy
    layer_decay : multiply the learning rate by this for each layer further from the output
    freeze_layers : freeze this many layers at the input of the image tower; 1 is the embedding and one block
    lora_rank
        Rank of low-rank updates that are trained instead of the towers (LoRA, see `ft.training.lora`); 0 trains the
        towers themselves. Checkpoints hold the merged weights: they are plain models.
    lora_alpha : the update is multiplied by alpha / rank (default: the rank)
    lora_tower
        Towers with an update; ``trained`` means those in `train`. A trained tower without one is trained as a whole.
    lora_targets : matrices with an update: query, key, value and out (of attention), mlp
    batch_norm
        Use and update batch statistics in trained batch normalisation layers (ResNets); validation and the frozen model
        use running statistics. Not with several processes, micro-batches, or `checkpoint_activations`.
    precision : precision of the towers' matrix products (autocast); weights, heads and losses are float32
    compile : use ``torch.compile`` on the image tower
    checkpoint_activations : recompute activations in the backward pass to save memory
    average : average of the weights that is evaluated and saved instead of them
    ema_decay : decay of the exponential moving average
    swa_start : fraction of the run after which SWA begins; it averages one model per epoch
    preprocess
        Preprocessing without augmentation, such as ``central-crop`` (default: the model's own). Heads then belong to
        features from ``featcache encode --preprocess`` with the same name.
    augment : augmentation of the training images: a name in `featcache.encoding.augment`, or ``none``: as encode does
    seed : seed of all random numbers
    shuffle : draw a new order every epoch; otherwise keep the order of the data set
    prior : features of the frozen model: computed online, or kept in a store for later runs
    select
        Metric on the selection split that chooses the best checkpoint; ties go to the lower NLL, then to the earlier.
    eval_start
        Also evaluate the initial model on the selection split: prints before and after, and adds rows to ``--results``.
    keep_every : epochs between checkpoints to keep, as ``OUT/checkpoint_1`` and so on (default: keep none)
    eval_every : updates between evaluations on the selection split (default: one epoch)
    save_every : updates between checkpoints (default: one epoch)
    log_every : updates between lines of ``log.jsonl``
    workers : threads that read, decode and crop (default: one per core)
    tensorboard : also log for TensorBoard (extra ``finetune``)

    Raises
    ------
    TrainingError
        Names the option, its value, and what is allowed.

    Examples
    --------
    >>> FinetuneOptions(steps=10, regularizers={"l2sp": 0.1}).regularizers
    {'l2sp': {'weight': 0.1}}
    """

    objective: Annotated[str, OneOf("cross_entropy", "contrastive")] = "cross_entropy"
    objective_weight: NotNegative = 1.0
    head: str = "zero_shot"
    head_scale: Annotated[str, OneOf("folded", "separate")] = "folded"
    head_bias: bool = True
    templates: str = "simple"
    prompts: str | None = None
    false_negatives: bool = False
    eval_templates: str | None = None
    eval_names: Mapping[str, str] = field(default_factory=dict)
    train: tuple[Annotated[str, OneOf(*PARTS)], ...] = ()
    regularizers: Mapping[str, Any] = field(default_factory=dict)
    shots: Count | None = None
    epochs: Annotated[int, Range(1, 10**6)] | None = None
    steps: Annotated[int, Range(1, 10**9)] | None = None
    batch_size: Count = 128
    drop_last: bool = True
    accumulate: Count = 1
    optimizer: Annotated[str, OneOf("adamw", "adam")] = "adamw"
    lr: Positive = 1e-5
    weight_decay: NotNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    schedule: Annotated[str, OneOf("wise_ft", "lipsum", "constant")] = "wise_ft"
    warmup: Whole = 0
    clip: Positive | None = None
    label_smoothing: Fraction = 0.0
    layer_decay: Annotated[float, Range(0, 1, open=True)] = 1.0
    freeze_layers: Whole = 0
    lora_rank: Whole = 0
    lora_alpha: Positive | None = None
    lora_tower: Annotated[str, OneOf(*TOWERS)] = "trained"
    lora_targets: tuple[Annotated[str, OneOf("query", "key", "value", "out", "mlp")], ...] = ("query", "key", "value")
    batch_norm: bool = False
    precision: Precision = "fp32"
    compile: bool = False
    checkpoint_activations: bool = False
    average: Annotated[str, OneOf("none", "ema", "swa")] = "none"
    ema_decay: Fraction = 0.9999
    swa_start: Annotated[float, Range(0, 1)] = 0.75
    preprocess: str | None = None
    augment: str = "wise_ft"
    seed: Whole = 0
    shuffle: bool = True
    prior: Annotated[str, OneOf("online", "store")] = "online"
    select: Annotated[str, OneOf("accuracy", "nll")] = "accuracy"
    eval_start: bool = False
    keep_every: Whole = 0
    eval_every: Whole = 0
    save_every: Whole = 0
    log_every: Count = 20
    workers: Whole = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        try:
            check_parameters(declared_options(), {k: v for k, v in vars(self).items() if k != "train" or v})
        except ValueError as error:
            raise TrainingError(str(error)) from None
        contrastive = (*TOWERS[self.lora_tower], "logit_scale")
        default = ("image", "head") if self.objective == "cross_entropy" else contrastive
        object.__setattr__(self, "train", tuple(self.train) or default)
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2:
            raise TrainingError(f"betas is {list(self.betas)}, expected two numbers")
        object.__setattr__(self, "regularizers", {k: _weighted(k, v) for k, v in self.regularizers.items()})
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10)
        self._check_length()
        self._check_parts()
        self._check_lora()

    @property
    def lora_towers(self) -> tuple[str, ...]:
        """Towers of which only a low-rank update is trained."""
        return tuple(part for part in TOWERS[self.lora_tower] if part in self.train) if self.lora_rank else ()

    def _check_length(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise TrainingError(f"epochs {self.epochs} and steps {self.steps}: give one of the two")
        if self.schedule == "lipsum" and self.warmup:
            raise TrainingError("schedule lipsum warms up over a tenth of the run; leave warmup out, or use wise_ft")
        if self.batch_norm and self.accumulate > 1:
            raise TrainingError("batch_norm needs the whole batch at once; expected accumulate 1")
        if self.batch_norm and self.checkpoint_activations:
            raise TrainingError(
                "batch_norm with checkpoint_activations: layers that are recomputed would count each batch twice in "
                "their running statistics; leave one of the two off"
            )

    def _check_parts(self) -> None:
        contrastive = self.objective == "contrastive"
        useless = ("head",) if contrastive else ("text", "logit_scale")
        if found := [part for part in self.train if part in useless]:
            raise TrainingError(
                f"train {', '.join(found)}: not used by the objective {self.objective}; expected some of "
                f"{', '.join(part for part in PARTS if part not in useless)}"
            )
        if not contrastive and (self.eval_templates or self.eval_names):
            raise TrainingError("eval_templates and eval_names belong to the objective contrastive; leave them out")
        if contrastive and self.label_smoothing:
            raise TrainingError("label_smoothing belongs to the objective cross_entropy; leave it out")
        if contrastive and "logit_distillation" in self.regularizers:
            raise TrainingError("logit_distillation needs a head; expected the objective cross_entropy, or `car`")
        if self.head == "zeros" and "logit_distillation" in self.regularizers:
            raise TrainingError(
                "logit_distillation with head 'zeros': the initial model gives every class the same probability, so "
                "it would pull the model to uniform predictions; expected a head: zero_shot, ridge, logistic or a "
                "file, or feature_distillation"
            )

    def _check_lora(self) -> None:
        if not self.lora_rank:
            if self.lora_alpha is not None or self.lora_tower != "trained":
                raise TrainingError("lora_alpha and lora_tower belong to LoRA; give lora_rank too")
            return
        wanted = () if self.lora_tower == "trained" else TOWERS[self.lora_tower]
        if missing := [tower for tower in wanted if tower not in self.train]:
            raise TrainingError(
                f"lora_tower {self.lora_tower}: the {missing[0]} tower is not trained ({', '.join(self.train)}); "
                "expected a tower that is, or the objective contrastive, which trains both"
            )
        if not self.lora_towers:
            raise TrainingError(f"lora_rank {self.lora_rank}: no tower is trained ({', '.join(self.train)}); train one")
        if "l2sp" in self.regularizers:
            raise TrainingError("l2sp penalises changes of the original weights, which LoRA keeps fixed; leave it out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Options from a recipe or from the record of a run.

        Raises TrainingError if an option is unknown, or its value is not allowed.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise TrainingError(f"unknown options {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able inverse of `from_dict`."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


@cache
def declared_options() -> dict[str, Parameter]:
    """The fields of `FinetuneOptions`, with what each allows."""
    return parameters_of(FinetuneOptions)


def _weighted(name: str, value: object) -> dict[str, Any]:
    """``{"weight": lambda, ...}`` of a bare number or a mapping."""
    if name not in REGULARIZERS:
        raise TrainingError(f"regularizer {name!r}: expected one of {', '.join(REGULARIZERS)}")
    given = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = given.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise TrainingError(f"regularizer {name}: weight {weight!r}; expected a number, zero or more: {name}=1.0")
    declared = REGULARIZERS[name].parameters() if len(given) > 1 else {}
    for key in given.keys() - {"weight"}:
        if key not in declared:
            expected = ", ".join(declared) or "none"
            raise TrainingError(f"regularizer {name}: unknown parameter {key}={given[key]!r}; expected {expected}")
        try:
            declared[key].check(given[key])
        except ValueError as error:
            raise TrainingError(f"regularizer {name}: parameter {error}") from None
    return given


def parse_regularizer(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``NAME=LAMBDA[,PARAMETER=VALUE...]``, with values in JSON or as bare words.

    Raises TrainingError if the text has another form.

    >>> parse_regularizer("lipsum=1.0,mode=exact,bank=10000")
    ('lipsum', {'weight': 1.0, 'mode': 'exact', 'bank': 10000})
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise TrainingError(f"regularizer {text!r}: expected NAME=LAMBDA[,PARAMETER=VALUE...], as in lipsum=1.0")
    (name, _, weight), *others = pairs
    return name, {"weight": _value(weight)} | {key: _value(value) for key, _, value in others}


def _value(text: str) -> object:
    try:
        return json_value(text)
    except ValueError:
        return text
