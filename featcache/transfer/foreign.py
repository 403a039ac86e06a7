"""Reading features computed by other programs, in common formats.

=================================  ====================================================================
what                               contents
=================================  ====================================================================
``FILE.npz``                       keys ``features``, ``labels`` (or other usual names: open_clip's linear probe)
``FILE.npy``                       features; labels in ``labels.npy`` in the same folder, or given separately
``FILE.pt``                        a tensor, or a dict of tensors; labels in ``labels.pt``, or given separately
``FILE.safetensors``, ``.parquet`` as `featcache.transfer.export` writes them
``FILE.csv``                       with a header as `featcache.transfer.export` writes it, or numbers only, label last
``FOLDER``                         ``features.npy`` + ``labels.npy`` (export), ``features.pt`` + ``labels.pt``
                                   (WiSE-FT), or one of `featcache.transfer.formats`: those of CLIP_benchmark,
                                   Tip-Adapter, clip-retrieval, Lance, Hugging Face data sets
=================================  ====================================================================

No file can execute code: torch files are loaded with ``weights_only=True``, npy files without pickle.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from featcache.datasets.labels import MAX_CLASSES
from featcache.errors import DatasetError, FeatcacheError
from featcache.parameters import check_regular
from featcache.prompts.text_files import read_lines
from featcache.store.key import Json
from featcache.store.layout import Array
from featcache.store.places.tensors import check_sound
from featcache.transfer.formats import FOLDERS, Foreign
from featcache.transfer.rows import CLASSNAMES

if TYPE_CHECKING:
    import pyarrow as pa

TARGET = "target:"
"""Prefix of the target columns in multi-label CSV files of `featcache.transfer.export`."""
FEATURES = ("features", "image_features", "feats", "embeddings", "x", "X", "data")
TEXTS = ("text_features", "text_weights", "zeroshot_weights", "classifier", "weights", "weight", "cls", *FEATURES)
IDS = ("ids", "image_ids", "image_paths")
LABELS = ("labels", "targets", "label", "target", "y")


Reader: TypeAlias = "Callable[[Path, tuple[str, ...]], Foreign]"


def read_foreign(source: str | Path, split: str = "train") -> Foreign:
    """Read features, and labels, ids and class names if present, from a file or folder; see the table above.

    The split is for folders with ``features_SPLIT.pt``. DatasetError if the format is unknown, or the file is missing,
    damaged, or without features.
    """
    path = Path(source)
    return _folder(path, split) if path.is_dir() else read_file(path)


def read_texts(source: str | Path) -> Foreign:
    """Class vectors of a file, in its layout, with class names from the file or ``classes.txt`` in the same folder."""
    path = Path(source)
    found = _read(path, TEXTS)
    if found.classnames is None:
        found.classnames = classes_beside(path.parent)
    return found


def read_classes(path: str | Path) -> list[str]:
    """Class names, one per line; DatasetError if the file is not UTF-8 text."""
    names = entries_of(Path(path))
    if not names:
        raise DatasetError(f"{path}: contains no class names; write one per line")
    return names


def entries_of(path: Path) -> list[str]:
    """The lines of a text file, with or without a final line break."""
    *lines, last = read_lines(path)
    return [*lines, last] if last else lines


def classes_beside(folder: Path) -> list[str] | None:
    """The class names of ``classes.txt`` in a folder, if it has one."""
    file = folder / "classes.txt"
    return read_classes(file) if file.is_file() else None


def check_files(paths: Iterable[Path]) -> None:
    """DatasetError if one of the files is a pipe or a device, before a library opens it."""
    for path in paths:
        try:
            check_regular(path)
        except OSError as error:
            raise DatasetError(f"{path}: {error}") from error


def read_file(path: Path) -> Foreign:
    """`read_foreign` of a file."""
    found = _read(path, FEATURES)
    places = [path.with_name(path.name.replace("features", name)) for name in ("labels", "targets")]
    beside = next((place for place in places if place != path and place.is_file()), None)
    if found.labels is None and beside is not None:
        found.labels = read_array(beside)
    return found


def read_array(source: str | Path) -> Array:
    """The labels in a npy, npz, pt or text file (one per line)."""
    path = Path(source)
    is_text = path.suffix.lower() in (".txt", ".csv")
    if not is_text and path.suffix.lower() not in READERS:
        raise DatasetError(f"{path}: expected labels in a .npy, .npz, .pt, .txt or .csv file")
    with _reading(path):
        check_regular(path)
        if is_text:
            return np.loadtxt(path, ndmin=1, delimiter=",", encoding="utf-8")
        return READERS[path.suffix.lower()](path, LABELS).features


def _read(path: Path, names: tuple[str, ...]) -> Foreign:
    """The features under one of these names in a file."""
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        why = "no such file" if reader else "unknown kind of file"
        raise DatasetError(f"{path}: {why}; expected a folder or a file with the ending {', '.join(READERS)}")
    with _reading(path):
        check_regular(path)
        return reader(path, names)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """DatasetError for anything else that a reader raises, as readers do on damaged files."""
    try:
        yield
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise DatasetError(f"{path}: cannot be read ({type(error).__name__}: {said}); write it again") from error


def _folder(folder: Path, split: str) -> Foreign:
    for module in FOLDERS.values():
        with _reading(folder):
            found: Foreign | None = import_module(module).read(folder, split)
        if found is not None:
            return found
    raise DatasetError(
        f"{folder}: contains no features; expected features.npy, features.pt, features_{split}.pt (with --split), or a "
        f"folder in one of the formats {', '.join(FOLDERS)}"
    )


def _pick(found: Mapping[str, object], names: tuple[str, ...], path: Path) -> Any:
    for name in names:
        if name in found:
            return found[name]
    raise DatasetError(f"{path}: holds {', '.join(map(repr, found)) or 'nothing'}; expected one of {', '.join(names)}")


def _numpy(value: Any) -> Array:
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
    return np.asarray(value)


def _of_mapping(found: Json, names: tuple[str, ...], path: Path) -> Foreign:
    features = _numpy(_pick(found, names, path))
    labels = next((_numpy(found[name]) for name in LABELS if name in found), None)
    ids = next((found[name] for name in IDS if name in found), None)
    classes = found.get("classnames", found.get("classes"))
    return Foreign(features, labels, *(None if part is None else list(map(_text, part)) for part in (ids, classes)))


def _text(value: object) -> str:
    """A value as str; NumPy byte strings are decoded as UTF-8."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _npz(path: Path, names: tuple[str, ...]) -> Foreign:
    with np.load(path, allow_pickle=False) as found:
        return _of_mapping({name: found[name] for name in found.files}, names, path)


def _npy(path: Path, names: tuple[str, ...]) -> Foreign:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise DatasetError(f"{path}: contains several arrays; expected one array, or the ending .npz")
    return Foreign(found)


def _torch(path: Path, names: tuple[str, ...]) -> Foreign:
    import torch

    with torch.serialization.safe_globals(_numpy_globals()):
        found = torch.load(path, map_location="cpu", weights_only=True)
    return _of_mapping(found, names, path) if isinstance(found, dict) else Foreign(_numpy(found))


def _numpy_globals() -> list[Any]:
    """The globals in a pickled NumPy array of numbers: WiSE-FT saves NumPy arrays, not tensors."""
    import _codecs

    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i8", "i4")]
    rebuild = np.empty(0).__reduce__()[0]
    old = [(rebuild, "numpy.core.multiarray._reconstruct"), (rebuild, "numpy._core.multiarray._reconstruct")]
    return [*old, _codecs.encode, np.ndarray, np.dtype, *kinds]


def _safetensors(path: Path, names: tuple[str, ...]) -> Foreign:
    from safetensors import safe_open

    check_sound(path)
    with safe_open(path, framework="pt") as file:
        facts, keys = file.metadata() or {}, list(file.keys())
        found: Json = {key: file.get_tensor(key) for key in keys if key in (*names, *LABELS)}
    found |= {key: json.loads(facts[key]) for key in ("ids", "classnames") if key in facts}
    return _of_mapping(found, names, path)


def _parquet(path: Path, names: tuple[str, ...]) -> Foreign:
    from pyarrow import parquet

    return of_table(parquet.read_table(path), path, names)


def of_table(table: "pa.Table", path: Path, names: tuple[str, ...] = FEATURES) -> Foreign:
    """Features, labels and ids from the columns of an Arrow table."""
    column = _pick({name: table[name] for name in table.column_names}, names, path)
    features = np.stack(column.to_numpy()) if len(table) else np.empty((0, 0), np.float32)
    facts = (table.schema.metadata or {}).get(CLASSNAMES)
    labels = next((table[name].to_numpy() for name in LABELS if name in table.column_names), None)
    if labels is not None and labels.dtype == object and len(labels):
        labels = np.stack(labels)
    ids = id_texts(table["id"].to_pylist(), path) if "id" in table.column_names else None
    return Foreign(features, labels, ids, json.loads(facts) if facts else None)


def id_texts(values: Sequence[object], path: Path) -> list[str]:
    """Ids as str; DatasetError if one is missing, or neither text nor an integer."""
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DatasetError(f"{path}: row {row}: id {value!r}; expected text or an integer")
    return list(map(str, values))


def _csv(path: Path, names: tuple[str, ...]) -> Foreign:
    text = path.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    if first.startswith(("id,label,class,", f"id,{TARGET}", f'id,"{TARGET}')):
        return _own_csv(text)
    numbers = np.loadtxt(io.StringIO(text), delimiter="," if "," in first else None, ndmin=2, dtype=np.float64)
    return Foreign(numbers[:, :-1].astype(np.float32), numbers[:, -1])


def _own_csv(text: str) -> Foreign:
    """As `featcache.transfer.export` writes it: ``label`` and ``class``, or a target for each class."""
    header, *rows = csv.reader(io.StringIO(text))
    classes = [name.removeprefix(TARGET) for name in header if name.startswith(TARGET)]
    first = 1 + (len(classes) or 2)
    features = np.array([row[first:] for row in rows], dtype=np.float32).reshape(len(rows), len(header) - first)
    if classes:
        labels = np.array([row[1:first] for row in rows], dtype=np.int64).reshape(len(rows), len(classes))
    else:
        labels = np.array([int(row[1]) for row in rows], dtype=np.int64)
        names = {int(row[1]): row[2] for row in rows}
        largest = min(max(names, default=-1), MAX_CLASSES)  # import_features rejects larger labels
        classes = [names.get(label, f"class {label}") for label in range(largest + 1)]
    return Foreign(features, labels, [row[0] for row in rows], classes)


READERS: dict[str, Reader] = {
    ".npz": _npz,
    ".npy": _npy,
    ".pt": _torch,
    ".pth": _torch,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    ".csv": _csv,
}
