"""Query a scan's rows in SQL. They may be larger than memory: the Parquet parts are copied to local disk."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchscan.scanning import shards
from patchscan.scanning.listing import quoted
from patchscan.scanning.plan import Plan, PlanError
from patchscan.scanning.rows import SCHEMA, STATS_KEY
from patchscan.storage.store import Store

BATCH = 50_000
# What does not fit is written to local disk.
MEMORY_LIMIT = "1GB"
# So many rows are read into memory once, in place of once for each of the report's dozens of queries.
FEW_ROWS = 10_000


class IncompleteScanError(PlanError):
    """Parts are missing: their shards are not done, or the store does not list them yet."""


class ScanTable:
    """The rows of one scan as the SQL view or table `rows`; its column `carried` marks rows that were carried over
    unchanged, `other_model` those that another model than this scan's has made. `cost` adds up what the shards used,
    `results` is where the results of `plan` are.

    Raises IncompleteScanError where a shard has no part, or rows carried over are missing.
    """

    def __init__(self, out: Store, plan: Plan, scratch: Path):
        self.plan, self.results = plan, out.url
        folder = f"scans/{plan.scan}/rows/"
        found = sorted(name for name in out.names(folder) if name.endswith(".parquet"))
        missing = {f"{folder}part-{shards.name(index)}.parquet" for index in range(plan.shards)} - set(found)
        if missing:
            first = min(missing).removeprefix(folder)
            raise IncompleteScanError(
                f"{len(missing)} of {plan.shards} shards are not done, first {first}; run the scan again"
            )
        if not found:  # a scan without shards has a part too, of the rows carried over
            raise IncompleteScanError(f"{out.url}/{folder} holds no rows; run the scan again")
        self.cost: Counter[str] = Counter()
        files = scratch / plan.scan
        files.mkdir()
        count = carried = 0
        for name in found:
            path = files / name.removeprefix(folder)
            data = out.read(name)
            assert data is not None
            path.write_bytes(data)
            footer = pq.read_metadata(path)
            count += footer.num_rows
            carried += footer.num_rows if path.name.startswith("unchanged-") else 0
            self.cost.update(json.loads((footer.metadata or {}).get(STATS_KEY, b"{}")))
        if carried < plan.unchanged:
            raise IncompleteScanError(
                f"{plan.unchanged - carried} of {plan.unchanged} rows carried over are missing; run the scan again"
            )
        self._db = duckdb.connect()
        self._db.execute(f"SET memory_limit = '{MEMORY_LIMIT}'; SET temp_directory = {quoted(f'{scratch}/spill')}")
        self._db.execute("SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
        self._db.register("empty", SCHEMA.empty_table())
        self._db.execute("CREATE TABLE no_rows AS FROM empty")  # all columns: older tables lack some
        source = f"read_parquet({quoted(f'{files}/*.parquet')}, filename = true, union_by_name = true)"
        self._kind = "TABLE" if count <= FEW_ROWS else "VIEW"
        self._rows = (
            "AS SELECT *, filename LIKE '%/unchanged-%' AS carried,"
            f" digest IS DISTINCT FROM {quoted(plan.digest)} AS other_model"
            f" FROM (FROM no_rows UNION ALL BY NAME FROM {source})"
        )
        self._db.execute(f"CREATE {self._kind} rows {self._rows}")

    def set_beside(self, earlier: "ScanTable") -> None:
        """Make the rows of an earlier scan `earlier_rows`, and the scored rows whose object (key and ETag) it has not
        scored the table `new_rows`. An object without an ETag is always new."""
        self._db.execute(f"CREATE {earlier._kind} earlier_rows {earlier._rows}")
        self._db.execute(
            "CREATE TABLE new_rows AS SELECT * EXCLUDE (filename) FROM rows"
            " ANTI JOIN (FROM earlier_rows WHERE status = 'scored') AS earlier USING (key, etag)"
            " WHERE status = 'scored'"
        )

    def query(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query over `rows`."""
        answer: pa.Table = self._db.sql(query, params=list(values)).to_arrow_table()
        return list(answer.to_pylist())

    def query_one(self, query: str, *values: Any) -> dict[str, Any]:
        """Return the only row of a query."""
        return self.query(query, *values)[0]

    def count(self, condition: str, *values: Any) -> int:
        """Return the number of rows for which an SQL condition is true."""
        found: int = self.query_one(f"SELECT count(*) AS n FROM rows WHERE {condition}", *values)["n"]
        return found

    def stream(self, query: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a query, without holding them all in memory."""
        for batch in self._batches(query):
            yield from batch.to_pylist()

    def stream_column(self, query: str) -> Iterator[np.ndarray]:
        """Yield the first column of a query, chunk by chunk, as arrays (n,)."""
        for batch in self._batches(query):
            yield batch.column(0).to_numpy(zero_copy_only=False)

    def _batches(self, query: str) -> Iterator[pa.RecordBatch]:
        reader: pa.RecordBatchReader = self._db.cursor().sql(query).to_arrow_reader(BATCH)
        yield from reader
