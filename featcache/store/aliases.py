"""Further names of a store's encoder: two model folders with equal towers share one store, found under either name.

A name is an empty file ``names/<name, percent-encoded>`` in the store. Writing one touches neither the manifest nor
what others read, a listing of the files tells them all, and where one is lost the next cache hit writes it again.
"""

from collections.abc import Iterable
from urllib.parse import quote, unquote

from featcache.errors import StoreWriteError
from featcache.store.base import Store
from featcache.store.places import StorePath, create, files

FOLDER = "names"
MAX_BYTES = 200  # file systems take 255, with what a partial file adds


def add_name(store: Store, name: str) -> None:
    """Record that an encoder of that name makes this store, too; a store that cannot be written is left as it is."""
    file = quote(name, safe="")
    if name == store.encoder_name or len(file) > MAX_BYTES or name in other_names(store.path):
        return
    try:
        create(store.path / FOLDER / file, b"")
    except StoreWriteError:
        return  # a shared store that others wrote: a cache hit needs no right to write


def other_names(path: StorePath) -> tuple[str, ...]:
    """The names that were recorded besides the manifest's."""
    return names_in(f"{FOLDER}/{name}" for name in files(path / FOLDER))


def names_in(held: Iterable[str]) -> tuple[str, ...]:
    """Those among the files of a store, by their relative names.

    >>> names_in(["manifest.json", "names/alpha%3D1.000", "names/x.1-2.partial"])
    ('alpha=1.000',)
    """
    found = (name.partition("/")[2] for name in held if name.startswith(f"{FOLDER}/"))
    return tuple(sorted(unquote(name) for name in found if not name.endswith(".partial")))
