"""Compare a listing with the previous scan's table. Both may be larger than memory: DuckDB joins them on local disk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from patchscan.detector.images import ErrorCode
from patchscan.scanning.rows import LISTED, SCHEMA, table_to_parquet
from patchscan.storage.store import FailureCode, ObjectInfo

BATCH = 10_000
IDENTITY = pa.schema([LISTED.field("key"), LISTED.field("version_id")])
# What does not fit is written to local disk.
MEMORY_LIMIT = "400MB"
# Rows in a part of rows carried over unchanged.
UNCHANGED_PART = 200_000


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which objects of the source belong to the scan: suffixes in upper or lower case, sizes in bytes, dates as ISO
    8601 (an object modified exactly at `since` belongs to it, one modified exactly at `until` does not)."""

    suffixes: tuple[str, ...] = ()
    min_size: int | None = None
    max_size: int | None = None
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "suffixes", tuple(suffix.lower() for suffix in self.suffixes))

    def keep(self, info: ObjectInfo) -> bool:
        """Whether the object belongs to the scan. A size or date that a manifest does not give excludes nothing."""
        if self.suffixes and not info.key.lower().endswith(self.suffixes):
            return False
        if info.size is not None:
            if self.min_size is not None and info.size < self.min_size:
                return False
            if self.max_size is not None and info.size > self.max_size:
                return False
        if info.last_modified is not None:
            if self.since is not None and info.last_modified < datetime.fromisoformat(self.since):
                return False
            if self.until is not None and info.last_modified >= datetime.fromisoformat(self.until):
                return False
        return True


def quoted(text: object) -> str:
    """Text, such as a path, as SQL writes it."""
    return "'" + str(text).replace("'", "''") + "'"


def _equal(column: str, table: str = "previous", other: str = "todo") -> str:
    return f"{table}.{column} IS NOT DISTINCT FROM {other}.{column}"


# A version never changes, except the one called null: where a list has no ETags, its versions tell as much.
SAME_CONTENT = (
    "coalesce(previous.etag = todo.etag, todo.version_id <> 'null', false)"
    " AND coalesce(previous.size = todo.size, true)"
)
# Size and date tell less than an ETag: enough to leave an object unread once more, but not to keep its score.
SAME_SIZE_AND_DATE = (
    "previous.etag IS NULL AND todo.etag IS NULL"
    " AND previous.size = todo.size AND previous.last_modified = todo.last_modified"
)
# An object that was archived, and about which the listing says what it said then.
STILL_ARCHIVED = (
    f"previous.error_code = '{FailureCode.ARCHIVED}' AND ({SAME_CONTENT} OR {SAME_SIZE_AND_DATE}) AND "
    + " AND ".join(map(_equal, ("last_modified", "storage_class", "restored")))
)


class ListingJoin:
    """Join the listing with the previous scan's table; `scratch` is a folder on local disk.

    An object is told from others by its key; with `by_version`, for a manifest, by key and version. With `part_only`
    the listing is of a part of the source: the rows of all other objects are carried over as they are.
    """

    def __init__(self, scratch: Path, filters: Filters, *, by_version: bool = False, part_only: bool = False):
        self.scratch = scratch
        self.filters = filters
        self._by_version = by_version
        self._part_only = part_only
        self._left_unsampled = 0
        self._db = duckdb.connect(scratch / "join.duckdb")
        self._db.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        self._db.execute("SET preserve_insertion_order = false")
        self._db.execute(f"SET temp_directory = {quoted(f'{scratch}/spill')}")
        self._db.execute("SET GLOBAL TimeZone = 'UTC'")  # for the cursors, too
        self._db.register("no_rows", SCHEMA.empty_table())
        self._db.execute("CREATE TABLE unchanged AS FROM no_rows")
        self._db.execute("CREATE TABLE no_previous AS FROM no_rows")
        self._db.execute("CREATE VIEW previous AS FROM no_previous")

    def add_listing(self, objects: Iterable[ObjectInfo], prefix: str = "") -> None:
        """Add the listing, in any order: of the keys that begin with `prefix` what the filters keep, and each object
        once. Where the iterator raises an error, nothing was added."""
        objects = iter(objects)
        listing, left_out = self.scratch / "listing.parquet", self.scratch / "left-out.parquet"
        with pq.ParquetWriter(listing, LISTED) as kept, pq.ParquetWriter(left_out, IDENTITY) as others:
            while batch := list(islice(objects, BATCH)):
                keep = [info.key.startswith(prefix) and self.filters.keep(info) for info in batch]
                kept.write_table(_table(compress(batch, keep), LISTED))
                others.write_table(_table(compress(batch, (not one for one in keep)), IDENTITY))
        self._db.execute(f"CREATE VIEW listing AS FROM {quoted(listing)}")
        self._db.execute(f"CREATE VIEW left_out AS FROM {quoted(left_out)}")
        name = "key, version_id" if self._by_version else "key"
        self._db.execute(f"CREATE TABLE todo AS FROM listing QUALIFY row_number() OVER (PARTITION BY {name}) = 1")

    def sample(self, most: int) -> None:
        """Keep `most` of the objects to score (before `add_previous`: of all that are listed), chosen by the hash of
        their identity: the same ones each time, and a larger sample holds the smaller."""
        identity = "key || chr(0) || coalesce(version_id, '')" if self._by_version else "key"
        self._left_unsampled = max(0, self._number("SELECT count(*) FROM todo") - most)
        self._db.execute(f"CREATE OR REPLACE TABLE todo AS FROM todo ORDER BY md5({identity}), key LIMIT {most}")

    def add_previous(
        self, parts: Iterable[bytes], digest: str, *, retry_archived: bool = False, c2pa_trust: str | None = None
    ) -> None:
        """Add the previous scan's table (Parquet files). Rows of the model `digest` whose object is unchanged are
        carried over: of scored and rejected objects (but not those on which a decoder died, which may have been the
        machine's fault, nor those whose C2PA manifest was judged by another list of authorities than that of the digest
        `c2pa_trust`), and, unless `retry_archived`, of those in cold storage, where nothing that a listing says has
        changed."""
        # The first keeps the query from failing where the rows of that scan were removed: all is scored again.
        for index, data in enumerate(chain([table_to_parquet(SCHEMA.empty_table())], parts)):
            (self.scratch / f"previous-{index:06d}.parquet").write_bytes(data)
        # Older tables lack columns.
        files = f"read_parquet({quoted(f'{self.scratch}/previous-*.parquet')}, union_by_name = true)"
        self._db.execute(f"CREATE OR REPLACE VIEW previous AS FROM no_previous UNION ALL BY NAME FROM {files}")
        self._db.execute(
            "CREATE OR REPLACE TABLE unchanged AS"
            f" SELECT previous.* FROM previous JOIN todo ON {self._same('previous')}"
            " WHERE previous.digest = ?"
            " AND previous.error_code IS DISTINCT FROM ?"
            " AND (previous.provenance.c2pa IS NULL OR previous.c2pa_trust IS NOT DISTINCT FROM ?)"
            f" AND ((previous.status IN ('scored', 'rejected') AND {SAME_CONTENT}) OR (? AND {STILL_ARCHIVED}))",
            [digest, ErrorCode.DECODER_DIED, c2pa_trust, not retry_archived],
        )
        self._db.execute(
            f"CREATE OR REPLACE TABLE todo AS SELECT todo.* FROM todo ANTI JOIN unchanged ON {self._same('unchanged')}"
        )
        if self._part_only:
            others = f"previous ANTI JOIN todo ON {self._same('previous')}"
            self._db.execute(f"CREATE OR REPLACE TABLE unchanged AS SELECT previous.* FROM {others}")

    def previous_rows(self) -> int:
        """How many rows the previous scan's table has."""
        return self._number("SELECT count(*) FROM previous")

    def counts(self) -> dict[str, int]:
        """The counts of a plan: listed, listed_bytes, unchanged, deleted, filtered, unsampled, duplicates. What the
        prefix and the filters leave out is not deleted, and of a part of the source nothing is."""
        seen = "(SELECT key, version_id FROM listing UNION ALL FROM left_out)"
        unchanged = self._number("SELECT count(*) FROM unchanged")
        listed = self._number("SELECT count(*) FROM todo") + unchanged
        deleted = f"SELECT count(*) FROM previous ANTI JOIN {seen} AS seen ON {self._same('previous', 'seen')}"
        return {
            "listed": listed,
            "listed_bytes": self._number("SELECT coalesce(sum(size), 0) FROM listing"),
            "unchanged": unchanged,
            "deleted": 0 if self._part_only else self._number(deleted),
            "filtered": self._number("SELECT count(*) FROM left_out"),
            "unsampled": self._left_unsampled,
            "duplicates": 0
            if self._part_only
            else self._number("SELECT count(*) FROM listing") - listed - self._left_unsampled,
        }

    def bytes_to_score(self) -> int | None:
        """The bytes of the objects to score; None where the list does not say the size of each."""
        unknown = self._number("SELECT count(*) - count(size) FROM todo")
        return None if unknown else self._number("SELECT coalesce(sum(size), 0) FROM todo")

    def unchanged(self) -> Iterator[pa.Table]:
        """The rows carried over, ordered by key and version, in parts; one empty part where there are none."""
        tables = self._batches("FROM unchanged ORDER BY key, version_id", UNCHANGED_PART)
        for table in chain([next(tables, SCHEMA.empty_table())], tables):
            yield table.select(SCHEMA.names).cast(SCHEMA)  # the table of a later version may have more columns

    def to_score(self) -> Iterator[dict[str, Any]]:
        """The objects to score, ordered by key and version, with the fields of rows.LISTED."""
        for table in self._batches("FROM todo ORDER BY key, version_id", BATCH):
            yield from table.to_pylist()

    def _same(self, table: str, other: str = "todo") -> str:
        """The condition that rows of two tables are about the same object."""
        same_key = f"{table}.key = {other}.key"
        return f"{same_key} AND {_equal('version_id', table, other)}" if self._by_version else same_key

    def _number(self, query: str) -> int:
        found = self._db.execute(query).fetchone()
        assert found
        return int(found[0])

    def _batches(self, query: str, rows: int) -> Iterator[pa.Table]:
        # A cursor for each query: a result that is not read to its end keeps its connection from others.
        reader: pa.RecordBatchReader = self._db.cursor().sql(query).to_arrow_reader(rows)
        for batch in reader:
            if batch.num_rows:
                yield pa.Table.from_batches([batch])


def _table(objects: Iterable[ObjectInfo], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{name: getattr(info, name) for name in schema.names} for info in objects], schema)
