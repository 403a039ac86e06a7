"""One epoch of a stored prior: finished chunks, and a journal of rows that are not in chunks yet.

Store writers write whole chunks of consecutive rows, once. Training visits rows in random order, a few per step and
possibly from several processes, and a killed run must not lose the rows it has computed. So rows are first written to a
journal: a sparse file of features and one of checksums, shared by all processes of a machine. A row is valid if its
checksum matches, so a kill or a power cut loses only rows that are being written. In the end the rows become chunks
with markers and a manifest, written and verified by `featcache.store.StoreWriter` as in every other store.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from featcache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from featcache.store import PriorStore, StoreWriter, check_deep, open_prior_store
from featcache.store.layout import DEFAULT_CHUNK_ROWS, ArraySpec
from featcache.store.manifest import begun_chunk_rows, read_header

Rows = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
ATTEMPTS = 3
UNUSED: dict[str, object] = {"encoder_name": "frozen", "classnames": [], "text_digests": []}
UNUSED |= {"logit_scale": None, "logit_bias": None}
"""Fields of a manifest that say nothing about a prior."""


class PriorViews:
    """Known features (N, D) of one view of every sample; StoreCorruptError if stored bytes differ from their checksums.

    `tidy` turns the journal of a killed run into chunks, which is possible only if no other process uses the store.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, object], shape: tuple[int, int], name: str, *, tidy: bool = True
    ) -> None:
        self.path, self._identity, self._shape, self._name = path, dict(identity), shape, name
        self.journal = Journal(path, shape)
        self._store = self._finished()
        if tidy and read_header(path) is not None and (self.journal.exists or self._store is None):
            self.tidy()
            self._store = self._finished()
        if self._store is not None:
            check_deep(path)
        self._in_store = np.zeros(shape[0], dtype=bool) if self._store is None else self._store.valid

    def known(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row (n,) can be read."""
        known: npt.NDArray[np.bool_] = self._in_store[rows] | self.journal.known[rows]
        return known

    def gather(self, rows: Rows) -> Features:
        """Features (n, D) of known rows."""
        stored = self._in_store[rows]
        features: Features = np.empty((len(rows), self._shape[1]), dtype=np.float32)
        if self._store is not None and stored.any():
            features[stored] = self._store.gather(rows[stored])
        if not stored.all():
            features[~stored] = self.journal.read(rows[~stored])
        return features

    def record(self, rows: Rows, features: Features) -> None:
        """Write features (n, D) of some rows to the journal."""
        if not self.journal.exists:
            self._writer()  # writes the header of an unfinished store
        self.journal.write(rows, features)

    def tidy(self) -> None:
        """Turn the journal into chunks, and the chunks into a finished store.

        Raises StoreCorruptError if chunks do not match their markers right after writing.
        """
        self.journal.scan()
        if not self.journal.known.any() and self._finished() is not None:
            self.journal.remove()
            return
        writer = self._writer()
        chunks = range(writer.rows_spec.n_chunks)
        for _ in range(ATTEMPTS):
            writer.drop_damaged()
            writer.reopen()
            for chunk in chunks:
                self._write(writer, chunk)
            if not writer.drop_damaged():
                break
        else:
            raise StoreCorruptError(
                f"{self.path}: chunks differ from their markers right after they were written; check the disk, and "
                "that no other run records the same views"
            )
        recorded = sum(int(self._chunk(writer, "valid", chunk).sum()) for chunk in chunks)
        info = {"name": self._name, "dim": self._shape[1], "recorded": recorded} | UNUSED
        writer.finalise({}, info, {"torch": torch.__version__, "threads": torch.get_num_threads()})
        self.journal.remove()

    def _finished(self) -> PriorStore | None:
        """The store, or None if it is unfinished."""
        try:
            return open_prior_store(self.path)
        except (StoreNotFoundError, StoreIncompleteError):
            return None

    def _write(self, writer: StoreWriter, chunk: int) -> None:
        """Write a chunk with its old rows and those of the journal, if there are new ones."""
        done = writer.marker(chunk) is not None
        rows = np.arange(writer.rows_spec.rows_of(chunk).start, writer.rows_spec.rows_of(chunk).stop)
        if done:
            features, valid = (self._chunk(writer, name, chunk) for name in ("features", "valid"))
        else:
            features = np.full((len(rows), self._shape[1]), np.nan, dtype=np.float32)
            valid = np.zeros(len(rows), dtype=np.uint8)
        new = self.journal.known[rows] & (valid == 0)
        if done:
            if not new.any():
                return
            self.journal.write(rows[valid == 1], features[valid == 1])  # in case of a kill before the chunk is written
            self.journal.flush()
            writer.drop(chunk)
        features[new], valid[new] = self.journal.read(rows[new]), 1
        writer.write_chunk(chunk, {"features": features, "valid": valid})

    def _chunk(self, writer: StoreWriter, name: str, chunk: int) -> npt.NDArray[Any]:
        spec = writer.specs[name]
        return spec.chunk_array(spec.chunk_path(self.path, chunk).read_bytes())[: len(spec.rows_of(chunk))].copy()

    def _writer(self) -> StoreWriter:
        n_rows, dim = self._shape
        rows = begun_chunk_rows(self.path, min(DEFAULT_CHUNK_ROWS, n_rows))
        specs = {
            "features": ArraySpec("features", "<f4", (n_rows, dim), rows, float("nan")),
            "valid": ArraySpec("valid", "|u1", (n_rows,), rows, 0),
        }
        key = f"{self.path.parent.name}/{self.path.name}"
        return StoreWriter(self.path, PriorStore.kind, key, self._identity, specs, {}, {}, verb="finetune")


class Journal:
    """Rows in two memory-mapped sparse files, features and their checksums, shared by all writing processes."""

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        self._files, self._shape = (folder / "journal.rows", folder / "journal.marks"), shape
        self.known = np.zeros(shape[0], dtype=bool)
        self._maps: tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]] | None = None
        self.scan()

    @property
    def exists(self) -> bool:
        """Whether its files exist."""
        return all(file.exists() for file in self._files)

    def scan(self) -> None:
        """Find the valid rows, including those of other processes."""
        if self.exists or self._maps is not None:
            features, marks = self._mapped()
            written = np.flatnonzero(marks)
            self.known[written] = [_mark(features[row]) == marks[row] for row in written]

    def write(self, rows: Rows, features: Features) -> None:
        """Write features before their checksums, so that a half-written row is not valid."""
        values = np.ascontiguousarray(features, dtype=np.float32)
        mapped, marks = self._mapped()
        mapped[rows] = values
        marks[rows] = [_mark(row) for row in values]
        self.known[rows] = True

    def read(self, rows: Rows) -> Features:
        """Features (n, D) of known rows."""
        return self._mapped()[0][rows] if len(rows) else np.empty((0, self._shape[1]), np.float32)

    def flush(self) -> None:
        """Flush the files to disk."""
        for mapped in self._maps or ():
            if isinstance(mapped, np.memmap):
                mapped.flush()

    def remove(self) -> None:
        """Delete the files; processes that still map them keep their contents."""
        for file in self._files:
            file.unlink(missing_ok=True)
        self._maps = None
        self.known[:] = False

    def _mapped(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]]:
        if self._maps is None:
            sizes = (4 * self._shape[0] * self._shape[1], 8 * self._shape[0])
            for file, size in zip(self._files, sizes, strict=True):
                file.touch(0o644)
                os.truncate(file, size)  # sparse; does nothing to a file of that size
            self._maps = (
                np.memmap(self._files[0], dtype="<f4", mode="r+", shape=self._shape),
                np.memmap(self._files[1], dtype="<u8", mode="r+", shape=self._shape[:1]),
            )
        return self._maps


def _mark(row: Features) -> int:
    """Checksum of a row; never 0, which marks an empty row."""
    return max(1, xxhash.xxh3_64_intdigest(row.tobytes()))
