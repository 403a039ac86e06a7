"""Writing the tokens of a chunk file by file, as soon as the rows of a file are complete.

A chunk of 4,096 images with 196 tokens of width 768 takes 1.2 GB; only a few files of 16 MiB are held in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from featcache.encoding.reuse import Donors, Place
from featcache.store.layout import Array, ArraySpec
from featcache.store.reading.parts import Part

PutFile = Callable[[Part, int, Array], Future[str]]
"""Writes one file of a part's features, given its number; the future has its checksum."""


def unit_tokens(tokens: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Tokens (n, P, D) scaled to a root mean square length of 1 per image, and the original lengths (n,).

    >>> unit_tokens(np.array([[[3.0, 0.0], [0.0, 3.0]]], np.float32))[0].tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    squares = np.einsum("npd,npd->n", tokens, tokens, dtype=np.float64) / tokens.shape[1]
    lengths = np.sqrt(squares).astype(np.float32)
    divisors: npt.NDArray[np.float32] = np.where(lengths == 0, np.float32(1), lengths)
    return np.asarray(tokens / divisors[:, None, None], np.float32), lengths


class TokenRows:
    """The tokens of one chunk of a part, whose features `spec` describes; known rows are copied from `donors`."""

    def __init__(self, part: Part, spec: ArraySpec, rows: range, put: PutFile, donors: Donors) -> None:
        self._part, self._spec, self._rows, self._put, self._donors = part, spec, rows, put, donors
        self._files = list(spec.files_of(rows))
        self._open: dict[int, Array] = {}
        self._checksums: list[Future[str]] = []
        self.norm = np.full(len(rows), np.nan, np.float32)

    def add(self, rows: Sequence[int], tokens: npt.NDArray[np.float32]) -> None:
        """Add the tokens (n, P, D) of some rows."""
        unit, lengths = unit_tokens(tokens)
        self.norm[np.asarray(rows) - self._rows.start] = lengths
        stored = unit.astype(np.float16)
        for row, values in zip(rows, stored, strict=True):
            file, place = divmod(row, self._spec.chunk_rows)
            self._file(file)[place] = values

    def flush(self, before: int, known: Mapping[int, Place]) -> None:
        """Write the files whose rows are all before a row; `known` are the places of the rows to copy."""
        while len(self._checksums) < len(self._files):
            file = self._files[len(self._checksums)]
            rows = self._spec.rows_of(file)
            if rows.stop > before:
                return
            values = self._file(file)
            copied = [row for row in rows if row in known]
            if copied:
                places = [known[row] for row in copied]
                found, lengths = self._donors.values(self._part, places)
                values[np.asarray(copied) - rows.start] = found
                self.norm[np.asarray(copied) - self._rows.start] = lengths
            self._checksums.append(self._put(self._part, file, self._open.pop(file)))

    @property
    def written(self) -> tuple[str, ...]:
        """The checksums of all files; waits until they are written."""
        return tuple(checksum.result() for checksum in self._checksums)

    def _file(self, file: int) -> Array:
        """The rows of an unwritten file, NaN where missing."""
        if file not in self._open:
            shape = (len(self._spec.rows_of(file)), *self._spec.shape[1:])
            self._open[file] = np.full(shape, np.nan, np.float16)
        return self._open[file]
