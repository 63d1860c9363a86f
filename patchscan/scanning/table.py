"""A scan's whole table, larger than memory: Parquet parts on local scratch disk, asked in SQL."""

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
from patchscan.scanning.plan import Plan, PlanError
from patchscan.scanning.rows import STATS_KEY
from patchscan.storage.store import Store

BATCH = 50_000


class IncompleteScanError(PlanError):
    """Parts are missing: their shards have not been worked."""


class ScanTable:
    """The rows of one scan as the view `rows`, with `carried` telling the rows that were carried over unchanged.

    Raises IncompleteScanError where a shard has no part.
    """

    def __init__(self, out: Store, plan: Plan, scratch: Path):
        folder = f"scans/{plan.scan}/rows/"
        found = sorted(out.names(folder))
        missing = {f"{folder}part-{shards.name(index)}.parquet" for index in range(plan.shards)} - set(found)
        if missing:
            first = min(missing).removeprefix(folder)
            raise IncompleteScanError(
                f"{len(missing)} of {plan.shards} shards are not done, first {first}; run the scan again"
            )
        self.cost: Counter[str] = Counter()
        files = scratch / plan.scan
        files.mkdir()
        for name in found:
            path = files / name.removeprefix(folder)
            data = out.read(name)
            assert data is not None
            path.write_bytes(data)
            self.cost.update(json.loads((pq.read_metadata(path).metadata or {}).get(STATS_KEY, b"{}")))
        self._db = duckdb.connect()
        self._db.execute(f"SET memory_limit = '1GB'; SET temp_directory = '{scratch}/spill'; SET TimeZone = 'UTC'")
        source = f"read_parquet('{files}/*.parquet', filename = true)"
        self._db.execute(f"CREATE VIEW rows AS SELECT *, filename LIKE '%/unchanged-%' AS carried FROM {source}")

    def ask(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """The rows that a query over `rows` gives."""
        answer: pa.Table = self._db.sql(query, params=list(values)).to_arrow_table()
        return list(answer.to_pylist())

    def one(self, query: str, *values: Any) -> dict[str, Any]:
        """The only row that a query gives."""
        return self.ask(query, *values)[0]

    def each(self, query: str) -> Iterator[dict[str, Any]]:
        """The rows that a query gives, one at a time."""
        for batch in self._batches(query):
            yield from batch.to_pylist()

    def numbers(self, query: str) -> Iterator[np.ndarray]:
        """The first column of a query, chunk by chunk."""
        for batch in self._batches(query):
            yield batch.column(0).to_numpy(zero_copy_only=False)

    def _batches(self, query: str) -> Iterator[pa.RecordBatch]:
        reader: pa.RecordBatchReader = self._db.cursor().sql(query).to_arrow_reader(BATCH)
        yield from reader
