"""Options of encoding, and the share of work of a process; none of them is part of a key."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from featcache.errors import FeatcacheError
from featcache.parameters import Count, OneOf, Range, Whole, check_parameters, parameters_of
from featcache.store.reading.parts import Part
from featcache.store.reading.tokens import POOLS, check_pool, has_tokens, pooled_name, tap_name

MOST_VIEWS = 10_000


@dataclass(frozen=True)
class Share:
    """Share `index` of `count` of the chunks, those with ``chunk % count == index``, as torchrun's RANK and WORLD_SIZE.

    With `only`, a job of an array encodes only these chunks and returns; otherwise a rank helps with the other chunks
    afterwards, and waits until the store is finished.

    >>> Share(1, 3).order(range(7))
    [1, 4, 2, 5, 0, 3, 6]
    >>> Share(1, 3, only=True).order(range(7))
    [1, 4]
    """

    index: int = 0
    count: int = 1
    only: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise FeatcacheError(
                f"shard {self.index} of {self.count}: expected an index from 0 to one less than the number of shards"
            )

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From ``$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT``: ``i/n``, i from 0 to n - 1; else FeatcacheError."""
        if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text):
            raise FeatcacheError(f"--shard {text}: expected i/n with i from 0 to n-1, such as 0/4")
        index, _, count = text.partition("/")
        return cls(int(index), int(count), only=True)

    @classmethod
    def from_environment(cls) -> "Share":
        """The share of this torchrun rank; without torchrun, all of the work."""
        rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        return cls(int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else cls()

    def order(self, chunks: Iterable[int]) -> list[int]:
        """The chunks of this share, followed, unless `only`, by those of the next shares."""
        turns = sorted((((chunk - self.index) % self.count), chunk) for chunk in chunks)
        return [chunk for turn, chunk in turns if not (self.only and turn)]


@dataclass(frozen=True)
class EncodeOptions:
    """Options of encoding; none of them is part of a key.

    Parameters
    ----------
    batch_size : images per forward pass (default: ``$FEATCACHE_BATCH_SIZE``; else 64 on a GPU, and on a CPU the fastest
        of 8, 16, 32 and 64, measured on the first batches, whose features are kept)
    chunk_rows : rows per chunk (default: ``$FEATCACHE_CHUNK_ROWS``; else at most 4096 and about a minute's work,
        estimated from a few images); a store that was begun keeps its own
    workers : threads that read and decode (default: one per core)
    ahead : batches decoded ahead (default: 0 on a CPU, 4 on a GPU)
    max_bad : unreadable images to tolerate; more are an error
    update_labels : if the labels of the source changed, write the new ones (features are kept) instead of raising
    refresh : encode again the chunks whose source files have changed, instead of raising an error
    share : the share of this process (default: from torchrun's RANK and WORLD_SIZE, else all of the work)
    taps : further outputs of the encoder to store: ``pre_projection``, ``patch``, ``layer:-2:cls``; see
        `featcache.store.reading.tokens`
    pool : pool the tokens of taps such as ``patch`` into one vector per image, stored as ``patch:mean``
    views : number of augmented views of every image to store
    augmentation : augmentation of the views, one of `featcache.encoding.augment.AUGMENTATIONS`
    view_seed : seed of the views
    compiled : compile the model with torch, at a fixed batch size; not for taps. Features differ in their last digits,
        as between two devices.
    reuse : copy rows whose content another finished store of the same encoder holds; see `featcache.encoding.reuse`
    """

    batch_size: Count | None = None
    chunk_rows: Count | None = None
    workers: Count | None = None
    ahead: Whole | None = None
    max_bad: Whole = 0
    update_labels: bool = False
    refresh: bool = False
    share: Share | None = None
    taps: Sequence[str] = ()
    pool: Annotated[str, OneOf(*POOLS)] | None = None
    views: Annotated[int, Range(0, MOST_VIEWS)] = 0
    augmentation: str = "plain"
    view_seed: Whole = 0
    reuse: bool = True
    compiled: bool = False

    @property
    def parts(self) -> list[Part]:
        """The requested taps and views, and each tap of every view."""
        pool = self.pool
        named = [pooled_name(tap_name(tap), pool) if pool and has_tokens(tap) else tap_name(tap) for tap in self.taps]
        taps = list(dict.fromkeys(named))
        views = [Part(tap, self.augmentation, self.view_seed, k) for k in range(self.views) for tap in (None, *taps)]
        return [Part(tap) for tap in taps] + views

    def __post_init__(self) -> None:
        if self.pool is not None:
            check_pool(self.pool)
            if not any(map(has_tokens, self.taps)):
                raise FeatcacheError(f"pool {self.pool}: no tap with tokens to pool; name one, such as --tap patch")
        try:
            check_parameters(parameters_of(EncodeOptions), {k: v for k, v in vars(self).items() if k != "taps"})
        except ValueError as error:
            raise FeatcacheError(str(error)) from None
