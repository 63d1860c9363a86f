"""Compare a listing with the previous scan's table. Both may be larger than memory: DuckDB joins them on local disk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from patchscan.scanning.rows import LISTED, SCHEMA
from patchscan.storage.store import ObjectInfo

BATCH = 10_000
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


class ListingJoin:
    """Join the listing with the previous scan's table; `scratch` is a folder on local disk."""

    def __init__(self, scratch: Path, filters: Filters):
        self.scratch = scratch
        self.filters = filters
        self.filtered = 0
        self._db = duckdb.connect(scratch / "join.duckdb")
        self._db.execute("SET memory_limit = '400MB'")
        self._db.execute("SET preserve_insertion_order = false")
        self._db.execute(f"SET temp_directory = '{scratch}/spill'")
        self._db.execute("SET TimeZone = 'UTC'")
        self._db.register("no_rows", SCHEMA.empty_table())
        self._db.execute("CREATE TABLE unchanged AS FROM no_rows")
        self._db.execute("CREATE TABLE no_previous AS FROM no_rows")
        self._db.execute("CREATE VIEW previous AS FROM no_previous")

    def add_listing(self, objects: Iterable[ObjectInfo]) -> None:
        """Add the listing, in any order: what the filters keep, and each key once."""
        kept = iter(self._keep(objects))
        with pq.ParquetWriter(self.scratch / "listing.parquet", LISTED) as writer:
            while batch := list(islice(kept, BATCH)):
                columns = {name: [getattr(info, name) for info in batch] for name in LISTED.names}
                writer.write_table(pa.table(columns, schema=LISTED))
        self._db.execute(f"CREATE VIEW listing AS FROM '{self.scratch}/listing.parquet'")
        self._db.execute("CREATE TABLE todo AS SELECT * FROM listing QUALIFY row_number() OVER (PARTITION BY key) = 1")

    def add_previous(self, parts: Iterable[bytes], digest: str) -> None:
        """Add the previous scan's table (Parquet files). Rows of the model `digest` whose object is unchanged are
        carried over, except failed ones."""
        for index, data in enumerate(parts):
            (self.scratch / f"previous-{index:06d}.parquet").write_bytes(data)
        self._db.execute(f"CREATE OR REPLACE VIEW previous AS FROM '{self.scratch}/previous-*.parquet'")
        self._db.execute(
            "CREATE OR REPLACE TABLE unchanged AS SELECT previous.* FROM previous JOIN todo USING (key)"
            " WHERE previous.etag = todo.etag AND previous.size = todo.size"
            " AND previous.digest = ? AND previous.status IN ('scored', 'rejected')",
            [digest],
        )
        self._db.execute("DELETE FROM todo WHERE key IN (SELECT key FROM unchanged)")

    def counts(self) -> dict[str, int]:
        """The counts of a plan: listed, listed_bytes, unchanged, deleted, filtered, duplicates."""
        unchanged = self._number("SELECT count(*) FROM unchanged")
        listed = self._number("SELECT count(*) FROM todo") + unchanged
        return {
            "listed": listed,
            "listed_bytes": self._number("SELECT coalesce(sum(size), 0) FROM listing"),
            "unchanged": unchanged,
            "deleted": self._number("SELECT count(*) FROM previous WHERE key NOT IN (SELECT key FROM listing)"),
            "filtered": self.filtered,
            "duplicates": self._number("SELECT count(*) FROM listing") - listed,
        }

    def unchanged(self) -> Iterator[pa.Table]:
        """The rows carried over, ordered by key, in parts; one empty part where there are none."""
        none_yet = True
        for table in self._batches("FROM unchanged ORDER BY key", UNCHANGED_PART):
            none_yet = False
            yield table.cast(SCHEMA)
        if none_yet:
            yield SCHEMA.empty_table()

    def sizes_to_score(self) -> Iterator[int | None]:
        """The sizes of the objects to score, in the order of `to_score`."""
        for batch in self._sorted().iter_batches(BATCH, columns=["size"]):
            yield from batch.column(0).to_pylist()

    def to_score(self) -> Iterator[dict[str, Any]]:
        """The objects to score, ordered by key, with the fields of rows.LISTED."""
        for batch in self._sorted().iter_batches(BATCH):
            yield from batch.to_pylist()

    def _sorted(self) -> pq.ParquetFile:
        """The objects to score, written to a file, so that they are sorted only once."""
        path = self.scratch / "todo.parquet"
        if not path.exists():
            self._db.execute(f"COPY (FROM todo ORDER BY key) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE {BATCH})")
        return pq.ParquetFile(path)

    def _keep(self, objects: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
        for info in objects:
            if self.filters.keep(info):
                yield info
            else:
                self.filtered += 1

    def _number(self, query: str) -> int:
        found = self._db.execute(query).fetchone()
        assert found
        return int(found[0])

    def _batches(self, query: str, rows: int) -> Iterator[pa.Table]:
        # A cursor for each query: two results are read at the same time.
        reader: pa.RecordBatchReader = self._db.cursor().sql(query).to_arrow_reader(rows)
        for batch in reader:
            if batch.num_rows:
                yield pa.Table.from_batches([batch])
