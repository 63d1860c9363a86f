"""The `Store` protocol: read objects and write results, in an S3 bucket (bucket.py) or a local folder (folder.py).

Errors: TransientError where trying again may help, ObjectError where one object cannot be read, StoreError where the
bucket or folder itself cannot be used. None of them contains credentials or the texts of boto3's exceptions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Protocol, TypeVar

from patchscan.common.errors import UserError

Result = TypeVar("Result")

SCHEME = "s3://"
# The largest size in bytes that a table can hold; no store has such an object.
MAX_SIZE = 2**63 - 1
# A download that is too large to be held in memory waits in a temporary file.
TEMPORARY_FULL = "the disk of temporary files is full; free some space or set TMPDIR, and run the same command again"
# Names in a Content-Encoding that say nothing about the bytes: some stores keep S3's own framing of uploads by mistake.
NO_ENCODING = ("", "identity", "aws-chunked")


class FailureCode(StrEnum):
    """Why an object could not be scored this time; beside `detector.images.ErrorCode`, which is about the image."""

    VANISHED = "vanished"
    CHANGED = "changed"
    ACCESS_DENIED = "access_denied"
    ARCHIVED = "archived"
    STORE_ERROR = "store_error"
    UNAVAILABLE = "unavailable"
    SERVER_LIMIT = "server_limit"
    NOT_FINITE = "not_finite"
    INTERNAL_ERROR = "internal_error"


class StoreError(UserError):
    """The bucket, folder or credentials cannot be used at all."""


class AccessDeniedError(StoreError):
    """The credentials are known, and have no right to this."""


class UnorderedError(StoreError):
    """The order of a bucket's keys shows to be none after several threads have listed parts of it: what they listed
    may have gaps."""

    def __init__(self) -> None:
        super().__init__("the store lists its keys in no fixed order")


class UnusableNameError(StoreError):
    """One name cannot be read or written here; the store itself works."""


class ObjectError(Exception):
    """One object cannot be read; that says nothing about its content."""

    def __init__(self, code: FailureCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


class NotAFileError(ObjectError):
    """The name is not that of a file but of a pipe, a socket, a device or a link to nothing: it holds no image."""

    def __init__(self, message: str):
        super().__init__(FailureCode.STORE_ERROR, message)


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object as listed. `etag` is without quotes; `storage_class` is S3's name (`STANDARD`, `GLACIER`, ...) and
    `restored` whether a copy of an archived object can be read for some time. All but the key, `size` (bytes) among
    them, are None where the listing or manifest does not give them."""

    key: str
    size: int | None = None
    etag: str | None = None
    version_id: str | None = None
    last_modified: datetime | None = None
    storage_class: str | None = None
    restored: bool | None = None


def bare_etag(told: str | None) -> str | None:
    """An ETag without quotes, and without the mark W/ that proxies put before it. None where there is none."""
    return (told or "").strip().removeprefix("W/").strip('"') or None


def encodings(told: str | None) -> list[str]:
    """The names in a Content-Encoding, in small letters and without those that say nothing about the bytes."""
    names = [name.strip().lower() for name in (told or "").split(",")]
    return [name for name in names if name not in NO_ENCODING]


@dataclass(frozen=True)
class FetchedObject:
    """One object as fetched. `size` is the size of the object in bytes; `data` is cut where that is over the limit.
    `encoding` is the header Content-Encoding with which the object was stored: `data` is still packed so."""

    data: bytes
    size: int
    etag: str | None
    version_id: str | None
    last_modified: datetime | None
    encoding: str | None = None


class Store(Protocol):
    """A tree of objects. Objects to scan are read by key (in a bucket the full key), results are read and written by
    names relative to the URL. `requests` counts calls by operation, `bytes_read` the bytes of objects fetched."""

    url: str
    requests: Counter[str]
    bytes_read: int

    def objects(self) -> Iterator[ObjectInfo]:
        """Every object of the tree, in any order. Raises StoreError; UnorderedError where a second call will list them
        in a safe way (`read_listing`)."""

    def look_up(self, key: str) -> ObjectInfo | None:
        """The object as it is now and as `objects` lists it, or None where there is none. Of one that cannot be looked
        at, such as for missing rights, only the key. Raises StoreError."""

    def fetch(self, info: ObjectInfo, limit: int) -> FetchedObject:
        """Fetch the object as it was listed, in one try: at most `limit` + 1 bytes of it.

        Raises TransientError, ObjectError (also where the object is no longer the listed one) and StoreError.
        """

    def names(self, prefix: str) -> Iterator[str]:
        """The names of the results that begin with `prefix`, in any order. Raises StoreError."""

    def read(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is no such object. Raises StoreError."""

    def download(self, name: str, file: IO[bytes]) -> dict[str, str] | None:
        """Write the object's bytes into an empty file, piece by piece. Returns the ContentEncoding and
        ContentType (boto3's names) that they are stored with; None where there is no such object. Raises StoreError."""

    def write(self, name: str, data: bytes) -> None:
        """Write an object atomically. Raises StoreError."""

    def upload(self, name: str, file: IO[bytes], headers: Mapping[str, str]) -> None:
        """Write an object atomically: all bytes of the file, piece by piece; in a bucket with these headers. Raises
        StoreError."""

    def write_new(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists, atomically. Returns whether it was written. Raises StoreError."""

    def delete(self, name: str) -> None:
        """Remove an object, if it exists. Raises StoreError."""


def read_listing(store: Store, read: Callable[[Iterator[ObjectInfo]], Result]) -> Result:
    """What `read` makes of all objects of the store; it may be called a second time, to begin again."""
    try:
        return read(store.objects())
    except UnorderedError:
        return read(store.objects())


def is_bucket(url: str | Path) -> bool:
    """Whether `url` is an s3:// URL and not a folder."""
    return str(url).startswith(SCHEME)


def check_address(url: str) -> None:
    """Raise StoreError for an address that nobody can mean: an empty one, which pathlib takes for the working folder,
    or one with a line break at its end. A cluster's setting that was left empty or written with `|` is such a one."""
    if not url:
        raise StoreError("an address is empty: give an s3://bucket/prefix URL or a folder, such as . for this one")
    if url.endswith(("\n", "\r")):
        raise StoreError(f"the address {url!r} ends in a line break")


def split_url(url: str) -> tuple[str, str]:
    """`s3://bucket/some/prefix` to (bucket, prefix). Raises StoreError where no bucket is named."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise StoreError(f"{url} names no bucket; write s3://bucket/prefix")
    return bucket, prefix
