"""Making a store of any kind: find, begin or resume it, share the chunks with other processes, finish it.

Any number of processes may run the same job at once: ranks of torchrun, jobs of a Slurm array, or unrelated runs. They
share nothing but the store. Each takes unclaimed chunks, its own share first, and the process that finds every chunk
marked finishes the store. A store that gains rows over time, such as the frozen prior of fine-tuning, calls
``writer().drop(chunk)`` for the chunks that gain rows, and then `run`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from featcache.encoding.options import Share
from featcache.encoding.outputs import Outputs, Work
from featcache.encoding.pipeline import Behind
from featcache.errors import (
    MismatchError,
    ShardDoneError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreSchemaError,
)
from featcache.progress import Progress, Silent, Waits
from featcache.store import BadRow, StoreWriter
from featcache.store.claims import Claims
from featcache.store.finding import open_as
from featcache.store.key import Json, store_key
from featcache.store.layout import DEFAULT_CHUNK_ROWS, ArraySpec
from featcache.store.manifest import begun_chunk_rows
from featcache.store.places import StorePath
from featcache.store.reading.base import Store
from featcache.store.reading.parts import Part
from featcache.store.writer import ChunkValues, Values

S = TypeVar("S", bound=Store)

FINISH_ATTEMPTS = 3
FINISH = "finish"
POLL_SECONDS = (0.05, 0.4)  # at first, at most


@dataclass(frozen=True)
class Layout:
    """The arrays of a store: `rows` are written chunk by chunk, `whole` at the end; `files` are sidecars."""

    rows: Mapping[str, ArraySpec]
    whole: Mapping[str, ArraySpec] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What is written after all chunks; the arguments of `StoreWriter.finalise`, without the time."""

    info: Mapping[str, object]
    provenance: Mapping[str, object]
    whole: Values = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class MadeChunk:
    """The rows of one chunk, ready to be written; `copied` of them came from other stores."""

    work: Work
    values: Mapping[Part, ChunkValues]
    bad: Sequence[BadRow] = ()
    copied: int = 0


@dataclass(frozen=True)
class JobResult(Generic[S]):
    """The store, and what the job did: with `hit`, it was found and nothing was encoded."""

    store: S
    hit: bool
    encoded_rows: int
    seconds: float


class StoreJob(ABC, Generic[S]):
    """Makes one store; `what` is the title of progress and error messages, `parts` are taps and views to store as well.

    `chunk_rows` are the rows per chunk of a new store; one that was begun keeps its own.
    """

    kind: type[S]
    verb = "encode"

    def __init__(
        self,
        root: StorePath,
        identity: Json,
        n_rows: int,
        what: str,
        *,
        progress: Progress | None = None,
        chunk_rows: int | None = None,
        share: Share | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        self.identity, self.n_rows, self.what = identity, n_rows, what
        self.key = store_key(identity)
        self.path = root / self.kind.kind / self.key
        self.progress, self.share, self.parts = progress or Silent(), share or Share(), parts
        self.encoded = self.copied = 0
        self._chunk_rows = chunk_rows
        self._claims = Claims(self.path)
        self.behind = Behind()

    def open(self) -> S:
        """The finished store at `path`."""
        return open_as(self.kind, self.path)

    @abstractmethod
    def layout(self, chunk_rows: int) -> Layout:
        """The arrays of the store, in chunks of so many rows."""

    @abstractmethod
    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        """Compute chunks one after another; taking a `Work` claims it. Call `advance` as rows are finished."""

    @abstractmethod
    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        """What to write after all chunks; for a part, its info and provenance only."""

    def part_writer(self, part: Part, store: StoreWriter) -> StoreWriter:
        """Writer of one of `parts`, with the chunks of the store; only image stores have parts."""
        raise StoreSchemaError(
            f"{self.path}: {self.kind.kind} stores have no part {part.label}; expected an image store"
        )

    def new_chunk_rows(self) -> int:
        """Rows per chunk of a new store, unless given."""
        return DEFAULT_CHUNK_ROWS

    def check_bad(self, bad: Sequence[BadRow]) -> None:
        """Raise an error if there are too many bad rows."""

    def finished(self) -> S | None:
        """The store, if it is finished and its files have their sizes; StoreSchemaError if its version differs."""
        try:
            return self.open()
        except StoreSchemaError:
            raise
        except (StoreNotFoundError, StoreIncompleteError, StoreCorruptError):
            return None

    def result(self) -> JobResult[S]:
        """The finished store, made if necessary."""
        began = time.perf_counter()
        found = self.finished()
        store = self.run() if found is None else found
        self.sweep()
        return JobResult(store, found is not None, self.encoded, time.perf_counter() - began)

    def sweep(self) -> None:
        """Delete what killed writers left in the finished store."""
        self._claims.sweep()

    def writer(self) -> StoreWriter:
        """The writer of the new or unfinished store.

        StoreSchemaError or MismatchError if the store was begun by another version of featcache, or moved by hand.
        """
        try:
            return self._writer()
        except MismatchError:
            return self._writer()  # another process has just begun the store, with another chunk size

    def _writer(self) -> StoreWriter:
        rows = begun_chunk_rows(self.path, 0)
        if not rows:
            rows = self._chunk_rows = min(self._chunk_rows or self.new_chunk_rows(), self.n_rows)
        layout = self.layout(rows)
        kind, arrays = self.kind.kind, (layout.rows, layout.whole, layout.files)
        return StoreWriter(self.path, kind, self.key, self.identity, *arrays, self.verb)

    def advance(self, rows: int) -> None:
        """Report done rows and renew the claims; raises errors of the writer thread."""
        self.behind.check()
        self.progress.advance(rows)
        self._claims.renew()

    def run(self) -> S:
        """Make this process's share of the missing chunks, then finish the store or wait until another process has.

        `encoded` and `copied` count the rows encoded here, and those copied from other stores. ShardDoneError if the
        share is done, no more was asked for, and the store is not finished; StoreCorruptError if chunks keep changing.
        """
        writer = self.writer()
        outputs = Outputs(writer, {part: self.part_writer(part, writer) for part in self.parts})
        if self.finished() is None:
            writer.reopen()
        self.before(writer)
        try:
            return self._run(outputs)
        except KeyboardInterrupt as stopped:
            spec = writer.rows_spec
            kept = self.n_rows - sum(len(spec.rows_of(chunk)) for chunk in outputs.pending())
            rest = f"; rows are written in chunks of {spec.chunk_rows:,} (--chunk-rows)" if self.n_rows > kept else ""
            stopped.add_note(
                f"{self.what}: {kept:,} of {self.n_rows:,} rows are kept{rest}; run the same command again to continue"
            )
            raise
        finally:
            self._claims.release_all()

    def before(self, writer: StoreWriter) -> None:
        """Hook that runs before chunks are made, and may drop those that must be made again."""

    def _run(self, outputs: Outputs) -> S:
        failures, pause = 0, POLL_SECONDS[0]
        while failures < FINISH_ATTEMPTS:
            share = Share() if failures else self.share
            fresh = self.make_share(outputs, share)
            missing = outputs.pending()
            if not missing and (store := self.finished()) is not None and not outputs.unfinished():
                return store
            if not missing and self._claims.take(FINISH):
                failures += not self._finish(outputs)
                self._claims.release(FINISH)
            elif share.only:
                raise self._shard_done(len(missing), outputs.store.rows_spec.n_chunks)
            elif not fresh:
                if isinstance(self.progress, Waits):
                    self.progress.wait(self._claims.waited_for())
                time.sleep(pause)  # other processes make the rest; abandoned chunks are taken over
                pause = min(2 * pause, POLL_SECONDS[1])
        raise StoreCorruptError(
            f"{self.path}: chunks differ from their markers right after they were written, {FINISH_ATTEMPTS} times; "
            f"check the disk, and that no other process writes here, then run the same {self.verb} command again"
        )

    def _shard_done(self, missing: int, chunks: int) -> ShardDoneError:
        part = f"{self.what}: shard {self.share.index}/{self.share.count} is done"
        if not missing:
            return ShardDoneError(f"{part}, and so are all {chunks} chunks; another process finishes the store")
        return ShardDoneError(
            f"{part}; {missing} of {chunks} chunks are done by others or not yet done: the process that finds all of "
            "them done finishes the store, and the same command without --shard does what is left"
        )

    def make_share(self, outputs: Outputs, share: Share) -> int:
        """Make the unclaimed chunks of a share; returns the number of rows."""
        pending = outputs.pending()
        taken = self._taken(outputs, share.order(pending))
        first = next(taken, None)
        if first is None:
            return 0
        bad, rows = outputs.bad(), 0
        missing = sum(len(outputs.store.rows_spec.rows_of(chunk)) for chunk in pending)
        self.progress.start(self.what, self.n_rows, self.n_rows - missing)
        with Behind() as self.behind:
            for made in self.make(chain([first], taken)):
                bad += made.bad if Part() in made.values else []
                self.check_bad(bad)
                self.behind.call(self._write, outputs, made)
                rows += len(made.work.rows)
                self.copied += made.copied
                self.encoded += len(made.work.rows) - made.copied
        self.progress.finish()
        return rows

    def _write(self, outputs: Outputs, made: MadeChunk) -> None:
        for part, values in made.values.items():
            writer = outputs.store if part == Part() else outputs.parts[part]
            writer.write_chunk(made.work.chunk, values, made.bad)
        self._claims.release(made.work.chunk)

    def _taken(self, outputs: Outputs, chunks: Sequence[int]) -> Iterator[Work]:
        for chunk in filter(self._claims.take, chunks):
            if (work := outputs.lacking(chunk)) is not None:
                yield work
            else:  # another process has made it in the meantime
                self._claims.release(chunk)

    def _finish(self, outputs: Outputs) -> bool:
        """Check every chunk and write the manifests; False if a chunk has to be made again."""
        if self.finished() is None:  # a manifest without the files that it refers to, which were deleted meanwhile
            outputs.store.reopen()
        damaged = [writer.drop_damaged() for _, writer in reversed(outputs.without_manifest())]
        if any(damaged) or outputs.pending():
            return False
        self.check_bad(outputs.bad())
        try:
            for part, writer in outputs.without_manifest():
                self.finalise(part, writer)
        except StoreIncompleteError:
            return False
        for part in outputs.unfinished():
            outputs.parts[part].reopen()  # made from other images: the next round replaces what differs
        return True

    def finalise(self, part: Part, writer: StoreWriter) -> None:
        """Write everything but the chunks, the manifest last."""
        contents = self.contents(part, writer)
        provenance = {"written": written_now(), **contents.provenance}
        writer.finalise(contents.whole, contents.info, provenance, contents.files)


def written_now() -> str:
    """Time stamp for provenance records, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
