"""Written twice, a file has the same bytes: whoever compares digests of files finds what changed, and nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import encode
from safetensors import safe_open

import heads
from featcache import open_store
from featcache.transfer.export import export
from ft.checkpoints.folder import write_state

HEAD = heads.LinearHead(np.eye(3, 5, dtype=np.float32), np.zeros(3, np.float32), classnames=("a", "é", "\x07"))
METADATA = {"run": '{"é": 1}', "content": "x", "another": "y"}
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "head": lambda path, store: heads.save(HEAD, path),
    "state": lambda path, store: write_state({"w": torch.ones(3), "v": torch.zeros(2)}, path, METADATA),
    "features": lambda path, store: export(open_store(store), path, "safetensors"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRITERS)
def test_files_do_not_depend_on_the_order_of_a_hash_table(tmp_path: Path, what: str) -> None:
    store = encode(tmp_path / "cache")
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for path in paths:
        WRITERS[what](path, store)
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(os.fspath(paths[0]), framework="np") as file:
        names = list(file.metadata())
        assert file.keys()
    assert len(names) >= 3
    assert paths[0].read_bytes()[8:].startswith(b'{"__metadata__":{"' + min(names).encode())


def test_what_a_file_says_of_itself_stays(tmp_path: Path) -> None:
    path = write_state({"w": torch.arange(3.0)}, tmp_path / "a.safetensors", METADATA)
    with safe_open(os.fspath(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt", **METADATA}
        assert torch.equal(file.get_tensor("w"), torch.arange(3.0))
    heads.save(HEAD, tmp_path / "head.safetensors")
    assert heads.load(tmp_path / "head.safetensors").classnames == HEAD.classnames
