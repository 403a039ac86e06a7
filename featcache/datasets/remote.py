"""Ranges of files at ``http://``, ``https://`` and ``s3://`` addresses; the only source module that imports obstore.

For s3, region, endpoint and credentials come from the environment, as for stores (`featcache.store.places.s3`).
"""

import io
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit

from featcache.errors import DatasetError, needs

SCHEMES = ("http", "https", "s3")
BLOCK = 1 << 20
"""Bytes per request of a file that is read front to back."""
RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=120)}


def is_remote(place: str) -> bool:
    """Whether a place is an address rather than a local path."""
    return place.partition("://")[0].lower() in SCHEMES and "://" in place


@cache
def _http_client(scheme: str, host: str) -> Any:
    with needs(f"{scheme}:// needs obstore: pip install 'featcache[s3]'"):
        from obstore.store import HTTPStore
    options = {"allow_http": True}
    return HTTPStore.from_url(f"{scheme}://{host}", client_options=options, retry_config=RETRIES)  # type: ignore[arg-type]


def _place(url: str) -> tuple[Any, str]:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DatasetError(f"{url}: not an address ({error}); expected scheme://host/path") from error
    if parts.query or parts.fragment or not parts.netloc or not unquote(parts.path).isprintable():
        raise DatasetError(f"{url}: expected scheme://host/path, without '?' or '#'; download the file instead")
    from featcache.store.places import s3

    if parts.scheme == "s3":
        return s3.client(parts.netloc), unquote(parts.path).lstrip("/")
    s3.check_address(f"{parts.scheme}://{parts.netloc}")
    return _http_client(parts.scheme, parts.netloc), unquote(parts.path).lstrip("/")


def _request(url: str, what: str, **arguments: Any) -> Any:
    client, path = _place(url)  # says what to install, if obstore is not there
    import obstore
    from obstore.exceptions import BaseError

    try:
        return getattr(obstore, what)(client, path, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: no such file") from error
    except BaseError as error:
        reason = str(error).splitlines()[0]
        remedy = "download it: this server cannot send parts of files" if "Range" in reason else "check the address"
        raise OSError(f"{url}: cannot be read ({reason}); {remedy}") from error


def read_range(url: str, start: int, size: int) -> bytes:
    """Some bytes of a file; OSError if it cannot be read, or is shorter."""
    content = bytes(_request(url, "get_range", start=start, length=size)) if size else b""
    if len(content) != size:
        raise OSError(f"{url}: got {len(content):,} bytes at {start:,}, expected {size:,}: has the file changed?")
    return content


def read_remote(url: str) -> bytes:
    """A small file as a whole; OSError if it cannot be read."""
    return bytes(_request(url, "get").bytes())


def stat_remote(url: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns; OSError if the server does not tell."""
    found = _request(url, "head")
    return int(found["size"]), int(found["last_modified"].timestamp()) * 10**9


class RemoteReader(io.RawIOBase):
    """A remote file that can be read and sought in, unbuffered; see `open_remote`."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position = url, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; costs no request."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or part of it at the end of the file, in one request."""
        count = max(0, min(len(buffer), self.size - self.position))
        buffer[:count] = read_range(self.url, self.position, count)
        self.position += count
        return count


def open_remote(url: str) -> io.BufferedReader:
    """Open a remote file for reading, in requests of `BLOCK` bytes."""
    return io.BufferedReader(RemoteReader(url, stat_remote(url)[0]), BLOCK)
