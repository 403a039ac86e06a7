"""``hf:PLACE``: Hugging Face data sets; the only module that imports their library (extra ``hf``).

PLACE is a folder that ``save_to_disk`` wrote, a folder of data files, one data file (``train.parquet``, all of whose
rows are the split), or a name on the hub (``cifar10``, ``zh-plus/tiny-imagenet``). Images are read as encoded files and
decoded as in every other source.

Options: `HubOptions`.

Class order. That of the ClassLabel feature, else as in ``webdataset:``. A ``classes.txt`` in a local PLACE renames the
classes.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.datasets.base import IMAGE_FILE, SampleIndex
from featcache.datasets.classes import listed_beside
from featcache.datasets.content import Content
from featcache.datasets.files import ImageFiles, file_index, read_regular, size_and_stamp
from featcache.datasets.formats.tables import metadata_column
from featcache.datasets.hub import offline_where_unreachable
from featcache.datasets.labels import classes_of
from featcache.datasets.options import SourceOptions, check_split, default_name, name_of_file
from featcache.errors import DatasetError, needs
from featcache.parameters import OneOf

BATCH = 1000
FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
"""Ending of a data file -> the library's name of its format."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HubData: TypeAlias = Any
"""A `datasets.Dataset` or `IterableDataset`, and their features: the library ships no types."""

Item = dict[str, Any]
"""An image as the library stores it, ``{"bytes": ..., "path": ...}``."""
Cells = dict[str, list[object]]


def _file_of(item: Item, name: str) -> bytes:
    if item.get("bytes") is not None:
        return bytes(item["bytes"])
    if not item.get("path"):
        raise FileNotFoundError(f"{name}: no image in this row")
    return read_regular(item["path"])


class Window:
    """Random access to a stream, cheap if rows are requested roughly in order.

    Parameters
    ----------
    start : ``start(row)`` returns an iterator over the items from that row on
    size : items kept behind the furthest one; an earlier row restarts the stream
    """

    def __init__(self, start: Callable[[int], Iterator[Item]], size: int = 1024) -> None:
        self._start, self._size, self._lock = start, size, threading.Lock()
        self._held: dict[int, Item] = {}
        self._next, self._stream = 0, None  # type: tuple[int, Iterator[Item] | None]

    def __call__(self, row: int) -> Item:
        """The item of a row; OSError if the stream ends before it."""
        with self._lock:
            if self._stream is None or (row not in self._held and not 0 <= row - self._next <= self._size):
                self._held, self._next, self._stream = {}, row, self._start(row)
            while self._next <= row:
                item = next(self._stream, None)
                if item is None:
                    raise OSError(
                        f"the stream ended before row {self._next:,}: the data set has changed since it was indexed"
                    )
                self._held[self._next] = item
                self._held.pop(self._next - self._size, None)
                self._next += 1
            return self._held[row]


@dataclass(frozen=True)
class HubOptions(SourceOptions):
    """Options of ``hf:``.

    Parameters
    ----------
    image : column of images, or of the bytes of their files (default: the only one)
    label : column of class labels, whole numbers or names (default: the only ClassLabel, else ``label`` or ``labels``)
    id : column of unique sample ids (default: split and row, ``test/0000041``)
    metadata : columns to store
    config : configuration, if the data set has several
    streaming : keep nothing on disk; read the data once for the index, then in order for the images (default: no)
    """

    image: str | None = None
    label: str | None = None
    id: str | None = None
    metadata: Sequence[str] = ()
    config: str | None = None
    streaming: Annotated[str, OneOf("yes", "no")] | None = None


def open_huggingface(
    place: str, split: str, options: HubOptions, *, labels: str = "names", name: str | None = None
) -> ImageFiles:
    """Open one split of a Hugging Face data set; the default name is the last part of PLACE."""
    if not place:
        raise DatasetError("hf: expected a folder, a file or a name on the hub after the colon")
    data = _with_images(_load(place, split, options), options.image)
    streamed = options.streaming == "yes"
    image = _image_column(data, options.image, f"hf:{place}")
    index = _indexed(data, image, split, options, f"hf:{place}", labels, streamed=streamed)
    file = Path(place).expanduser()
    folder = file.parent if file.is_file() else file
    name = name or (name_of_file(file.name, folder) if file.is_file() else default_name(folder.name))
    return ImageFiles(name, split, listed_beside(index, folder), _reader(data, image, index.ids, streamed=streamed))


def live_huggingface(
    data: HubData, split: str | None, columns: Mapping[str, Any], name: str | None = None
) -> ImageFiles:
    """A loaded Hugging Face data set: one split, in its order; the digest of its image files is part of the key.

    Parameters
    ----------
    data : a `datasets.Dataset`
    split : default: the data set's own, else ``train``
    columns : ``image``, ``label``, ``id`` and ``metadata`` (a list), as the options of ``hf:``
    name : default: the data set's own, else ``data``

    DatasetError if it is a stream, or its image or label column is ambiguous.
    """
    if not hasattr(data, "__len__"):
        raise DatasetError(
            f"data is {type(data).__name__}, a stream; expected a data set with rows: load it without streaming, or "
            "name it as hf:PLACE,streaming=yes"
        )
    split = check_split(split or re.sub(r"[^\w.-].*", "", str(data.split or "")) or "train")
    listed = HubOptions(**columns)
    where = f"the data set with the columns {', '.join(data.column_names)}"
    image = _image_column(data, listed.image, where)
    index = _indexed(data, image, split, listed, where, "names", streamed=False)
    name = name or default_name(data.info.dataset_name or data.info.builder_name or "data")
    content = Content(f"{name}/{split}", IMAGE_FILE, lambda: _hashes(data, image))
    return ImageFiles(name, split, replace(index, content=content), _reader(data, image, index.ids, streamed=False))


def _hashes(data: HubData, image: str) -> bytes:
    """The xxh3-128 of every image file; zeros for an unreadable one."""
    found: list[bytes] = []
    for batch in data.select_columns([image]).with_format("arrow").iter(BATCH):
        for item in batch[image].combine_chunks().to_pylist():
            try:
                found.append(xxhash.xxh3_128_digest(_file_of(item or {}, "")))
            except OSError:
                found.append(bytes(16))
    return b"".join(found)


def _indexed(
    data: HubData, image: str, split: str, options: HubOptions, where: str, labels: str, *, streamed: bool
) -> SampleIndex:
    label, columns = _label_column(data, options.label, where), options.metadata
    wanted = [*dict.fromkeys([label, *columns, *([options.id] if options.id else [])])]
    if missing := [column for column in wanted if column not in data.features]:
        raise DatasetError(f"{where}: no column {', '.join(missing)}; there are {', '.join(data.features)}")
    files, cells = _scan_stream(data, image, wanted) if streamed else _scan(data, image, wanted)
    ids = [f"{split}/{row:07d}" for row in range(len(files))]
    if options.id:
        ids = [str(value) for value in cells[options.id]]
    targets, classnames = _classes(data.features[label], cells[label], ids, labels)
    return file_index(ids, files, targets, classnames, {column: metadata_column(cells[column]) for column in columns})


def _load(place: str, split: str, options: HubOptions) -> HubData:
    with needs("hf: needs Hugging Face's datasets: pip install 'featcache[hf]'"):
        import datasets
    folder = Path(place).expanduser()
    if not folder.exists() and not HUB_NAME.fullmatch(place):
        raise DatasetError(
            f"hf:{place}: {folder.absolute()} does not exist, and this is not a name on the hub (NAME or WHO/NAME); "
            "check the path"
        )
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        if not saved:
            return _load_quietly(folder, place, split, options)
        found = datasets.load_from_disk(str(folder))
    except DatasetError:
        raise
    except Exception as error:  # errors of the library, huggingface_hub, httpx and Arrow
        nowhere = "" if folder.exists() else f" (there is no folder {folder.absolute()})"
        raise DatasetError(
            f"hf:{place}: split {split!r} cannot be loaded ({type(error).__name__}: {error}); check the name, "
            f"the split, config=, and that this machine reaches the hub{nowhere}"
        ) from error
    if options.streaming:
        raise DatasetError(f"hf:{place}: is a local folder or file; leave out streaming=")
    if (folder / "state.json").is_file():
        return found
    if split not in found:
        raise DatasetError(f"hf:{place}: no split {split!r}; expected one of {', '.join(found)}")
    return found[split]


def _load_quietly(folder: Path, place: str, split: str, options: HubOptions) -> HubData:
    """Load data files from a folder or the hub, without the hub client's log lines for every retry."""
    import datasets

    if not folder.exists():
        logging.getLogger(__name__).warning("hf:%s: no folder %s; asking the hub", place, folder.absolute())
    where, files = str(folder) if folder.is_dir() else place, None
    if folder.is_file():
        if folder.suffix.lower() not in FORMATS:
            raise DatasetError(
                f"hf:{folder}: unknown kind of file; expected a folder, or an ending of {', '.join(FORMATS)}"
            )
        where, files = FORMATS[folder.suffix.lower()], {split: str(folder)}
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    bars = not datasets.are_progress_bars_disabled()
    if folder.exists():  # nothing is downloaded
        datasets.disable_progress_bars()
    remedy = f"connect this machine, or give a folder (there is no {folder.absolute()})"
    hub = nullcontext() if folder.exists() else offline_where_unreachable(f"hf:{place}", remedy, DatasetError)
    try:
        with hub:
            streaming = options.streaming == "yes"
            return datasets.load_dataset(where, options.config, data_files=files, split=split, streaming=streaming)
    finally:
        client.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _with_images(data: HubData, image: str | None) -> HubData:
    """The data set with the column `image`, or its only column of bytes if it has no images, cast to images."""
    import datasets

    def is_raw(kind: object) -> bool:
        if isinstance(kind, dict):
            return set(kind) == {"bytes", "path"}
        return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")

    raw = [column for column, kind in data.features.items() if is_raw(kind)]
    column = image or (raw[0] if len(raw) == 1 and not _columns(data, "Image") else None)
    return data.cast_column(column, datasets.Image()) if column in raw else data


def _columns(data: HubData, feature: str) -> list[str]:
    """The columns with a feature of a class, such as ``Image``."""
    import datasets

    return [column for column, kind in data.features.items() if isinstance(kind, getattr(datasets, feature))]


def _image_column(data: HubData, given: str | None, where: str) -> str:
    images = _columns(data, "Image")
    if (given or (images[0] if len(images) == 1 else None)) not in images:
        there = f"image columns are {', '.join(images)}" if images else f"no image column of {', '.join(data.features)}"
        raise DatasetError(f"{where}: {there}; name one with image=")
    return given or images[0]


def _label_column(data: HubData, given: str | None, where: str) -> str:
    classes = _columns(data, "ClassLabel")
    usual = classes if len(classes) == 1 else [column for column in ("label", "labels") if column in data.features]
    if not given and not usual:
        raise DatasetError(f"{where}: no label column among {', '.join(data.features)}; name one with label=")
    return given or usual[0]


def _scan(data: HubData, image: str, columns: Sequence[str]) -> tuple[list[tuple[int, int]], Cells]:
    """(bytes, stamp) of every image and the values of some columns, without copying an image."""
    import pyarrow.compute as pc

    stamp = max((size_and_stamp(Path(file["filename"]))[1] for file in data.cache_files), default=0)
    files: list[tuple[int, int]] = []
    cells: Cells = {column: [] for column in columns}
    for batch in data.select_columns([image, *columns]).with_format("arrow").iter(BATCH):
        struct = batch[image].combine_chunks()
        lengths = pc.binary_length(struct.field("bytes")).to_pylist()
        paths = struct.field("path").to_pylist()
        files += [
            _outside(path) if length is None else (length, stamp) for length, path in zip(lengths, paths, strict=True)
        ]
        for column in columns:
            cells[column] += batch[column].to_pylist()
    return files, cells


def _scan_stream(data: HubData, image: str, columns: Sequence[str]) -> tuple[list[tuple[int, int]], Cells]:
    files: list[tuple[int, int]] = []
    cells: Cells = {column: [] for column in columns}
    for item in _undecoded(data, image):
        picture = item[image] or {}
        content = picture.get("bytes")
        files.append((len(content), 0) if content is not None else _outside(picture.get("path")))
        for column in columns:
            cells[column].append(item[column])
    return files, cells


def _outside(path: str | None) -> tuple[int, int]:
    """Size and stamp of an image file outside the table; zeros without one."""
    return size_and_stamp(Path(path)) if path else (0, 0)


def _undecoded(data: HubData, image: str) -> HubData:
    import datasets

    return data.cast_column(image, datasets.Image(decode=False))


def _reader(data: HubData, image: str, ids: Sequence[str], *, streamed: bool) -> Callable[[int], bytes]:
    """A function that reads the image file of a row."""
    if streamed:
        undecoded = _undecoded(data, image).select_columns([image])
        window = Window(lambda row: (item[image] or {} for item in undecoded.skip(row)))
        return lambda row: _file_of(window(row), ids[row])
    table = data.select_columns([image]).with_format("arrow")
    return lambda row: _file_of(table[row][image][0].as_py() or {}, ids[row])


def _classes(
    kind: HubData, values: Sequence[object], ids: Sequence[str], labels: str
) -> tuple[npt.ArrayLike, Sequence[str]]:
    import datasets

    if any(value is None for value in values):
        raise DatasetError(f"{ids[values.index(None)]}: no label; expected one for every sample: leave the sample out")
    if isinstance(kind, datasets.ClassLabel):
        return np.array(values, np.int64), list(kind.names)
    return classes_of([str(value) for value in values], lambda row: ids[row], None, labels)
