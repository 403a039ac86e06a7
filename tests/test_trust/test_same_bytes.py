"""A file written twice has the same bytes, so that digests of files show real changes and nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import encode
from safetensors import safe_open
from safetensors.torch import save_file

import heads
from featcache import open_store
from featcache.errors import EncoderError
from featcache.store.places.tensors import check_sound
from featcache.transfer.export import export
from ft.checkpoints.folder import read_state, write_state

HEAD = heads.LinearHead(np.eye(3, 5, dtype=np.float32), np.zeros(3, np.float32), classnames=("a", "é", "\x07"))
METADATA = {"run": '{"é": 1}', "content": "x", "another": "y"}
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "head": lambda path, store: heads.save(HEAD, path),
    "state": lambda path, store: write_state({"w": torch.ones(3), "v": torch.zeros(2)}, path, METADATA),
    "features": lambda path, store: export(open_store(store), path, "safetensors"),
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


def test_sealing_a_file_keeps_its_metadata(tmp_path: Path) -> None:
    path = write_state({"w": torch.arange(3.0)}, tmp_path / "a.safetensors", METADATA)
    with safe_open(os.fspath(path), framework="pt") as file:
        found = file.metadata()
        assert len(found.pop("checksum")) == 32
        assert found == {"format": "pt", **METADATA}
        assert torch.equal(file.get_tensor("w"), torch.arange(3.0))
    heads.save(HEAD, tmp_path / "head.safetensors")
    assert heads.load(tmp_path / "head.safetensors").classnames == HEAD.classnames


def test_a_sealed_file_shows_every_damage_and_others_pass(tmp_path: Path) -> None:
    path = write_state({"w": torch.arange(64.0)}, tmp_path / "a.safetensors", METADATA)
    check_sound(path)
    whole = path.read_bytes()
    for place in (8, 60, whole.index(b"checksum") + 14, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((EncoderError, ValueError), match=r"checksum|header|JSON|metadata"):
            read_state(path)
    save_file({"w": torch.ones(3)}, path)  # of another program
    check_sound(path)
    (tmp_path / "b.txt").write_text("no tensors")
    check_sound(tmp_path / "b.txt")
