"""A table of backbones by domains: one head with several encoders on every domain of a data set; missing stores are
encoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.datasets import Dataset, open_datasets
from featcache.encoders import Encoder
from featcache.encoding.images import encode_dataset
from featcache.encoding.options import EncodeOptions
from featcache.encoding.texts import embed_prompts
from featcache.errors import HeadError
from featcache.progress import Progress, counted, format_seconds
from featcache.store import ImageStore
from heads.estimators.catalogue import head_class, make_head
from heads.estimators.fit import Material, fit_head
from heads.evaluation.evaluate import evaluate
from heads.evaluation.metrics import Row
from heads.fitted.base import as_head

PICTURE = "picture"
Load = Callable[[str], Encoder]
Say = Callable[[str], None]


@dataclass(frozen=True)
class BackbonePlan:
    """The encoders, data sets and head of a table of backbones.

    HeadError for no data or no models, an unknown head or parameter, missing training rows, or training rows that the
    head does not use.

    Attributes
    ----------
    head : a head that needs only texts, such as ``zero_shot``, or with `train` one that is fitted on images
    data : sources; each gets a table, with a column per domain of a collection
    models : model names, one line each
    split : split of every domain
    templates : template set or file; class names are the names of the folders
    train : source and split of the training rows
    parameters : parameters of the head
    """

    head: str
    data: Sequence[str]
    models: Sequence[str]
    split: str = "all"
    templates: str = PICTURE
    train: tuple[str, str] | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data or not self.models:
            raise HeadError(f"{len(self.data)} data sets and {len(self.models)} models; name at least one of each")
        make_head(self.head, dict(self.parameters))  # refuses what is not allowed, before anything is encoded
        on_images = head_class(self.head).fits_on == "images"
        if on_images and self.train is None:
            raise HeadError(f"{self.head} fits from labelled rows; name them with --train DATA:SPLIT")
        if not on_images and self.train is not None:
            raise HeadError(f"{self.head} fits from texts alone; leave --train out")


@dataclass(frozen=True)
class BackboneTable:
    """Results on one source.

    Attributes
    ----------
    title : name of the collection, or of its only data set
    domains : names of the data sets, in order
    models : as they were named, in order
    rows : one per model, as `heads.evaluate` gives them, with ``model``
    """

    title: str
    domains: tuple[str, ...]
    models: tuple[str, ...]
    rows: list[Row]

    def values(self, metric: str = "top1") -> list[list[float]]:
        """The metric of each model on every domain, followed by the unweighted mean if there are several domains."""
        found = [[float(row[f"{name}:{metric}"]) for name in self.domains] for row in self.rows]
        return [[*line, sum(line) / len(line)] if len(line) > 1 else line for line in found]

    @property
    def columns(self) -> list[str]:
        """Short names of the domains, and ``avg``."""
        prefix = f"{self.title}-"
        names = [name.removeprefix(prefix) for name in self.domains]
        return [*names, "avg"] if len(names) > 1 else names


def backbone_tables(
    plan: BackbonePlan,
    load: Load,
    *,
    root: str | Path | None = None,
    options: EncodeOptions | None = None,
    progress: Progress | None = None,
    done: Callable[[Row], None] = lambda row: None,
    say: Say = lambda line: None,
) -> list[BackboneTable]:
    """Encode missing stores, fit and evaluate with every model; one table per source.

    DatasetError, EncoderError, HeadError, MismatchError from data sets, encoders and heads; stores and rows finished
    before are kept.

    Parameters
    ----------
    plan : BackbonePlan
    load : returns the encoder of a model name
    root, options, progress : as in `featcache.encode_dataset`
    done : called with each row as soon as it is computed
    say : called with a line of text per model and source
    """
    sources = [open_datasets(spec, plan.split) for spec in plan.data]
    train = None if plan.train is None else open_datasets(*plan.train)
    rows: list[list[Row]] = [[] for _ in sources]
    for model in plan.models:
        encoder = load(model)

        def stores(datasets: Sequence[Dataset], encoder: Encoder = encoder) -> list[ImageStore]:
            found = [encode_dataset(one, encoder, root=root, options=options, progress=progress) for one in datasets]
            fresh = sum(result.encoded_rows for result in found)
            seconds = format_seconds(sum(result.seconds for result in found))
            if datasets:
                say(f"{encoder.name}: {counted(len(found), 'data set')}, {counted(fresh, 'image')} encoded, {seconds}")
            return [result.store for result in found]

        for place, datasets in enumerate(sources):
            names = [dataset.name for dataset in datasets]  # the stores may have others
            row = _row(plan, encoder, stores(datasets), names, stores(train or []), root) | {"model": model}
            rows[place].append(row)
            done(row)
    return [
        BackboneTable(_title(spec, datasets), tuple(one.name for one in datasets), tuple(plan.models), found)
        for spec, datasets, found in zip(plan.data, sources, rows, strict=True)
    ]


Stores = Sequence[ImageStore]


def _row(
    plan: BackbonePlan, encoder: Encoder, stores: Stores, names: Sequence[str], train: Stores, root: str | Path | None
) -> Row:
    """Evaluate the head with one encoder on every domain."""
    if len(train) > 1:
        raise HeadError(f"--train names {len(train)} data sets ({', '.join(s.name for s in train)}); add ,domain=NAME")
    kind = head_class(plan.head)
    texts = []
    if kind.fits_on == "texts" or kind.takes_texts:
        classes = stores[0].classnames
        texts = [embed_prompts(classes, plan.templates, encoder, name=stores[0].name, root=root).store]
    material = Material(train=train[0] if train else None, texts=texts)
    head = as_head(fit_head(plan.head, material, dict(plan.parameters)))
    (row,) = evaluate([head], stores, names=names)
    return row


def _title(spec: str, datasets: Sequence[Dataset]) -> str:
    """The common prefix of the domain names, or the source."""
    names = [dataset.name for dataset in datasets]
    if len(names) == 1:
        return names[0]
    first = names[0].partition("-")[0]
    return first if all(name.startswith(f"{first}-") for name in names) else spec
