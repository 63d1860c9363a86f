"""Read lists of objects: CSV, JSON lines or Parquet with a `key` column, or an S3 Inventory's manifest.json."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq

from patchscan.common.csv_rows import csv_rows, text_encoding
from patchscan.storage import open_store, read_url
from patchscan.storage.store import MAX_SIZE, ObjectInfo, StoreError, bare_etag

BATCH = 10_000
# Our names for S3 Inventory's fields. Its CSV files have no header: its manifest gives the order of the columns.
INVENTORY_FIELDS = {
    "Key": "key",
    "Size": "size",
    "ETag": "etag",
    "LastModifiedDate": "last_modified",
    "VersionId": "version_id",
    "StorageClass": "storage_class",
}

# What the file system, and the readers of these formats on damaged bytes, raise.
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OSError,
    EOFError,
    csv.Error,
    zlib.error,
    pa.ArrowException,
)


class ManifestError(StoreError):
    """A manifest that cannot be read; the message says which line or field."""


def objects(url: str, bucket: str | None, endpoint_url: str | None) -> Iterator[ObjectInfo]:
    """Yield the objects that the manifest at `url` (s3://... or a local file) lists, in its order; of an inventory, the
    current versions. `bucket` is the scanned bucket, of which an inventory must be. Raises ManifestError."""
    try:
        yield from _objects(url, bucket, endpoint_url)
    except UNREADABLE as error:
        raise ManifestError(f"the manifest {url} cannot be read: {_why(error)}") from error


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as that"
    return f"it has no field {error}" if isinstance(error, KeyError) else str(error)


def _objects(url: str, bucket: str | None, endpoint_url: str | None) -> Iterator[ObjectInfo]:
    name, data = url.rpartition("/")[2], _opened(read_url(url, endpoint_url), url)
    if name == "manifest.json":
        yield from _inventory(json.load(data), bucket, endpoint_url)
        return
    for number, values in enumerate(_records(data, name), start=1):
        where = f"{url}, record {number}"
        if not isinstance(values, dict) or not values.get("key"):
            raise ManifestError(f"{url}: record {number} has no `key`; name the column of object keys `key`")
        if None in values:
            raise ManifestError(f"{where}: it has more fields than the first line; put keys with a comma in quotes")
        if bucket and values.get("bucket") not in (None, "", bucket):
            raise ManifestError(f"{where}: it is of bucket {values['bucket']}, the scan of {bucket}")
        yield _info(values, where)


def _opened(data: bytes | None, url: str) -> BinaryIO:
    if data is None:
        raise ManifestError(f"there is no manifest {url}")
    # Decompressed while it is read: a list of millions of keys is many times larger than its gzip file.
    return cast("BinaryIO", gzip.open(io.BytesIO(data))) if url.endswith(".gz") else io.BytesIO(data)


def _records(data: BinaryIO, name: str) -> Iterator[Any]:
    kind = name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "csv":
        yield from csv_rows(_text_lines(data))
    elif kind in ("jsonl", "ndjson"):
        for number, line in enumerate(_text_lines(data), start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ManifestError(f"{name}, line {number} is not JSON: {error}") from error
    elif kind == "parquet":
        yield from _parquet_records(data)
    else:
        raise ManifestError(f"{name}: a manifest is .csv, .jsonl, .parquet, or an S3 Inventory's manifest.json")


def _text_lines(data: BinaryIO) -> io.TextIOWrapper:
    encoding = text_encoding(data.read(2))
    data.seek(0)
    return io.TextIOWrapper(data, encoding, newline="")


def _parquet_records(data: BinaryIO) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(data).iter_batches(BATCH):
        yield from batch.to_pylist()


def _inventory(manifest: Any, bucket: str | None, endpoint_url: str | None) -> Iterator[ObjectInfo]:
    if not isinstance(manifest, dict):
        raise ManifestError("manifest.json is not an S3 Inventory's; give another list of objects another name")
    if manifest["sourceBucket"] != bucket:
        raise ManifestError(f"the inventory is of bucket {manifest['sourceBucket']}, the scan of {bucket}")
    store = open_store(f"s3://{manifest['destinationBucket'].rpartition(':')[2]}", endpoint_url=endpoint_url)
    kind = manifest["fileFormat"].lower()
    names = [field.strip() for field in manifest["fileSchema"].split(",")] if kind == "csv" else []
    for file in manifest["files"]:
        data = _opened(store.read(file["key"]), f"{store.url}/{file['key']}")
        for values in _inventory_records(data, kind, names):
            current = str(values.get("IsLatest", values.get("is_latest"))).lower() != "false"
            deleted = str(values.get("IsDeleteMarker", values.get("is_delete_marker", False))).lower() == "true"
            if current and not deleted:
                yield _info(_inventory_names(values, kind), f"{store.url}/{file['key']}")


def _inventory_records(data: BinaryIO, kind: str, names: list[str]) -> Iterator[dict[str, Any]]:
    if kind == "csv":
        for row in csv.reader(io.TextIOWrapper(data, "utf-8", newline="")):
            yield dict(zip(names, row, strict=True))
    elif kind == "parquet":
        yield from _parquet_records(data)
    else:
        file = orc.ORCFile(data)
        for stripe in range(file.nstripes):
            yield from file.read_stripe(stripe).to_pylist()


def _inventory_names(values: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind != "csv":
        return {**values, "etag": values.get("e_tag"), "last_modified": values.get("last_modified_date")}
    renamed = {INVENTORY_FIELDS[name]: value for name, value in values.items() if name in INVENTORY_FIELDS}
    return {**renamed, "key": unquote_plus(renamed["key"])}


def _info(values: dict[str, Any], where: str) -> ObjectInfo:
    try:
        modified, key = values.get("last_modified"), _text(values, "key")
        if key is None:
            raise ValueError("there is no key")
        return ObjectInfo(
            key=key,
            size=_size(values.get("size")),
            etag=bare_etag(_text(values, "etag")),
            version_id=_text(values, "version_id"),
            last_modified=_parse_time(modified) if modified else None,
            storage_class=_text(values, "storage_class"),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ManifestError(f"{where}: {error}") from error


def _text(values: dict[str, Any], name: str) -> str | None:
    """A field that is text, or None where it is empty. Raises ValueError for other values, and what is not UTF-8."""
    value = values.get(name) or None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    if value is not None:
        value.encode()
    return value


def _size(value: Any) -> int | None:
    if value in (None, ""):
        return None
    try:
        size = int(value)
    except ValueError:
        size = -1
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"the size {value!r} is not a number of bytes")
    return size


def _parse_time(value: str | datetime) -> datetime:
    if not isinstance(value, (str, datetime)):
        raise ValueError("last_modified is not a time")
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"last_modified {value!r} is not a time such as 2026-01-31T09:30:00Z") from None
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
