"""The files of a store that its manifest determines: zarr's metadata and the markers.

The manifest holds their content in another form, so that it covers them without naming them: `verify` compares them
with what they must say, whatever version of zarr wrote them, and `repair` writes damaged ones again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from featcache.store.key import Json, content_key, pretty_json
from featcache.store.layout import HEADER, SCHEMA, same_metadata, zarr_metadata
from featcache.store.manifest import BadRow, Header, Manifest, Marker, parse_json, read_header
from featcache.store.places import StorePath

VERBS = {"texts": "text", "banks": "text --random", "priors": "finetune"}
"""The command that resumes a store, by kind; other kinds are made by encode or import."""


def is_consistent(header: Header) -> bool:
    """Whether the identity of a header hashes to its key: it is that of some store."""
    try:
        return header.key == f"{content_key(header.identity['encoder'])}/{content_key(header.identity['dataset'])}"
    except (KeyError, TypeError, ValueError):
        return False


def is_of_another_store(manifest: Manifest, store: StorePath) -> bool:
    """Whether a manifest was copied here: folder and header agree that this is another store."""
    header, place = read_header(store), f"{store.parent.name}/{store.name}"
    return manifest.key != place and header is not None and header.key == place and is_consistent(header)


class Derived:
    """What the derived files of a finished store must hold.

    Parameters
    ----------
    bad : sequence of BadRow
        The rows that could not be read; for a part those of its store, whose error texts may differ.
    """

    def __init__(self, manifest: Manifest, bad: Sequence[BadRow]) -> None:
        self._manifest, self._bad = manifest, bad
        self._rows = next(iter(manifest.arrays.values()))
        imported = "imported" in manifest.identity["encoder"]
        verb = VERBS.get(manifest.kind, "import" if imported else "encode")
        fields = (manifest.kind, manifest.key, manifest.identity, manifest.n_rows, self._rows.chunk_rows, verb)
        self._header = Header(SCHEMA, *fields)
        self._metadata = zarr_metadata(manifest.all_arrays.values(), {"featcache": asdict(self._header)})

    def names(self) -> Iterator[str]:
        """The names of the derived files."""
        yield from self._metadata
        yield from map(Marker.name, range(self._rows.n_chunks))

    def content(self, name: str) -> bytes:
        """What is written where a file is damaged."""
        return self._metadata[name] if name in self._metadata else self._marker(name).to_bytes()

    def fits(self, name: str, found: bytes) -> bool:
        """Whether a file says what it must."""
        if name == HEADER:
            return same_metadata(_with_verb(found, self._header.verb), self._metadata[HEADER])
        if name in self._metadata:
            return same_metadata(found, self._metadata[name])
        expected = self._marker(name)
        rows = self._rows.rows_of(expected.chunk)
        marker = Marker.from_bytes(found, expected.chunk, set(self._manifest.arrays), rows)
        return marker is not None and self._plain(marker) == self._plain(expected)

    def _marker(self, name: str) -> Marker:
        chunk = int(name.rpartition("/")[2].removesuffix(".json"))
        rows = self._rows.rows_of(chunk)
        checksums = {array: self._manifest.checksums[array][chunk] for array in self._manifest.arrays}
        return Marker(chunk, len(rows), checksums, tuple(bad for bad in self._bad if bad.row in rows))

    def _plain(self, marker: Marker) -> Marker:
        if self._manifest.kind != "parts":
            return marker
        return replace(marker, bad=tuple(replace(bad, error="") for bad in marker.bad))


def _with_verb(content: bytes, verb: str) -> bytes:
    """A header that names another verb, if it names one that it could: which command began a store may change."""
    try:
        found: Any = parse_json(content)
        header: Json = found["attributes"]["featcache"]
        known = header["verb"] in (*VERBS.values(), "encode", "import")
    except (ValueError, KeyError, TypeError):
        return content
    if known:
        header["verb"] = verb
    return pretty_json(found)
