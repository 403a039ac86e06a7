"""``s3://bucket/prefix``: stores in Amazon S3 and compatible object stores (MinIO, Ceph, R2, ...).

Credentials, region and endpoint come from the environment, ``AWS_ACCESS_KEY_ID`` and the like, or from a web identity
or container role. The cloud's metadata service is asked for the machine's role only if
``AWS_EC2_METADATA_DISABLED=false`` or ``AWS_METADATA_ENDPOINT`` is set. S3 provides what the writer needs: putting an
object is atomic, and ``If-None-Match: *`` creates an object only if there is none.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from featcache.errors import FeatcacheError, MissingExtraError
from featcache.store.places.local import Buffer, File

SCHEME = "s3://"
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


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

    FeatcacheError if the bucket's name or ``AWS_ENDPOINT_URL`` is invalid, or there are no credentials.
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
        """From ``s3://bucket/prefix``; FeatcacheError if the bucket name is missing or invalid."""
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

    def put(self, content: Buffer, mode: Literal["create", "overwrite"] = "overwrite") -> None:
        """Write the object, replacing an existing one; OSError if the object store refuses."""
        try:
            self._ask("put", bytes(content), mode=mode, use_multipart=False)
        except FileNotFoundError as error:  # no such bucket
            raise self._failure(error.__cause__) from error

    def create(self, content: Buffer) -> bool:
        """`put` unless the object exists; returns whether it was written."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self.put(content, "create")
        except AlreadyExistsError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """The content of the object; FileNotFoundError if there is none."""
        return bytes(self._ask("get").bytes())

    def read_ranges(self, starts: Sequence[int], length: int) -> list[Buffer]:
        """Several byte ranges of equal length; adjacent ranges share a request."""
        ranges = self._ask("get_ranges", starts=list(starts), lengths=[length] * len(starts))
        return [memoryview(part) for part in ranges]

    def remove(self) -> None:
        """Delete the object, if it exists."""
        with suppress(FileNotFoundError):
            self._ask("delete")

    def stat(self) -> File | None:
        """Size and modification time of the object; None if it does not exist."""
        with suppress(FileNotFoundError):
            found = self._ask("head")
            return File(int(found["size"]), found["last_modified"].timestamp())
        return None

    def files(self) -> Iterator[tuple[str, File]]:
        """All objects below the prefix, by relative name."""
        for item in self._ask("list"):
            name = item["path"][len(self.key) :].lstrip("/")
            if name:
                yield name, File(int(item["size"]), item["last_modified"].timestamp())

    def _ask(self, what: str, *args: object, **settings: object) -> Any:
        """Call a function of obstore for this key; a listing is read to its end."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            if what == "list":
                pages = obstore.list(client(self.bucket), prefix=self.key or None)
                return [item for page in pages for item in page]
            return getattr(obstore, what)(client(self.bucket), self.key, *args, **settings)
        except AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self}: no such object") from error
        except BaseError as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException | None) -> OSError:
        said = " ".join(str(error).partition("Debug source")[0].split())  # what follows is obstore's internal data
        return OSError(f"{said}; check the bucket {self.bucket}, AWS_ENDPOINT_URL, AWS_REGION and the credentials")


def zarr_store(path: ObjectPath) -> Any:
    """Read-only zarr store of a prefix."""
    from zarr.storage import ObjectStore

    return ObjectStore(client(path.bucket, path.key), read_only=True)
