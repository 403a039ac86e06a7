"""``ytbb-robust:DIR``: YTBB-Robust (Shankar et al., arXiv 1906.02168), 23 classes, sets of nearby video frames.

DIR is ``ytbb-robust``, or a folder with it: ``ytbb_videos/<video>_<ms>/frame-<number>.jpg``. There is one split,
``test``. The labels are the five files of `FILES`, which WiSE-FT and the ImageNet testbed keep beside their code, in
``ytbb-robust_metadata``: put that folder, or its files, into DIR, or name it: ``ytbb-robust:DIR,labels=FOLDER``.

Samples. The anchor frames that reviewers marked as good, and of the up to 10 frames before and after each those that
they marked as similar to it; ids are paths below ``ytbb_videos``. A frame has the labels of its anchor: the video's
first, then those that reviewers added. Each counts as correct.

Classes. Those of YouTube-BoundingBoxes in label order, without ``none``. Cow, giraffe, skateboard and toilet have no
counterpart in ImageNet: a head over ImageNet never predicts them, and their frames count as wrong, as in WiSE-FT.

Metadata columns: ``anchor`` and ``also``, as in `vid_robust`.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, sizes_and_stamps
from featcache.datasets.options import WHOLE, SourceOptions
from featcache.errors import DatasetError
from featcache.prompts.text_files import json_object, read_lines

NAME = "YTBBRobust"
"""Default name, as in WiSE-FT's results."""
PLACES = ("", "ytbb-robust", "imagenet_vid_ytbb_robust/ytbb-robust")
VIDEOS = "ytbb_videos"
CLASSES, GROUPS = "ytbb_class_index.json", "rev_class_idx_map.json"
ANCHORS, PAIRS, VIDEO_LABELS = "anchor_labels.json", "pmk_labels.json", "ytbb_robustness_test_anchors_full.csv"
FILES = (CLASSES, GROUPS, ANCHORS, PAIRS, VIDEO_LABELS)
LABEL_PLACES = ("", "metadata", "ytbb-robust_metadata")
NONE = "none"
NUMBERED_OTHERWISE = {22: "car", 23: NONE}
"""Classes that `VIDEO_LABELS` numbers differently from `CLASSES`."""
PROBLEMS = frozenset(
    (
        *("dissimilar", "problematic", "incorrect", "dont know", "bad-anchor"),
        *("deformation", "background-change", "occlusion-increased", "blur-increase"),
    )
)
"""Marks of frame pairs that are left out."""
BAD_ANCHOR = "bad-anchor"
REACH = 10
FRAME = re.compile(r"([^/\s]+_\d+)/frame-(\d+)\.jpg")
Annotations = dict[str, list[str]]


@dataclass(frozen=True)
class YtbbOptions(SourceOptions):
    """Options of ``ytbb-robust:``.

    Parameters
    ----------
    labels : folder of the label files (default: they are in the folder of the data)
    """

    labels: str | None = None


def open_ytbb_robust(argument: str, split: str, options: YtbbOptions, *, name: str | None = None) -> ImageFiles:
    """Open YTBB-Robust."""
    folder, notes = folders_of(argument, options)
    if split not in ("test", WHOLE):
        raise DatasetError(f"{folder}: no split {split!r}; expected test")
    classnames = ytbb_classes(notes)[0]
    good = _good_anchors(notes)
    sets, known = _frame_sets(notes, good), _labels(notes, good, classnames)
    owner = {frame: anchor for anchor, frames in sets.items() for frame in frames}
    keys = sorted(owner)
    files = sizes_and_stamps(folder, keys, folder, "restore them")
    further = [known[owner[key]][1:] for key in keys]
    metadata = {
        "anchor": [owner[key] for key in keys],
        "also": [" ".join(map(str, found)) for found in further],
    }
    targets = [known[owner[key]][0] for key in keys]
    return files_below(name or NAME, split, file_index(keys, files, targets, classnames, metadata), folder)


def folders_of(place: str, options: YtbbOptions) -> tuple[Path, Path]:
    """The folders of the videos and of the labels; DatasetError if one is missing."""
    base = local_path("ytbb-robust", place)
    inner = next((base / place for place in PLACES if (base / place / VIDEOS).is_dir()), None)
    if inner is None:
        raise DatasetError(f"{base}: no {VIDEOS} in it; expected ytbb-robust: check the path")
    candidates = [local_path("labels", options.labels)] if options.labels else [inner / place for place in LABEL_PLACES]
    notes = next((found for found in candidates if (found / PAIRS).is_file()), None)
    if notes is None:
        raise DatasetError(
            f"{candidates[0]}: no {PAIRS} in it; expected a folder with {', '.join(FILES)}: name it, "
            f"ytbb-robust:{place},labels=FOLDER"
        )
    return inner / VIDEOS, notes


def ytbb_classes(notes: Path) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The class names in label order, and for each class its indices among ImageNet's 1,000, if any."""
    names, groups = json_object(notes / CLASSES, str), json_object(notes / GROUPS, list)
    try:
        kept = {number: names[str(number)] for number in range(len(names)) if names[str(number)] != NONE}
        return tuple(kept.values()), tuple(tuple(map(int, groups.get(str(number), ()))) for number in kept)
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{notes}: {CLASSES} and {GROUPS} do not match ({error}); restore them") from error


def _frame_sets(notes: Path, good: Annotations) -> dict[str, list[str]]:
    """Anchor -> the frames of its set, itself first; anchors that a pair marks as bad are left out."""
    pairs = _annotations(notes / PAIRS)
    bad = {_key(pair.partition(",")[0]) for pair, marks in pairs.items() if BAD_ANCHOR in marks}
    sets: dict[str, list[str]] = {}
    videos: set[str] = set()
    for anchor in (key for key in good if key not in bad):
        found = FRAME.fullmatch(anchor)
        if found is None:
            raise DatasetError(f"{notes / ANCHORS}: {anchor!r}; expected VIDEO_MS/frame-NUMBER.jpg: restore the file")
        video, number = found[1], int(found[2])
        if video in videos:
            raise DatasetError(f"{notes / ANCHORS}: {video} has two anchors; expected one: restore the file")
        videos.add(video)
        near = [f"{video}/frame-{number + step}.jpg" for step in range(-REACH, REACH + 1) if step]
        marked = {frame: set(pairs.get(f"{anchor},{frame}", ())) for frame in near}
        sets[anchor] = [
            anchor,
            *(frame for frame, marks in marked.items() if "similar" in marks and not marks & PROBLEMS),
        ]
    if not sets:
        raise DatasetError(f"{notes / ANCHORS}: no anchor is labelled good; restore the file")
    return sets


def _labels(notes: Path, good: Annotations, classnames: Sequence[str]) -> dict[str, list[int]]:
    """Anchor -> its class indices: the video's first, then those that reviewers added, in label order."""
    place = {name: number for number, name in enumerate(classnames)}
    numbered = {int(number): name for number, name in json_object(notes / CLASSES, str).items()} | NUMBERED_OTHERWISE
    try:
        rows = list(csv.DictReader(read_lines(notes / VIDEO_LABELS), strict=True))
        video = {f"{row['ytid']}_{row['time_ms']}": numbered[int(row["label"])] for row in rows}
        first = {anchor: place[video[anchor.partition("/")[0]]] for anchor in good}
    except (csv.Error, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{notes / VIDEO_LABELS}: no label of a video ({error}); restore the file") from error
    added = {anchor: {place[mark] for mark in marks if mark in place} for anchor, marks in good.items()}
    return {anchor: [own, *sorted(added[anchor] - {own})] for anchor, own in first.items()}


def _good_anchors(notes: Path) -> Annotations:
    """Key -> marks, of the anchors marked as good and not also as bad or unsure."""
    found = {_key(key): marks for key, marks in _annotations(notes / ANCHORS).items()}
    return {key: marks for key, marks in found.items() if "good" in marks and not {"bad", "unsure"} & set(marks)}


def _annotations(file: Path) -> Annotations:
    """Key -> names of its marks; of two annotations of a key, the last counts."""
    found = json_object(file, list)
    try:
        marks = found["labels"]
        return {str(row["key"]): [str(marks[number]) for number in row["labels"]] for row in found["annotations"]}
    except (KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"{file}: not a file of annotations ({error!r}); restore it") from error


def _key(path: str) -> str:
    """The last two parts of a path; annotations may hold full paths."""
    return "/".join(path.split("/")[-2:])
