"""One epoch of a stored prior: finished chunks, and the journal of rows that are not in chunks yet."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from featcache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from featcache.store import StoreWriter, check_deep
from featcache.store.layout import DEFAULT_CHUNK_ROWS, ArraySpec
from featcache.store.manifest import existing_header
from featcache.store.texts import PriorStore, open_prior_store

Rows = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
ATTEMPTS = 3


class PriorViews:
    """Features (N, D) of one view of every sample, as far as they are known.

    Parameters
    ----------
    path : Path
        Folder of the store.
    identity : mapping
        Of the store, see `featcache.store.Manifest`.
    shape : (int, int)
        N and D.
    name : str
        What listings call it.
    tidy : bool
        Make chunks of what a killed run left in its journal; only for a process that is alone with the store.

    Raises
    ------
    StoreCorruptError
        Stored bytes differ from their checksums.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], shape: tuple[int, int], name: str, *, tidy: bool = True
    ) -> None:
        self.path, self._identity, self._shape, self._name = path, dict(identity), shape, name
        self._journal = _Journal(path, shape)
        if tidy and existing_header(path) is not None and (self._journal.exists or not self._is_finished()):
            self.tidy()
        self._store = self._open()
        self._in_store = np.zeros(shape[0], dtype=bool) if self._store is None else self._store.valid

    def known(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(n,) True for the rows that can be read."""
        known: npt.NDArray[np.bool_] = self._in_store[rows] | self._journal.known[rows]
        return known

    def gather(self, rows: Rows) -> Features:
        """Features (n, D) of rows that are known."""
        stored = self._in_store[rows]
        features: Features = np.empty((len(rows), self._shape[1]), dtype=np.float32)
        if self._store is not None and stored.any():
            features[stored] = self._store.gather(rows[stored])
        if not stored.all():
            features[~stored] = self._journal.read(rows[~stored])
        return features

    def record(self, rows: Rows, features: Features) -> None:
        """Remember features (n, D) of some rows."""
        if not self._journal.exists:
            self._writer()  # its header makes the folder a store that is not finished
        self._journal.write(rows, features)

    def refresh(self) -> None:
        """Learn which rows other processes have recorded since."""
        self._journal.scan()

    def flush(self) -> None:
        """Hand what was recorded to the disk."""
        self._journal.flush()

    def tidy(self) -> None:
        """Make chunks of the journal, and a finished store of the chunks.

        Raises
        ------
        StoreCorruptError
            Chunks differ from their markers right after they were written.
        """
        self._journal.scan()
        if not self._journal.known.any() and self._is_finished():
            self._journal.remove()
            return
        writer = self._writer()
        for _ in range(ATTEMPTS):
            writer.drop_damaged()
            writer.reopen()
            for chunk in range(writer.rows_spec.n_chunks):
                self._write(writer, chunk)
            if not writer.drop_damaged():
                break
        else:
            raise StoreCorruptError(
                f"{self.path}: chunks differ from their markers right after they were written; check the disk, and "
                "that no other run records the same views"
            )
        recorded = sum(int(self._chunk(writer, "valid", chunk).sum()) for chunk in range(writer.rows_spec.n_chunks))
        writer.finalise({}, self._info(recorded), {"torch": torch.__version__, "threads": torch.get_num_threads()})
        self._journal.remove()

    def _is_finished(self) -> bool:
        try:
            open_prior_store(self.path)
        except (StoreNotFoundError, StoreIncompleteError):
            return False
        return True

    def _open(self) -> PriorStore | None:
        if not self._is_finished():
            return None
        check_deep(self.path)
        return open_prior_store(self.path)

    def _write(self, writer: StoreWriter, chunk: int) -> None:
        """A chunk with its old rows and those of the journal; a chunk that gains nothing stays as it is."""
        rows = np.arange(writer.rows_spec.rows_of(chunk).start, writer.rows_spec.rows_of(chunk).stop)
        if writer.marker(chunk) is None:
            features = np.full((len(rows), self._shape[1]), np.nan, dtype=np.float32)
            valid = np.zeros(len(rows), dtype=np.uint8)
        else:
            features, valid = (self._chunk(writer, name, chunk) for name in ("features", "valid"))
        new = self._journal.known[rows] & (valid == 0)
        if writer.marker(chunk) is not None:
            if not new.any():
                return
            self._journal.write(rows[valid == 1], features[valid == 1])  # for a kill before the new chunk is there
            self._journal.flush()
            writer.drop(chunk)
        features[new], valid[new] = self._journal.read(rows[new]), 1
        writer.write_chunk(chunk, {"features": features, "valid": valid})

    def _chunk(self, writer: StoreWriter, name: str, chunk: int) -> npt.NDArray[Any]:
        spec = writer.specs[name]
        values = np.fromfile(spec.chunk_path(self.path, chunk), dtype=spec.dtype)
        return values.reshape(spec.chunk_shape)[: len(spec.rows_of(chunk))]

    def _writer(self) -> StoreWriter:
        n_rows, dim = self._shape
        begun = existing_header(self.path)
        rows = int(begun["chunk_rows"]) if begun else min(DEFAULT_CHUNK_ROWS, n_rows)
        specs = {
            "features": ArraySpec("features", "<f4", (n_rows, dim), rows, float("nan")),
            "valid": ArraySpec("valid", "|u1", (n_rows,), rows, 0),
        }
        key = f"{self.path.parent.name}/{self.path.name}"
        return StoreWriter(self.path, PriorStore.kind, key, self._identity, specs, {}, {}, verb="finetune")

    def _info(self, recorded: int) -> dict[str, Any]:
        return {
            "name": self._name,
            "encoder_name": "frozen",
            "classnames": [],
            "text_digests": [],
            "logit_scale": None,
            "logit_bias": None,
            "dim": self._shape[1],
            "recorded": recorded,
        }


class _Journal:
    """Rows in two sparse files, features and their checksums, mapped into memory by every process that writes."""

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self._files, self._shape = (folder / "journal.rows", folder / "journal.marks"), shape
        self.known = np.zeros(shape[0], dtype=bool)
        self._rows: Any = None
        self._marks: Any = None
        self.scan()

    @property
    def exists(self) -> bool:
        """Whether there is one on the disk."""
        return all(file.exists() for file in self._files)

    def scan(self) -> None:
        """Learn which rows are whole, those of other processes included."""
        if self._rows is None and self.exists:
            self._map()
        if self._rows is not None:
            written = np.flatnonzero(self._marks)
            self.known[written] = [_mark(self._rows[row]) == self._marks[row] for row in written]

    def write(self, rows: Rows, features: Features) -> None:
        """Features first, then their checksums: a row that was torn by a kill does not count."""
        if self._rows is None:
            self._map()
        values = np.ascontiguousarray(features, dtype=np.float32)
        self._rows[rows] = values
        self._marks[rows] = [_mark(row) for row in values]
        self.known[rows] = True

    def read(self, rows: Rows) -> Features:
        """Features (n, D) of rows that are known."""
        return np.asarray(self._rows[rows], dtype=np.float32) if len(rows) else np.empty((0, self._shape[1]), "f4")

    def flush(self) -> None:
        """Hand the files to the disk."""
        if self._rows is not None:
            self._rows.flush()
            self._marks.flush()

    def remove(self) -> None:
        """Forget everything; another process that still maps the files keeps what it sees."""
        for file in self._files:
            file.unlink(missing_ok=True)
        self._rows = self._marks = None
        self.known[:] = False

    def _map(self) -> None:
        sizes = (4 * self._shape[0] * self._shape[1], 8 * self._shape[0])
        for file, size in zip(self._files, sizes, strict=True):
            descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
            with contextlib.closing(os.fdopen(descriptor, "rb+")) as opened:
                opened.truncate(size)  # sparse: zeros until they are written, and nothing where it has that size
        self._rows = np.memmap(self._files[0], dtype="<f4", mode="r+", shape=self._shape)
        self._marks = np.memmap(self._files[1], dtype="<u8", mode="r+", shape=self._shape[:1])


def _mark(row: Features) -> int:
    """Checksum of a row, never the 0 of a row that was not written."""
    return max(1, xxhash.xxh3_64_intdigest(row.tobytes()))
