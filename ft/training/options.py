"""The options of fine-tuning and their checks; command line, recipes and Python share these names."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, get_type_hints

from featcache.errors import TrainingError
from featcache.parameters import check_record, json_value
from ft.regularizers import REGULARIZERS

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("cross_entropy", "contrastive"),
    "head_scale": ("folded", "separate"),
    "optimizer": ("adamw", "adam"),
    "schedule": ("wise_ft", "lipsum", "constant"),
    "lora_tower": ("trained", "image", "text", "both"),
    "precision": ("fp32", "bf16", "fp16"),
    "average": ("none", "ema", "swa"),
    "prior": ("online", "store"),
    "select": ("accuracy", "nll"),
}
PARTS = ("image", "text", "head", "logit_scale")
LORA_TARGETS = ("query", "key", "value", "out", "mlp")


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune; each field is a flag of ``featcache finetune`` and a key of recipes.

    Parameters
    ----------
    objective : {"cross_entropy", "contrastive"}
        Of a head, or between images and their captions (templates x class names).
    objective_weight : float
        Factor on the objective, beside the weights of the regularisers (RegFT's lambda of the cross entropy).
    head : str
        Initial head: ``zero_shot``, ``zeros``, ``ridge`` or ``logistic`` (fitted on the store of the training split),
        or a file that ``featcache fit`` wrote. Contrastive runs have none.
    head_scale : {"folded", "separate"}
        Logits are ``W v + b`` with the logit scale s inside W (WiSE-FT), or ``s W v + b`` (Lipsum-FT). With
        ``separate``, W has to move s times less for the same effect, so the head learns s times faster at the same
        learning rate.
    head_bias : bool
        Train a bias.
    templates : str
        Template set, file, or one template with ``{}``, of zero-shot heads and captions.
    prompts : str, optional
        JSON file of sentences per class, instead of templates.
    false_negatives : bool
        Contrastive: pair i is right and all others are wrong, equal captions included, as in the original.
    eval_templates : str, optional
        Contrastive: templates, or a file, of the classifier that is evaluated and saved; default: `templates`.
    eval_names : mapping of class name -> str
        Contrastive: other names in the prompts of that classifier, such as ``{"0": "zero"}``.
    train : tuple of "image", "text", "head", "logit_scale"
        Parts to train. Empty: image and head; for the contrastive objective image, text and logit scale.
    regularizers : mapping of name -> {"weight": lambda, parameter: value, ...}
        A bare number is taken as the weight.
    shots : int, optional
        Train on this many samples of each class, drawn by `heads.rows.few_shot.draw_shots` with `seed`.
    epochs, steps : int
        Length of the run, one of the two; default 10 epochs.
    batch_size : int
        Images per update, over all processes and micro-batches.
    drop_last : bool
        Leave out the last batch of an epoch where it is smaller; False trains on it, as WiSE-FT does.
    accumulate : int
        Micro-batches of each process per update; the update equals that of the whole batch.
    optimizer : {"adamw", "adam"}
        ``adam`` decays weights through the gradient (L2), as torch's Adam does.
    lr, weight_decay, betas, eps
        Weight decay applies to all trained parameters.
    schedule : {"wise_ft", "lipsum", "constant"}
        See `ft.training.optim`; ``constant`` has a linear warm-up too.
    warmup : int
        Updates of the warm-up; the schedule ``lipsum`` warms up over a tenth of the run instead.
    clip : float, optional
        Largest global norm of the gradient.
    label_smoothing : float
        Of the cross entropy.
    layer_decay : float
        Factor on the learning rate per layer of distance from the output.
    freeze_layers : int
        Image tower: first layers that are not trained (0: none, 1: the embedding and one block).
    lora_rank : int
        Train a low-rank update of the towers' matrices instead of the towers (LoRA, see `ft.training.lora`); 0 trains
        the towers themselves. Checkpoints hold the sum: they are plain models.
    lora_alpha : float, optional
        The update is multiplied by alpha / rank; default: the rank.
    lora_tower : {"trained", "image", "text", "both"}
        Towers with an update; ``trained`` means those of `train`. A trained tower without one is trained as a whole.
    lora_targets : tuple of "query", "key", "value", "out", "mlp"
        Matrices with an update: of attention (out is its output projection), and of the multilayer perceptrons.
    batch_norm : bool
        Use and update batch statistics of trained batch normalisation layers (ResNets); validation and the frozen model
        use running statistics. Not with several processes, micro-batches, or `checkpoint_activations`.
    precision : {"fp32", "bf16", "fp16"}
        Of the towers' products (autocast); weights, heads and losses are float32.
    compile, checkpoint_activations : bool
        ``torch.compile`` of the image tower; recompute activations in the backward pass to save memory.
    average : {"none", "ema", "swa"}
        Average of the weights along the run, which is evaluated and saved instead of them.
    ema_decay : float
    swa_start : float
        Fraction of the run after which the mean begins, one model per epoch.
    preprocess : str, optional
        Preparation of pictures that are not augmented, see `featcache.encoders.load_encoder`: heads then belong to
        features made by ``featcache encode --preprocess`` of the same name.
    augment : str
        Augmentation of the training images: a name of `featcache.encoding.augment`.
    seed : int
    shuffle : bool
        False keeps the order of the data set.
    prior : {"online", "store"}
        Frozen features of the initial tower: computed, or kept in a store for later runs.
    select : {"accuracy", "nll"}
        Metric that selects the best checkpoint on the selection split; ties go to the lower NLL, then to the earlier.
    eval_start : bool
        Evaluate the starting model on the selection split, too.
    keep_every : int
        Epochs between checkpoints that are kept, ``checkpoint_1`` and so on; 0: only ``last`` and ``best`` are.
    eval_every, save_every, log_every : int
        Updates between validations and checkpoints (0: once per epoch), and between log lines.
    workers : int
        Threads that read, decode and crop; 0: one per core.
    tensorboard : bool
        Log for TensorBoard too (extra ``finetune``).

    Raises
    ------
    TrainingError
        Naming the option, its value, and what is allowed.

    Examples
    --------
    >>> FinetuneOptions(steps=10, regularizers={"l2sp": 0.1}).regularizers
    {'l2sp': {'weight': 0.1}}
    """

    objective: str = "cross_entropy"
    objective_weight: float = 1.0
    head: str = "zero_shot"
    head_scale: str = "folded"
    head_bias: bool = True
    templates: str = "simple"
    prompts: str | None = None
    false_negatives: bool = False
    eval_templates: str | None = None
    eval_names: Mapping[str, str] = field(default_factory=dict)
    train: tuple[str, ...] = ()
    regularizers: Mapping[str, Any] = field(default_factory=dict)
    shots: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    drop_last: bool = True
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
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_tower: str = "trained"
    lora_targets: tuple[str, ...] = ("query", "key", "value")
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
    eval_start: bool = False
    keep_every: int = 0
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 20
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        towers = {"image": ("image",), "text": ("text",)}.get(self.lora_tower, ("image", "text"))
        default = ("image", "head") if self.objective == "cross_entropy" else (*towers, "logit_scale")
        object.__setattr__(self, "train", tuple(self.train) or default)
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas {list(self.betas)}: expected two numbers in [0, 1)")
        object.__setattr__(self, "regularizers", {k: _weighted(k, v) for k, v in self.regularizers.items()})
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 10)
        for name, choices in CHOICES.items():
            if (value := vars(self)[name]) not in choices:
                raise TrainingError(f"{name} {value!r}: expected one of {', '.join(choices)}")
        self._check_numbers()
        self._check_parts()
        self._check_lora()

    @property
    def lora_towers(self) -> tuple[str, ...]:
        """Towers that are trained through a low-rank update alone."""
        wanted = {"image": ("image",), "text": ("text",)}.get(self.lora_tower, ("image", "text"))
        return tuple(part for part in wanted if part in self.train) if self.lora_rank else ()

    def _check_numbers(self) -> None:
        values = vars(self)
        for name in (
            "shots",
            "epochs",
            "steps",
            "batch_size",
            "accumulate",
            "lr",
            "eps",
            "clip",
            "log_every",
            "lora_alpha",
        ):
            if values[name] is not None and not (math.isfinite(values[name]) and values[name] > 0):
                raise TrainingError(f"{name} {values[name]!r}: expected a positive number")
        for name, most in (("epochs", 10**6), ("steps", 10**9)):
            if (values[name] or 0) > most:
                raise TrainingError(f"{name} {values[name]!r}: expected a number up to {most:,}")
        counts = ("warmup", "freeze_layers", "lora_rank", "eval_every", "save_every", "keep_every", "workers", "seed")
        for name in ("objective_weight", "weight_decay", *counts):
            if not (math.isfinite(values[name]) and values[name] >= 0):
                raise TrainingError(f"{name} {values[name]!r}: expected zero or more")
        for name in ("label_smoothing", "ema_decay"):
            if not 0 <= values[name] < 1:
                raise TrainingError(f"{name} {values[name]!r}: expected a number in [0, 1)")
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
                f"train {', '.join(found)}: not a part of the objective {self.objective}; it trains "
                f"{', '.join(part for part in PARTS if part not in useless)}"
            )
        if not contrastive and (self.eval_templates or self.eval_names):
            raise TrainingError("eval_templates and eval_names belong to the objective contrastive; leave them out")
        if contrastive and self.label_smoothing:
            raise TrainingError("label_smoothing belongs to the objective cross_entropy; leave it out")
        if contrastive and "logit_distillation" in self.regularizers:
            raise TrainingError("logit_distillation needs a head; take the objective cross_entropy, or `car`")
        if self.head == "zeros" and "logit_distillation" in self.regularizers:
            raise TrainingError(
                "logit_distillation with head 'zeros': the initial model gives every class the same probability, and "
                "the trained one would be pulled there; expected a head that predicts something: zero_shot, ridge, "
                "logistic or a file, or take feature_distillation"
            )

    def _check_lora(self) -> None:
        wrong = [target for target in self.lora_targets if target not in LORA_TARGETS]
        if wrong or not self.lora_targets:
            raise TrainingError(f"lora_targets {wrong}: expected some of {', '.join(LORA_TARGETS)}")
        if not self.lora_rank:
            if self.lora_alpha is not None or self.lora_tower != "trained":
                raise TrainingError("lora_alpha and lora_tower belong to LoRA; give lora_rank too")
            return
        wanted = {"trained": (), "both": ("image", "text")}.get(self.lora_tower, (self.lora_tower,))
        if missing := [tower for tower in wanted if tower not in self.train]:
            raise TrainingError(
                f"lora_tower {self.lora_tower}: the {missing[0]} tower is not trained ({', '.join(self.train)}); take "
                "a tower that is, or the objective contrastive, which trains both"
            )
        if not self.lora_towers:
            raise TrainingError(f"lora_rank {self.lora_rank}: no tower is trained ({', '.join(self.train)}); train one")
        if "l2sp" in self.regularizers:
            raise TrainingError(
                "l2sp pulls parameters to their initial values, which LoRA does not train; leave it out"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Options from a recipe or from the record of a run.

        Raises
        ------
        TrainingError
            An unknown option, or a value that is not allowed.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise TrainingError(f"unknown options {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        try:
            return cls(**check_record(dict(values), get_type_hints(cls), "options"))
        except TrainingError:
            raise
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able inverse of `from_dict`."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


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

    Raises
    ------
    TrainingError
        The text has another form.

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


def _value(text: str) -> object:
    try:
        return json_value(text)
    except ValueError:
        return text
