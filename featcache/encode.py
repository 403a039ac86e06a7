"""Data set x encoder -> image store.

A finished store with the same keys is a hit and no image is opened. Otherwise the chunks without a marker are encoded,
whole chunk by whole chunk (see `image_job`).
"""

import time
from dataclasses import dataclass
from typing import Any

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.encode_options import EncodeOptions, Share
from featcache.encoders import Encoder, load_encoder
from featcache.image_hit import encode_changed, relabel
from featcache.image_job import ImageJob
from featcache.progress import Progress, Silent
from featcache.store import ImageStore, open_image_store, resolve_root
from featcache.store.places import StorePath

__all__ = ["EncodeOptions", "EncodeResult", "Share", "encode", "encode_dataset"]


@dataclass(frozen=True)
class EncodeResult:
    """What an encode run did: `hit` means that no image was opened; `copied_rows` came from other stores."""

    store: ImageStore
    hit: bool
    encoded_rows: int
    relabelled: bool
    seconds: float
    copied_rows: int = 0


def encode(
    data: str | Dataset,
    split: str = "train",
    model: str | Encoder = "tiny",
    pretrained: str | None = None,
    *,
    root: str | StorePath | None = None,
    labels: str = "names",
    device: str | None = None,
    precision: str = "fp32",
    preprocess: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ImageStore:
    """Encode a split of a data set, or find it in the cache.

    Parameters
    ----------
    data : str or Dataset
        ``digits``, ``imagefolder:DIR``, ``list:FILE``, ``arrays:DIR``; see `featcache.datasets`.
    split : str
        Name of the split (ignored where `data` is a Dataset).
    model : str or Encoder
        ``tiny``, an open_clip architecture, ``local-dir:FOLDER``; see `featcache.encoders`.
    pretrained : str, optional
        open_clip tag or checkpoint file.
    root : str, Path or ObjectPath, optional
        Folder or ``s3://bucket/prefix`` of all stores, default ``$FEATCACHE_ROOT``, else ``./cache``.
    labels : {"names", "int"}
        What the labels of a list file are.
    device, precision, preprocess
        See `featcache.encoders.load_encoder`; they do nothing where `model` is an Encoder.
    **options
        Fields of `EncodeOptions`.

    Returns
    -------
    ImageStore
        Features (N, D) with sample i in row i.

    Raises
    ------
    FeatcacheError
        DatasetError, ImageReadError, EncoderError, LabelsChangedError, ContentChangedError, StoreWriteError, or
        ShardDoneError where only a part was asked for.
    """
    dataset = open_dataset(data, split, labels=labels) if isinstance(data, str) else data
    if isinstance(model, str):
        model = load_encoder(model, pretrained, device=device, precision=precision, preprocess=preprocess)
    return encode_dataset(dataset, model, root=root, options=EncodeOptions(**options), progress=progress).store


def encode_dataset(
    dataset: Dataset,
    encoder: Encoder,
    *,
    root: str | StorePath | None = None,
    options: EncodeOptions | None = None,
    progress: Progress | None = None,
) -> EncodeResult:
    """`encode` for an opened data set and a loaded encoder, with an account of what was done."""
    job = ImageJob(dataset, encoder, resolve_root(root), options or EncodeOptions(), progress or Silent())
    began = time.perf_counter()
    store = job.finished_store()
    hit, relabelled = store is not None, False
    if store is None:
        store, encoded = job.run()
    else:
        encoded = encode_changed(job, store)
        relabelled = relabel(job, store)
        if options and options.parts and job.outputs().unfinished():
            encoded += job.run()[1]
        store = open_image_store(job.path)
    seconds = time.perf_counter() - began
    return EncodeResult(store, hit and not encoded + job.copied, encoded, relabelled, seconds, job.copied)
