"""`featcache.encode`: names and objects of all kinds, opened and encoded into an image store."""

import warnings
from typing import Any, cast

import torch

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.datasets.holdout import Holdout, divided, holdout_options
from featcache.datasets.sources.held import Held, as_dataset, is_dataset
from featcache.encoders import Encoder, load_encoder
from featcache.encoders.modules import ModuleEncoder
from featcache.encoding.images import encode_dataset
from featcache.encoding.options import EncodeOptions
from featcache.errors import DatasetError, EncoderError, FeatcacheWarning
from featcache.progress import Progress, as_progress
from featcache.store import ImageStore
from featcache.store.places import StorePath

LOADING = ("device", "precision", "preprocess", "transform", "digest")
HELD = ("classnames", "image", "label", "id", "metadata", "holdout")


def encode(
    data: Held,
    split: str | None = None,
    model: str | Encoder | torch.nn.Module = "tiny",
    pretrained: str | None = None,
    *,
    root: str | StorePath | None = None,
    labels: object = "names",
    name: str | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> ImageStore:
    """Encode a split of a data set, or find it in the cache: features (N, D) with sample i in row i.

    Parameters
    ----------
    data : ``source:argument``, or a data set in memory
        ``digits``, ``imagefolder:DIR``, ``list:FILE``, ``arrays:DIR`` (see `featcache.datasets`); a Hugging Face data
        set, or a DatasetDict; a torch data set of (image, label); a list of PIL images, uint8 arrays or paths, with
        `labels`, or as a pair ``(pictures, labels)`` (see `featcache.datasets.sources.held`); a
        `featcache.datasets.Dataset`. Data in memory are identified by content.
    split : name of the split; default: that of a data set in memory, else ``train``
    model : ``tiny``, an open_clip architecture, ``local-dir:FOLDER`` (see `featcache.encoders`); or a module with
        ``transform=``, identified by its weights and the transform (see `featcache.encoders.modules`)
    pretrained : open_clip tag or checkpoint file
    root : folder or ``s3://bucket/prefix`` of all stores; default: ``$FEATCACHE_ROOT``, else ``./cache``
    labels : {"names", "int"}, or sequence of N int or str
        The kind of labels in a list file; the labels of a list of pictures.
    name : name of the data set in listings and results; by default that of its folder or file. A store that holds these
        samples already keeps its name, with a warning (``featcache rename`` changes it).
    progress : True shows progress on stderr or in the notebook
    **options
        ``device``, ``precision``, ``preprocess`` (see `featcache.encoders.load_encoder`; ignored if `model` is an
        Encoder; by default the preparation that the data set has gone through); ``transform`` and ``digest`` of a
        module; ``classnames``, and the columns ``image``, ``label``, ``id`` and ``metadata`` of a Hugging Face data
        set; ``holdout``, the share of data without splits that becomes ``test``; and the fields of `EncodeOptions`.

    Raises
    ------
    FeatcacheError
        DatasetError, ImageReadError, EncoderError, LabelsChangedError, ContentChangedError, StoreWriteError, or
        ShardDoneError if only a share was asked for.
    """
    loading = {option: options.pop(option) for option in LOADING if option in options}
    held = {option: options.pop(option) for option in HELD if option in options}
    if name is not None and is_dataset(data):
        raise DatasetError(
            f"name={name!r}: this data set is called {data.name}; leave name out, or rename the data set"
        )
    dataset = _dataset(data, split, labels, name, held)
    encoder = _encoder(model, pretrained, loading, dataset.prepared)
    chosen, shown = EncodeOptions(**options), as_progress(progress)
    store = encode_dataset(dataset, encoder, root=root, options=chosen, progress=shown).store
    if name is not None and (store.name, store.split) != (dataset.name, dataset.split):
        warnings.warn(
            f"{dataset.name}/{dataset.split}: the store of these samples has the name {store.name}/{store.split} and "
            f"keeps it; to change it: featcache rename {store.reference} {dataset.name}/{dataset.split}",
            FeatcacheWarning,
            stacklevel=2,
        )
    return store


def _dataset(data: Held, split: str | None, labels: object, name: str | None, held: dict[str, Any]) -> Dataset:
    share = held.pop("holdout", None)
    if isinstance(data, str):
        if held:
            raise DatasetError(f"{', '.join(held)}: for data in memory; write options of {data} behind it")
        return open_dataset(data + holdout_options(share), split or "train", labels=cast(str, labels), name=name)
    if share is None:
        return as_dataset(data, split, labels=labels, name=name, **held)
    whole = as_dataset(data, labels=labels, name=name, **held)
    return divided(whole, split or "train", Holdout(share))


def _encoder(
    model: str | Encoder | torch.nn.Module, pretrained: str | None, loading: dict[str, Any], prepared: str | None
) -> Encoder:
    """The encoder of a name or a module; any other object is taken to be an encoder."""
    if isinstance(model, str):
        if unused := ", ".join(option for option in ("transform", "digest") if option in loading):
            raise EncoderError(f"{unused}: for a torch module; {model} has its own preparation: leave it out")
        loading.setdefault("preprocess", prepared)
        return load_encoder(model, pretrained, **loading)
    if isinstance(model, torch.nn.Module):
        if loading.pop("preprocess", None) is not None or pretrained is not None:
            raise EncoderError("preprocess and pretrained are for models by name; a module has weights and transform=")
        return ModuleEncoder(model, **loading)
    return model
