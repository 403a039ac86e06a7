"""All kinds of stores are begun, resumed and refused in the same way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import encode, load_encoder
from featcache.encoding.banks import embed_random_texts
from featcache.encoding.texts import embed_prompts
from featcache.errors import StoreSchemaError
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features

FEATURES = Foreign(np.eye(4, dtype=np.float32), np.arange(4))
MAKERS: dict[str, Callable[[Path], Any]] = {
    "images": lambda root: encode(NumpyDataset(), model=NumpyEncoder(), root=root),
    "texts": lambda root: embed_prompts(["ant", "bee"], "simple", NumpyEncoder(), root=root).store,
    "bank": lambda root: embed_random_texts(20, load_encoder("tiny", device="cpu"), root=root).store,
    "import": lambda root: import_features(FEATURES, Source("foreign"), name="foreign", root=root),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_store_begun_under_another_schema_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    store = Path(MAKERS[kind](tmp_path).path)
    (store / "manifest.json").unlink()
    header = store / "zarr.json"
    header.write_bytes(header.read_bytes().replace(b'"schema": 1', b'"schema": 2').replace(b'"chunk_rows"', b'"rows_"'))
    before = header.read_bytes()
    with pytest.raises(StoreSchemaError, match="store schema 2, this featcache reads schema 1; use the featcache ver"):
        MAKERS[kind](tmp_path)
    assert header.read_bytes() == before


@pytest.mark.parametrize("kind", MAKERS)
def test_a_killed_run_redoes_the_chunks_without_marker(kind: str, tmp_path: Path) -> None:
    store = Path(MAKERS[kind](tmp_path).path)
    manifest = (store / "manifest.json").read_bytes()
    (store / "manifest.json").unlink()
    (store / "done" / "000000.json").unlink()
    assert Path(MAKERS[kind](tmp_path).path) == store
    assert (store / "manifest.json").read_bytes() == manifest
