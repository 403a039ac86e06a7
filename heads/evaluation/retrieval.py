"""Image-text retrieval: recall@k in both directions, from stored features.

The rank of an image is that of its best caption among all captions, the rank of a caption that of its image among all
images; recall@k is the share of ranks below k (Karpathy & Fei-Fei 2015; CLIP's Flickr30k and MSCOCO tables). Ties go to
the lower index, so that a model that maps everything to one point retrieves only the first item.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import FeatcacheWarning, HeadError, MismatchError
from featcache.store.protocol import FeatureTable, TextSource
from heads.evaluation.metrics import Row
from heads.fitted.provenance import check_text_tower
from heads.kernels.problem import Values
from heads.rows.arrays import to_numpy
from heads.solvers.edges import callers_level

_CELLS = 1 << 24  # similarities in memory at a time: 64 MiB in float32

Int64 = NDArray[np.int64]


def retrieval_ranks(images: Values, captions: Values, owners: Values) -> tuple[Int64, Int64]:
    """Ranks of each image's best caption and of each caption's image, by inner product.

    Parameters
    ----------
    images : (N, D) array or tensor
        L2-normalised, so that inner products are cosines (lengths that differ give a FeatcacheWarning); the work is
        done on its device, in float32.
    captions : (M, D), normalised
    owners : (M,) row of `images` that each caption describes

    Returns
    -------
    ranks (N,) of images, 0 is best, -1 for an image without a caption; ranks (M,) of captions. With
    ``s = images @ captions.T``, a caption's rank is the position of its owner in
    ``np.argsort(-s[:, j], kind="stable")``.

    Raises
    ------
    HeadError
        For wrong shapes, owners out of range, or features that are not finite.

    Examples
    --------
    >>> [ranks.tolist() for ranks in retrieval_ranks(np.eye(2), [[1, 0], [0, 1], [1, 0]], [0, 1, 1])]
    [[0, 0], [0, 0, 1]]
    """
    X = _features(images, "images")
    T = _features(captions, "captions").to(X.device)
    rows = to_numpy(owners)
    if X.shape[1] != T.shape[1] or rows.shape != (len(T),) or rows.dtype.kind not in "iu":
        raise HeadError(
            f"images {tuple(X.shape)}, captions {tuple(T.shape)} and owners {rows.dtype} {rows.shape} do not match; "
            "expected (N, D), (M, D) and (M,) row indices"
        )
    if not 0 <= rows.min() <= rows.max() < len(X):
        raise HeadError(f"owners lie in [{rows.min()}, {rows.max()}], expected rows 0 to {len(X) - 1} of the images")
    own = _own_captions(rows.astype(np.int64), len(X))
    return _ranks(X, T, own), _ranks(T, X, rows.astype(np.int64)[:, None])


def retrieve(images: FeatureTable, texts: TextSource, ks: Sequence[int] = (1, 5, 10)) -> Row:
    """Recall@k of an image store with the captions in a text store, as one results row.

    Parameters
    ----------
    images : image store
    texts : text store of the same model, with the images' sample ids as classes and their captions as prompts
        (``featcache text`` with a prompt file ``{id: [caption, ...]}``). Captions of unreadable images are left out;
        images without a caption stay in the gallery.
    ks : values of k

    Returns
    -------
    ``"<name>:image_to_text_recall@<k>"``, ``"<name>:text_to_image_recall@<k>"`` (fractions), and counts ``images``,
    ``captions``, ``images_without_caption``.

    Raises
    ------
    MismatchError
        If the texts belong to another text tower, or name an image that the store lacks.
    HeadError
        If no caption is left, or a k is not a positive number.
    """
    if not ks or any(k < 1 for k in ks):
        raise HeadError(f"got k = {list(ks)}, expected positive numbers")
    check_text_tower(repr(texts.name), texts.text_digest, images)
    X, _ = images.numpy()
    captions, owners = captions_of(images, texts)
    of_images, of_captions = retrieval_ranks(X, captions, owners)
    asked = of_images[of_images >= 0]
    row: Row = {"head": "retrieval", "encoder": images.encoder_name, "texts": texts.name}
    row |= {"images": len(X), "captions": len(owners), "images_without_caption": len(X) - len(asked)}
    for way, ranks in (("image_to_text", asked), ("text_to_image", of_captions)):
        row |= {f"{images.name}:{way}_recall@{k}": float((ranks < k).mean()) for k in ks}
    return row


def captions_of(images: FeatureTable, texts: TextSource) -> tuple[NDArray[np.float32], Int64]:
    """Captions (M, D) of a text store, and the valid row (M,) of the image store that each describes.

    MismatchError if a class of the texts is not a sample id of the images, HeadError if no caption describes a readable
    image.
    """
    places = {sample: row for row, sample in enumerate(images.ids)}
    if unknown := [name for name in texts.classnames if name not in places]:
        raise MismatchError(
            f"{len(unknown)} classes of texts/{texts.name} are no sample ids of {images.name}/{images.split} "
            f"({', '.join(unknown[:3])}); name the image of each caption, such as {images.ids[0]}"
        )
    valid = np.asarray(images.valid, bool)
    position = np.where(valid, np.cumsum(valid) - 1, -1)  # of a row among the valid ones
    owners = position[[places[name] for name in texts.classnames]]
    counts, raw = np.asarray(texts.counts), np.asarray(texts.raw)
    present = (np.arange(raw.shape[1]) < counts[:, None]) & (owners >= 0)[:, None]
    if not present.any():
        raise HeadError(f"{texts.name!r} has no caption of an image of {images.name!r} that could be read")
    return raw[present], np.repeat(owners, present.sum(axis=1)).astype(np.int64)


def _features(value: Values, what: str) -> torch.Tensor:
    rows = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(to_numpy(value).astype(np.float32))
    rows = rows.float()
    if rows.ndim != 2 or not len(rows):
        raise HeadError(f"{what} are {tuple(rows.shape)}, expected (rows, D) with at least one row")
    if not bool(torch.isfinite(rows).all()):
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero()[:10, 0].tolist()
        raise HeadError(f"{what} hold NaN or infinity, for instance in rows {bad}; drop these rows")
    shortest, longest = map(float, rows.norm(dim=1).aminmax())
    if longest > 1.01 * shortest:  # rounding to float16 changes a length by less
        warnings.warn(
            f"{what} have lengths from {shortest:.3g} to {longest:.3g}: ranks are by inner product, in which long rows "
            "come first; divide rows by their lengths for cosines",
            FeatcacheWarning,
            stacklevel=callers_level(),
        )
    return rows


def _own_captions(owners: Int64, n_images: int) -> Int64:
    """Captions of each image in ascending order, (N, most captions), -1 where it has fewer."""
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=n_images)
    own = np.full((n_images, int(counts.max())), -1, np.int64)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    own[owners[order], within] = order
    return own


def _ranks(queries: torch.Tensor, gallery: torch.Tensor, own: Int64) -> Int64:
    """Rank (Q,) of the best own row of each query in the gallery, -1 for a query without any."""
    found, size = np.empty(len(queries), np.int64), max(1, _CELLS // len(gallery))
    places, targets = torch.arange(len(gallery), device=queries.device), torch.from_numpy(own).to(queries.device)
    lowest = torch.tensor(-torch.inf, device=queries.device)
    for start in range(0, len(queries), size):
        mine = targets[start : start + size]
        similarity = queries[start : start + size] @ gallery.T
        values = torch.where(mine >= 0, similarity.gather(1, mine.clamp(min=0)), lowest)
        best = values.amax(dim=1, keepdim=True)
        tied = torch.where(values == best, mine, len(gallery))
        target = tied.amin(dim=1, keepdim=True)
        ahead = (similarity > best).sum(1) + ((similarity == best) & (places < target)).sum(1)
        found[start : start + size] = torch.where(mine[:, 0] >= 0, ahead, -1).cpu().numpy()
    return found
