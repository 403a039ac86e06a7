"""``s3://bucket/prefix``: stores in Amazon S3 and whatever speaks its protocol (MinIO, Ceph, R2, ...).

This is the one file that imports obstore. Credentials, region and endpoint come from the environment:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``
(an ``http://`` endpoint is allowed as it is), or from the machine's role. A put of an object is atomic, and
``If-None-Match: *`` creates only where there is none.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal

from featcache.errors import FeatcacheError, MissingExtraError
from featcache.store.places.local import Buffer

SCHEME = "s3://"


@dataclass(frozen=True)
class ObjectPath:
    """Name of an object, or of all objects below a prefix; joins like a `pathlib.PurePosixPath`.

    >>> path = ObjectPath.parse("s3://features/clip") / "images"
    >>> str(path), path.name, path.parent.name
    ('s3://features/clip/images', 'images', 'clip')
    """

    bucket: str
    _key: PurePosixPath

    @classmethod
    def parse(cls, url: str) -> "ObjectPath":
        """From ``s3://bucket/prefix``.

        Raises
        ------
        FeatcacheError
            No bucket is named.
        """
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        parts = [part for part in key.split("/") if part not in ("", ".")]
        if not bucket or ".." in parts:
            raise FeatcacheError(f"{url}: expected s3://BUCKET or s3://BUCKET/PREFIX")
        return cls(bucket, PurePosixPath(*parts))

    @property
    def key(self) -> str:
        """Name in the bucket."""
        return "" if self._key == PurePosixPath() else str(self._key)

    @property
    def place(self) -> "ObjectPlace":
        """The bucket that the bytes go to."""
        return ObjectPlace(self.bucket)

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self._key.name

    @property
    def parent(self) -> "ObjectPath":
        """The prefix that it lies in."""
        return ObjectPath(self.bucket, self._key.parent)

    def joinpath(self, *parts: str) -> "ObjectPath":
        """Something below this prefix."""
        return ObjectPath(self.bucket, self._key.joinpath(*parts))

    def __truediv__(self, part: str) -> "ObjectPath":
        return self.joinpath(part)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def as_posix(self) -> str:
        """The whole URL."""
        return str(self)


@cache
def _client(bucket: str, prefix: str, endpoint: str, process: int) -> Any:
    """An obstore client of a bucket (or a prefix of it), one a process: its threads would not survive a fork."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise MissingExtraError("s3:// needs obstore: pip install 'featcache[s3]'") from error
    options = {"allow_http": True} if endpoint.startswith("http://") else {}
    return S3Store(bucket, prefix=prefix or None, client_options=options)  # type: ignore[arg-type]


def client(bucket: str, prefix: str = "") -> Any:
    """An obstore client of a bucket, or of a prefix of it, made from the environment."""
    return _client(bucket, prefix, os.environ.get("AWS_ENDPOINT_URL", ""), os.getpid())


@dataclass(frozen=True)
class ObjectPlace:
    """The objects of a bucket; see `featcache.store.places.Place`."""

    bucket: str

    @property
    def client(self) -> Any:
        """The obstore client."""
        return client(self.bucket)

    def put(self, name: str, content: Buffer) -> None:
        """See `Place.put`."""
        self._put(name, content, "overwrite")

    def create(self, name: str, content: Buffer) -> bool:
        """See `Place.create`: ``If-None-Match: *``."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self._put(name, content, "create")
        except AlreadyExistsError:
            return False
        return True

    def _put(self, name: str, content: Buffer, mode: Literal["create", "overwrite"]) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            obstore.put(self.client, name, bytes(content), mode=mode, use_multipart=False)
        except AlreadyExistsError:
            raise
        except (BaseError, FileNotFoundError) as error:  # not found: there is no such bucket
            raise self._failure(error) from error

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        import obstore

        return bytes(self._found(name, lambda: obstore.get(self.client, name).bytes()))

    def read_range(self, name: str, start: int, stop: int) -> Buffer:
        """Bytes start..stop-1 of an object."""
        import obstore

        found = self._found(name, lambda: obstore.get_range(self.client, name, start=start, end=stop))
        return memoryview(found)

    def read_ranges(self, name: str, starts: Sequence[int], length: int) -> list[Buffer]:
        """Several ranges of equal length; neighbours travel in one request."""
        import obstore

        lengths = [length] * len(starts)
        found = self._found(name, lambda: obstore.get_ranges(self.client, name, starts=list(starts), lengths=lengths))
        return [memoryview(part) for part in found]

    def _found(self, name: str, request: Any) -> Any:
        from obstore.exceptions import BaseError

        try:
            return request()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{SCHEME}{self.bucket}/{name}: no such object") from error
        except BaseError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OSError:
        said = " ".join(str(error).partition("Debug source")[0].split())  # what follows is obstore's own data
        return OSError(f"{said}; check the bucket {self.bucket}, AWS_ENDPOINT_URL, AWS_REGION and the credentials")

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        import obstore

        try:
            self._found(name, lambda: obstore.delete(self.client, name))
        except FileNotFoundError:
            return

    def stat(self, name: str) -> tuple[int, float] | None:
        """See `Place.stat`."""
        import obstore

        try:
            found = self._found(name, lambda: obstore.head(self.client, name))
        except FileNotFoundError:
            return None
        return int(found["size"]), found["last_modified"].timestamp()

    def files(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """See `Place.files`."""
        import obstore

        def listed() -> list[Any]:
            return [item for page in obstore.list(self.client, prefix=folder or None) for item in page]

        for item in self._found(folder, listed):
            name = item["path"][len(folder) :].lstrip("/")
            if name:
                yield name, int(item["size"]), item["last_modified"].timestamp()


def zarr_store(path: ObjectPath) -> Any:
    """Zarr's own view of a prefix, read-only: its ObjectStore over obstore."""
    from zarr.storage import ObjectStore

    return ObjectStore(client(path.bucket, path.key), read_only=True)
