"""clip-retrieval's folders: ``img_emb/img_emb_0.npy``, ... (n, D), and ``metadata/metadata_0.parquet``, ...

The metadata contain the ids as ``image_path``, and here also ``label`` and ``class`` (multi-label: ``labels``).
clip-retrieval itself has no labels, so importing its own folders requires ``--labels``.
"""

import json
import re
from pathlib import Path

import numpy as np

from featcache.errors import DatasetError
from featcache.store import ImageStore
from featcache.store.places.targets import replacing_all
from featcache.transfer.foreign import check_files, id_texts
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import CLASSNAMES, table_of

PARTITION = re.compile(r"img_emb_(\d+)\.npy")


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`: a single partition; refuses a folder with others."""
    from pyarrow import parquet

    others = [file.name for file in folder.glob("img_emb/*.npy") if file.name != "img_emb_0.npy"]
    if others:
        raise DatasetError(
            f"{folder}: contains {others[0]} of another export, which would be read with this one; name a new folder"
        )
    table = table_of(store, dtype)
    facts = table.schema.metadata
    table = table.drop_columns("features").rename_columns({"id": "image_path"}).replace_schema_metadata(facts)
    names = ("img_emb/img_emb_0.npy", "metadata/metadata_0.parquet")
    with replacing_all([folder / name for name in names]) as (array, metadata):
        np.save(array, store.numpy(dtype)[0])
        parquet.write_table(table, metadata)


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`: all partitions, in numerical order."""
    import pyarrow as pa
    from pyarrow import parquet

    partitions = map(PARTITION.fullmatch, (file.name for file in folder.glob("img_emb/*.npy")))
    numbers = sorted((found[1] for found in partitions if found), key=lambda number: (int(number), number))
    if not numbers:
        return None
    arrays = [folder / "img_emb" / f"img_emb_{number}.npy" for number in numbers]
    files = [folder / "metadata" / f"metadata_{number}.parquet" for number in numbers]
    check_files((*arrays, *files))
    features = np.concatenate([np.load(file, allow_pickle=False) for file in arrays])
    if not all(file.is_file() for file in files):
        return Foreign(features)
    facts = (parquet.read_schema(files[0]).metadata or {}).get(CLASSNAMES)
    table = pa.concat_tables([parquet.read_table(file) for file in files], promote_options="permissive")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    labels = next((columns[name] for name in ("label", "labels") if name in columns), None)
    return Foreign(
        features,
        None if labels is None else np.asarray(labels),
        id_texts(columns["image_path"], files[0].parent) if "image_path" in columns else None,
        json.loads(facts) if facts else None,
    )
