"""pm-k accuracy of video frames (Shankar et al., "Do Image Classifiers Generalize Across Time?", arXiv 1906.02168).

An anchor frame comes with the frames up to k before and after it. pm-0 is the share of anchors predicted correctly;
pm-k is the share of anchors for which all frames of the set, including the anchor, are predicted correctly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.store.protocol import FeatureTable
from heads.evaluation.metrics import Row
from heads.evaluation.passes import Job, all_logits, valid_rows
from heads.rows.samples import to_numpy

ANCHOR, ALSO = "anchor", "also"
"""Columns of a store of frames, space-separated: anchors of the sets that contain the frame; further labels."""


def has_frames(store: FeatureTable) -> bool:
    """Whether a store contains sets of frames."""
    return {ANCHOR, ALSO} <= set(store.metadata)


def frame_results(jobs: Sequence[Job], store: FeatureTable) -> list[Row]:
    """``pm0`` and ``pm10`` of each head on a store of frames; the sets reach up to 10 frames from their anchors.

    A frame is correct if the predicted class is one of its labels. Sets with an unreadable anchor are left out, as are
    unreadable frames.
    """
    rows = valid_rows(store)
    right = np.stack(_right(jobs, store, rows))
    ids = [store.ids[row] for row in rows]
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for anchor in str(store.metadata[ANCHOR][row]).split():
            members.setdefault(anchor, []).append(place)
    place_of = {sample: place for place, sample in enumerate(ids)}
    anchors = [anchor for anchor in members if anchor in place_of]
    alone = right[:, [place_of[anchor] for anchor in anchors]]
    whole = np.stack([right[:, members[anchor]].all(axis=1) for anchor in anchors], axis=1)
    return [{"pm0": float(alone[h].mean()), "pm10": float(whole[h].mean())} for h in range(len(jobs))]


def _right(jobs: Sequence[Job], store: FeatureTable, rows: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """(N',) for each head: whether the predicted class of a valid row is one of its labels."""
    predicted = [
        np.concatenate(blocks)
        for blocks in zip(
            *([z.argmax(1) for z in all_logits(jobs, to_numpy(X))] for X, _ in store.blocks()), strict=True
        )
    ]
    positions = jobs[0].positions(np.asarray(store.labels)[rows], store)
    right = [found == positions for found in predicted]
    for place, row in enumerate(rows):
        further = [int(label) for label in str(store.metadata[ALSO][row]).split()]
        for label in jobs[0].positions(np.array(further, np.int64), store) if further else ():
            for head, found in zip(right, predicted, strict=True):
                head[place] |= found[place] == label
    return right
