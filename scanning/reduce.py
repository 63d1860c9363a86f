"""The end of a scan: count the parts, write the reports, and say that it is complete, in that order."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from scanning import rows, shards
from scanning.plan import Plan, PlanError
from scanning.store import Store


class Incomplete(PlanError):
    """Parts are missing: their shards have not been worked."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The scan's counts: listed = scored + rejected + failed + unchanged."""

    listed: int
    scored: int
    rejected: int
    failed: int
    unchanged: int


def parts(out: Store, plan: Plan) -> Iterator[tuple[str, pa.Table]]:
    """Every part of the scan's table, as (name, table): the shards' and the ones carried over. Raises Incomplete."""
    folder = f"scans/{plan.scan}/rows/"
    found = sorted(name.removeprefix(folder) for name in out.names(folder))
    missing = sorted({f"part-{shards.name(index)}.parquet" for index in range(plan.shards)} - set(found))
    if missing:
        raise Incomplete(f"{len(missing)} of {plan.shards} shards are not done, first {missing[0]}; run the scan again")
    for name in found:
        data = out.read(folder + name)
        assert data is not None
        yield name, rows.from_parquet(data)
