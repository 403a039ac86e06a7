"""Near-duplicates between two splits: test images that are also in training make every head look better."""

from typing import Any

import numpy as np

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import FeatureTable
from heads.rows.samples import Features, refuse_tokens
from heads.search.exact import ExactIndex

Pair = dict[str, Any]
SAMPLED = 2_000
"""Maximum number of training rows from which `near_threshold` is estimated."""
CLOSEST = 0.999
"""Upper limit of `near_threshold`: the cosine of one image that was encoded twice."""


def leaks(train: FeatureTable, test: FeatureTable, threshold: float | None = None, per_row: int = 5) -> list[Pair]:
    """Pairs of a test and a training row whose cosine is at least `threshold`, most similar first.

    Parameters
    ----------
    train, test : image stores of one encoder
    threshold
        Smallest cosine in [-1, 1]. The default depends on the encoder and the training rows: `near_threshold`. The same
        image encoded twice has 0.999 and more.
    per_row : largest number of pairs per test row

    Returns
    -------
    Rows with ``test_row``, ``train_row`` (rows of the stores), ``similarity``, ``test_class``, ``train_class`` (names),
    and ``test_id``, ``train_id`` where the stores have sample ids.

    Raises
    ------
    MismatchError
        If the stores have different encoders.
    HeadError
        For a threshold outside of [-1, 1], or `per_row` below 1.
    """
    if not (threshold is None or -1 <= threshold <= 1) or per_row < 1:
        raise HeadError(f"threshold {threshold} and per_row {per_row}; expected a cosine from -1 to 1, and at least 1")
    refuse_tokens(train, "duplicates are found by one vector per image")
    if train.encoder_key != test.encoder_key:
        raise MismatchError(
            f"{train.name!r} has features of encoder {train.encoder_key} and {test.name!r} of {test.encoder_key}; "
            "encode both with one model"
        )
    features, labels = train.numpy(np.float16)
    index = ExactIndex(features, cosine=True)
    threshold = _near(index, features) if threshold is None else threshold
    train_rows, test_rows = np.flatnonzero(train.valid), np.flatnonzero(test.valid)
    found: list[Pair] = []
    done = 0
    for block, block_labels in test.blocks():
        cosines, rows = index.search(block, min(per_row, len(labels)))
        for i, j in np.argwhere(cosines >= threshold).tolist():
            near = int(rows[i, j])
            pair: Pair = {
                "test_row": int(test_rows[done + i]),
                "train_row": int(train_rows[near]),
                "similarity": float(cosines[i, j]),
                "test_class": str(test.classnames[block_labels[i]]),
                "train_class": str(train.classnames[labels[near]]),
            }
            found.append(pair)
        done += len(block_labels)
    for side, store in (("test", test), ("train", train)):
        ids = store.ids
        if ids:
            for pair in found:
                pair[f"{side}_id"] = ids[pair[f"{side}_row"]]
    return sorted(found, key=lambda pair: -pair["similarity"])


def near_threshold(train: FeatureTable) -> float:
    """The cosine from which `leaks` takes two images for near-duplicates, relative to the spread of the features.

    ``1 - d / 4``, at most 0.999, with d the median of ``1 - cosine`` between a training row and its nearest other one.
    Models differ in how far apart they put different images: a fixed cosine of 0.95 would take most test images of a
    homogeneous data set for duplicates. On drawn shapes and on digits under ``tiny``, the same image after JPEG
    compression (quality 90) or resizing lies closer than d / 4, and 0 and 2% of the other test images do.
    """
    features, _ = train.numpy(np.float16)
    return _near(ExactIndex(features, cosine=True), features)


def _near(index: ExactIndex, features: Features) -> float:
    """`near_threshold` of rows and their index, from at most `SAMPLED` rows spread over them."""
    if len(features) < 2:
        return CLOSEST
    rows = np.linspace(0, len(features) - 1, min(SAMPLED, len(features))).round().astype(np.int64)
    cosines, _ = index.search(features[rows].astype(np.float32), 2)  # the nearest is the row itself, or its copy
    return min(1 - float(np.median(1 - cosines[:, 1])) / 4, CLOSEST)
