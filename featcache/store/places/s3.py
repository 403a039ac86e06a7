"""``s3://bucket/prefix``: stores in Amazon S3 and compatible object stores (MinIO, Ceph, R2, ...).

Only this module imports obstore. Credentials, region and endpoint come from the environment:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` (an
``http://`` endpoint is allowed), or from a web identity or container role. The cloud's metadata service is asked for
the machine's role only if ``AWS_EC2_METADATA_DISABLED=false`` or ``AWS_METADATA_ENDPOINT`` is set. S3 provides what
the writer needs: putting an object is atomic, and ``If-None-Match: *`` creates an object only if there is none.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from featcache.errors import FeatcacheError, MissingExtraError
from featcache.store.places.local import Buffer, File

SCHEME = "s3://"
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
T = TypeVar("T")


@cache
def _client(bucket: str, prefix: str, endpoint: str, process: int) -> Any:
    """An obstore client, one per process, since its threads do not survive a fork."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise MissingExtraError("s3:// needs obstore: pip install 'featcache[s3]'") from error
    options = {"allow_http": True} if endpoint.startswith("http://") else {}
    return S3Store(bucket, prefix=prefix or None, client_options=options)  # type: ignore[arg-type]


CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
    "AWS_METADATA_ENDPOINT",
)
"""Variables that provide credentials or say that none are needed."""


def check_credentials(url: str) -> None:
    """FeatcacheError if there are no credentials and the cloud's metadata service must not be asked."""
    asked = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "false"
    if not asked and not any(os.environ.get(name) for name in CREDENTIALS):
        raise FeatcacheError(
            f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SKIP_SIGNATURE=true for a "
            "public bucket, or AWS_EC2_METADATA_DISABLED=false to ask for the role of this machine"
        )


def client(bucket: str, prefix: str = "") -> Any:
    """An obstore client of a bucket, or of a prefix of it, configured by the environment.

    Raises
    ------
    FeatcacheError
        The bucket name or ``AWS_ENDPOINT_URL`` is invalid, or there are no credentials (see `check_credentials`).
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is not None:
        check_address(endpoint, "AWS_ENDPOINT_URL ")
    if not BUCKET.fullmatch(bucket):
        raise FeatcacheError(f"{SCHEME}{bucket}: expected letters, digits, dots and hyphens in the name of a bucket")
    check_credentials(f"{SCHEME}{bucket}")
    return _client(bucket, prefix, endpoint or "", os.getpid())


def check_address(address: str, what: str = "") -> None:
    """FeatcacheError for an address without a valid host and port, on which obstore would panic.

    >>> check_address("http://127.0.0.1:9000")
    """
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        sound = None
    if not sound or not address.isascii() or not address.isprintable() or " " in address or "@" in address:
        raise FeatcacheError(f"{what}{address}: expected http://HOST[:PORT] or https://HOST[:PORT]")


HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9a-fA-F:.]+")


@dataclass(frozen=True)
class ObjectPath:
    """Path of an object or a prefix; joins like a `pathlib.PurePosixPath`.

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
            The bucket name is missing or invalid.
        """
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        parts = [part for part in key.split("/") if part not in ("", ".")]
        if not BUCKET.fullmatch(bucket) or ".." in parts or not key.isprintable():
            raise FeatcacheError(
                f"{url}: expected s3://BUCKET or s3://BUCKET/PREFIX, with letters, digits, dots and hyphens in BUCKET"
            )
        return cls(bucket, PurePosixPath(*parts))

    @property
    def key(self) -> str:
        """Name in the bucket."""
        return "" if self._key == PurePosixPath() else str(self._key)

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self._key.name

    @property
    def parent(self) -> "ObjectPath":
        """The prefix that holds it."""
        return ObjectPath(self.bucket, self._key.parent)

    def __truediv__(self, part: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self._key / part)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}".rstrip("/")

    def put(self, content: Buffer) -> None:
        """Write the object, replacing an existing one; OSError if the object store refuses."""
        self._put(content, "overwrite")

    def create(self, content: Buffer) -> bool:
        """`put` unless the object exists; returns whether it was written."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self._put(content, "create")
        except AlreadyExistsError:
            return False
        return True

    def _put(self, content: Buffer, mode: Literal["create", "overwrite"]) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            obstore.put(client(self.bucket), self.key, bytes(content), mode=mode, use_multipart=False)
        except AlreadyExistsError:
            raise
        except (BaseError, FileNotFoundError) as error:  # FileNotFoundError: no such bucket
            raise self._failure(error) from error

    def read_bytes(self) -> bytes:
        """The content of the object; FileNotFoundError if there is none."""
        import obstore

        return bytes(self._asked(lambda: obstore.get(client(self.bucket), self.key).bytes()))

    def read_ranges(self, starts: Sequence[int], length: int) -> list[Buffer]:
        """Several byte ranges of equal length; adjacent ranges share a request."""
        import obstore

        starts, lengths = list(starts), [length] * len(starts)
        ranges = self._asked(lambda: obstore.get_ranges(client(self.bucket), self.key, starts=starts, lengths=lengths))
        return [memoryview(part) for part in ranges]

    def remove(self) -> None:
        """Delete the object, if it exists."""
        import obstore

        try:
            self._asked(lambda: obstore.delete(client(self.bucket), self.key))
        except FileNotFoundError:
            return

    def stat(self) -> File | None:
        """Size and modification time of the object; None if it does not exist."""
        import obstore

        try:
            found = self._asked(lambda: obstore.head(client(self.bucket), self.key))
        except FileNotFoundError:
            return None
        return File(int(found["size"]), found["last_modified"].timestamp())

    def files(self) -> Iterator[tuple[str, File]]:
        """All objects below the prefix, by relative name."""
        import obstore

        pages = self._asked(lambda: list(obstore.list(client(self.bucket), prefix=self.key or None)))
        for item in (item for page in pages for item in page):
            name = item["path"][len(self.key) :].lstrip("/")
            if name:
                yield name, File(int(item["size"]), item["last_modified"].timestamp())

    def _asked(self, request: Callable[[], T]) -> T:
        from obstore.exceptions import BaseError

        try:
            return request()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: no such object") from error
        except BaseError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OSError:
        said = " ".join(str(error).partition("Debug source")[0].split())  # what follows is obstore's internal data
        return OSError(f"{said}; check the bucket {self.bucket}, AWS_ENDPOINT_URL, AWS_REGION and the credentials")


def zarr_store(path: ObjectPath) -> Any:
    """Read-only zarr store of a prefix."""
    from zarr.storage import ObjectStore

    return ObjectStore(client(path.bucket, path.key), read_only=True)
