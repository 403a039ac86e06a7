"""Lance data sets (``pylance``): columns ``id``, ``label``, ``class``, and the vector column ``features``."""

from pathlib import Path

import numpy as np

from featcache.errors import needs
from featcache.store import ImageStore
from featcache.transfer.foreign import check_files, of_table
from featcache.transfer.formats import Foreign
from featcache.transfer.rows import table_of

EXTRA = "Lance files need the package lance: pip install 'featcache[lance]'"


def write(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    """See `featcache.transfer.formats.FOLDERS`."""
    with needs(EXTRA):
        import lance
    lance.write_dataset(table_of(store, dtype), str(folder), mode="overwrite")


def read(folder: Path, split: str) -> Foreign | None:
    """See `featcache.transfer.formats.FOLDERS`."""
    if not (folder / "_versions").is_dir():
        return None
    check_files(folder.rglob("*"))
    with needs(f"{folder}: {EXTRA}"):
        import lance
    return of_table(lance.dataset(str(folder)).to_table(), folder)
