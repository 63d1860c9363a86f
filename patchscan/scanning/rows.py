"""Build the rows of a scan, one for each object, and read and write them as Parquet."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from patchscan.detector.answer import Answer
from patchscan.detector.images import ErrorCode
from patchscan.scanning import provenance
from patchscan.storage.store import FailureCode, ObjectInfo

Status = Literal["scored", "rejected", "failed"]
Row = dict[str, Any]

TIME = pa.timestamp("us", tz="UTC")
PATCH = pa.struct([("x", pa.int32()), ("y", pa.int32()), ("size", pa.int32()), ("complexity", pa.int64())])
IMAGE = pa.struct([("width", pa.int32()), ("height", pa.int32()), ("format", pa.string()), ("frames", pa.int32())])

# What a listing says about an object; the files in shards/ have these columns.
LISTED = pa.schema(
    [
        ("key", pa.string()),
        ("version_id", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("last_modified", TIME),
        ("storage_class", pa.string()),
        ("restored", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        *LISTED,
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("p_ai", pa.float64()),
        ("logit", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("tier", pa.string()),
        ("jpeg_quality", pa.int16()),
        ("watermark", pa.string()),
        ("patch", PATCH),
        ("image", IMAGE),
        ("model", pa.string()),
        ("version", pa.string()),
        ("digest", pa.string()),
        ("decided_by", pa.string()),
        ("engine", pa.string()),
        ("provenance", provenance.TYPE),
        ("c2pa_trust", pa.string()),
        ("scored_at", TIME),
        ("attempts", pa.int32()),
    ]
)
# The key in a part's footer of what its shard cost (Usage in worker.py), as JSON.
STATS_KEY = b"patchscan.stats"


def scored(
    info: ObjectInfo,
    answer: Answer,
    claims: provenance.Provenance | None,
    attempts: int,
    c2pa_trust: str | None = None,
) -> Row:
    """The row of an object that was scored; `claims` is what the file says about its own origin, `c2pa_trust` the
    digest of the list of authorities by which it was judged."""
    judged_by = c2pa_trust if claims and claims["c2pa"] else None
    return _row(info, "scored", attempts) | vars(answer) | {"provenance": claims, "c2pa_trust": judged_by}


def without_score(info: ObjectInfo, code: ErrorCode | FailureCode, message: str, attempts: int) -> Row:
    """The row of an object without a score: `rejected` where an ErrorCode says what is wrong with it for good, `failed`
    where a FailureCode says why it could not be scored this time. The next scan tries these again."""
    status: Status = "rejected" if isinstance(code, ErrorCode) else "failed"
    return _row(info, status, attempts) | {"error_code": str(code), "error_message": message}


def _row(info: ObjectInfo, status: Status, attempts: int) -> Row:
    return vars(info) | {"status": status, "attempts": attempts, "scored_at": datetime.now(UTC)}


def to_parquet(rows: Sequence[Row], schema: pa.Schema = SCHEMA, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """Return the rows, ordered by key and version, as the bytes of a Parquet file with `metadata` in its footer."""
    ordered = sorted(rows, key=lambda row: (row["key"].encode(), (row.get("version_id") or "").encode()))
    return table_to_parquet(pa.Table.from_pylist(ordered, schema=schema), metadata)


def table_to_parquet(table: pa.Table, metadata: dict[bytes, bytes] | None = None) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> pa.Table:
    """Read a Parquet file's bytes; `schema.metadata` holds the metadata that `to_parquet` was given."""
    return pq.read_table(io.BytesIO(data))
