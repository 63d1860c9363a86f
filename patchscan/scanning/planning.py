"""Plan a scan: list the source, find what is unchanged since the last scan, and cut the rest into shards."""

import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchscan.common.console import tell
from patchscan.common.errors import EXIT_INTERRUPTED
from patchscan.detector.card import Card
from patchscan.scanning import manifest, shards
from patchscan.scanning.history import (
    announced,
    check_source,
    claim,
    honours_conditional_writes,
    is_planned,
    last_complete,
    next_entry,
    read_entries,
    unfinished_plan,
)
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.scanning.plan import (
    Plan,
    PlanError,
    RemovedPlanError,
    ScanSource,
    absolute_url,
    delete_all,
    read_all,
    read_parts,
)
from patchscan.scanning.rows import LISTED, from_parquet, table_to_parquet
from patchscan.scanning.trust import trust_digest
from patchscan.storage.store import ObjectInfo, Store, read_listing

LOOK_UP_THREADS = 32


class ScanUnderWayError(PlanError):
    """A scan of the whole source is planned or unfinished; run again when it is done, the same command goes on."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """What to scan, with which model, and how.

    `shard_objects`, `shard_bytes`: the limits of a shard, which ends at the one that is reached first. `max_objects`:
    the most objects that a new plan may score (0: no limit). `retry_archived`: what the last scan found in cold storage
    is tried again. `sample`: plan a random sample of so many objects (0: all). `c2pa_trust`: as in Plan.
    """

    source: ScanSource
    card: Card
    filters: Filters = field(default_factory=Filters)
    shard_objects: int = 5_000
    shard_bytes: int = 4 * 2**30
    max_objects: int = 0
    retry_archived: bool = False
    sample: int = 0
    c2pa_trust: str | None = None

    def is_continued_by(self, plan: Plan) -> bool:
        """Whether this unfinished plan, of the same source, is for the same model, filters and authorities."""
        wanted = (self.card.digest, self.filters, self.c2pa_trust)
        return (plan.digest, plan.filters, plan.c2pa_trust) == wanted


def plan_scan(request: ScanRequest, out: Store) -> Plan:
    """Return the unfinished plan of the same source, filters, model and `c2pa_trust`, if there is one, else make a new
    one, which is incremental on the last complete scan. Planners that run at the same time all get the same plan.

    Raises PlanError where `out` belongs to another source or lies inside it, holds more objects than the sample or an
    unfinished scan of another sample, or a new plan would score more than `max_objects` objects, and StoreError.
    """
    _check_results_outside_source(request.source, out)
    while True:
        entries = read_entries(out)
        unfinished = _unfinished_plan(out, entries, request.source)
        if unfinished and unfinished.named is None and request.is_continued_by(unfinished):
            if unfinished.sample != request.sample:
                raise PlanError(
                    f"{out.url} holds an unfinished scan {_scope(unfinished.sample)}: finish that first: "
                    "nothing is then scored twice"
                )
            return _at_source(unfinished, request.source, out)
        entry = next_entry(entries)
        with announced(out, entry):
            new = _make(request, out)
            if claim(out, entry, new):
                _tell_of_abandoned(unfinished)
                return new
            delete_all(out, f"scans/{new.scan}/")


def _tell_of_abandoned(unfinished: Plan | None) -> None:
    """Say that a scan of the whole source will not be finished, now that a newer one has taken its place."""
    if unfinished and unfinished.named is None:
        why = "it was begun with another model, other filters or another --c2pa-trust"
        message = f"scan {unfinished.scan} stays unfinished, and what it has scored is scored again: {why}"
        tell(f"warning: {message}")


def _unfinished_plan(out: Store, entries: list[str], source: ScanSource) -> Plan | None:
    """What `history.unfinished_plan` returns; None also where the newest scan was removed: all is then planned anew."""
    try:
        return unfinished_plan(out, entries, source)
    except RemovedPlanError:
        if left := last_complete(out):
            check_source(out, left, source)
        return None


def plan_estimate(request: ScanRequest, out: Store, scratch: Store, most: int) -> Plan:
    """Plan what `plan_scan` would with `out`, but write it to `scratch`, and into its one shard `most` of the objects
    to score, chosen at random. Raises PlanError and StoreError."""
    _check_results_outside_source(request.source, out)
    if earlier := last_complete(out):
        check_source(out, earlier, request.source)
    one_shard = replace(request, shard_objects=most, shard_bytes=2**63, max_objects=0)
    return _make(one_shard, scratch, previous_in=out, most_to_score=most)


def plan_named(request: ScanRequest, out: Store, keys: Iterable[str]) -> tuple[Plan | None, bool]:
    """Plan a scan of the named objects alone, which carries over the rows of all others from the last complete scan.
    The source is not listed; each object is looked up as it is now.

    Returns a plan, and whether it is the one for these keys: else it is of an unfinished scan of other named objects,
    to be finished first. A plan without shards has nothing to score: it is not written, and there is nothing to do.
    Without a key there is no plan, but maybe that of others.

    Raises ScanUnderWayError while a scan of the whole source is planned or unfinished, which would otherwise lack these
    objects or list everything again; and what `plan_scan` raises.
    """
    _check_results_outside_source(request.source, out)
    while True:
        entries = read_entries(out)
        entry = next_entry(entries)
        try:
            unfinished = unfinished_plan(out, entries, request.source)
        except RemovedPlanError:
            raise PlanError(f"{out.url} has lost its last scan: scan the whole source") from None
        if is_planned(out, entry) or (unfinished and unfinished.named is None):
            raise ScanUnderWayError(f"{out.url}: a scan of the whole source is under way; run again when it is done")
        if unfinished and request.is_continued_by(unfinished):
            return _at_source(unfinished, request.source, out), False
        keys = dict.fromkeys([*keys, *(_objects_to_score(out, unfinished) if unfinished else ())])
        if not keys:
            return None, True
        new = _make(request, out, [*keys])
        if not new.shards or claim(out, entry, new):
            return new, True
        delete_all(out, f"scans/{new.scan}/")


def _check_results_outside_source(source: ScanSource, out: Store) -> None:
    """Raise PlanError where the results lie inside the source: they would be scanned as new objects every time."""
    inner, outer = absolute_url(out.url), absolute_url(source.url)
    # A bucket's prefix `s3://b/pho` covers `s3://b/photos`; a bucket `s3://b` does not cover `s3://b2`, nor do folders.
    covers_longer_names = "://" in outer and outer.count("/") > 2
    outer = outer if covers_longer_names else f"{outer.rstrip('/')}/"
    if source.manifest is None and f"{inner.rstrip('/')}/".startswith(outer):
        raise PlanError(f"--out {out.url} lies inside what is scanned, {source.url}; choose another place")


def _at_source(plan: Plan, source: ScanSource, out: Store) -> Plan:
    """The plan, written again where its store has moved. An inventory stays that which it was made from."""
    source = replace(source, manifest=plan.source.manifest)
    if plan.source != source:
        plan = replace(plan, source=source)
        plan.write(out)
    return plan


def _objects_to_score(out: Store, plan: Plan) -> list[str]:
    """The keys in a plan's shards. A scan that takes the place of this one has to look at them, too: whoever named them
    to it may have been told that they are done."""
    prefix = f"scans/{plan.scan}/shards/"
    return [key for data in read_all(out, prefix) for key in from_parquet(data).column("key").to_pylist()]


def _make(
    request: ScanRequest,
    out: Store,
    keys: Sequence[str] | None = None,
    previous_in: Store | None = None,
    most_to_score: int = 0,
) -> Plan:
    """List the source, or look up these keys alone, and write all of a plan but its entry in the history. For an
    estimate, the last scan is in `previous_in` instead of `out`, and `most_to_score` of the objects go into shards."""
    scan = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    before = previous_in or out
    previous = last_complete(before)
    _check_sample(before, previous, request.sample, named=keys is not None)
    with tempfile.TemporaryDirectory(prefix="patchscan-plan-", ignore_cleanup_errors=True) as scratch:
        by_version = request.source.manifest is not None
        join = ListingJoin(Path(scratch), request.filters, by_version=by_version, part_only=keys is not None)
        listing, found = _list(request.source, keys, join)
        if request.sample:
            join.sample(request.sample)
        if previous:
            _add_previous(join, request, before, previous, named=keys is not None)
        counts, bytes_to_score = join.counts(), join.bytes_to_score()
        to_score = counts["listed"] - counts["unchanged"]
        _check_number(request, to_score)
        unchanged = found - counts["filtered"] - to_score
        named = {"objects": found, "unchanged": unchanged, "missing": len(keys) - found} if keys is not None else None
        is_needed = named is None or to_score > 0
        if most_to_score:
            join.sample(most_to_score)
        elif is_needed:
            for index, table in enumerate(join.unchanged()):
                out.write(f"scans/{scan}/rows/unchanged-{shards.name(index)}.parquet", table_to_parquet(table))
        shard_count = _write_shards(out, scan, join, request)
    plan = Plan(
        scan=scan,
        source=request.source,
        filters=request.filters,
        model=request.card.name,
        version=request.card.version,
        digest=request.card.digest,
        card=asdict(request.card),
        shards=shard_count,
        previous=previous.scan if previous else None,
        listing=listing,
        conditional_writes=honours_conditional_writes(out),
        created_at=datetime.now(UTC).isoformat(),
        sample=request.sample,
        bytes_to_score=bytes_to_score,
        named=named,
        c2pa_trust=request.c2pa_trust,
        **counts,
    )
    if is_needed:
        plan.write(out)
    return plan


def _list(source: ScanSource, keys: Sequence[str] | None, join: ListingJoin) -> tuple[dict[str, Any], int]:
    """Add the source's objects, or those with these keys, to the join. Returns the seconds and requests that it took,
    and how many of the keys there are."""
    store = source.open()
    started = time.monotonic()
    found: list[ObjectInfo] = []
    if keys is not None:
        with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
            found = [info for info in pool.map(store.look_up, keys) if info]
        join.add_listing(found)
    elif source.manifest is not None:
        join.add_listing(manifest.objects(source.manifest, source.bucket, source.endpoint_url), source.prefix)
    else:
        read_listing(store, join.add_listing)
    return {"seconds": time.monotonic() - started, "requests": dict(store.requests)}, len(found)


def _add_previous(join: ListingJoin, request: ScanRequest, before: Store, previous: Plan, *, named: bool) -> None:
    """Add the rows of the previous scan, which are in `before`, to the join. Raises PlanError where a scan of named
    objects would carry over a part of them alone, since the others were removed."""
    join.add_previous(
        read_parts(before, previous.scan),
        request.card.digest,
        retry_archived=request.retry_archived,
        c2pa_trust=trust_digest(request.c2pa_trust),
    )
    if named and join.previous_rows() < previous.listed:
        raise PlanError(f"{before.url} has lost rows of its last scan, {previous.scan}: scan the whole source")


def _scope(sample: int) -> str:
    return f"with --sample {sample}" if sample else "of the whole source"


def _check_sample(out: Store, previous: Plan | None, sample: int, *, named: bool) -> None:
    """Raise PlanError where a scan would take the place of a complete one of more objects, whose scores would be lost,
    or of named objects would take a sample for the whole."""
    if previous and sample and not 0 < previous.sample <= sample:
        raise PlanError(
            f"{out.url} holds a scan {_scope(previous.sample)}: give a smaller sample a results folder of its own"
        )
    if previous and named and previous.sample:
        raise PlanError(f"{out.url} holds a scan {_scope(previous.sample)}: scan the whole source first")


def _check_number(request: ScanRequest, to_score: int) -> None:
    """Raise PlanError where there is more to score than the user allows: somebody may have named a whole bucket by
    mistake."""
    if 0 < request.max_objects < to_score:
        raise PlanError(
            f"{request.source.url} holds {to_score:,} objects to score, more than MAX_OBJECTS, "
            f"{request.max_objects:,}: nothing was scored; raise it, or scan less"
        )


def _write_shards(out: Store, scan: str, join: ListingJoin, request: ScanRequest) -> int:
    """Write the objects to score, cut into shards. Returns the number of shards."""
    count = 0
    for objects in shards.cut(join.to_score(), request.shard_objects, request.shard_bytes):
        table = pa.Table.from_pylist(objects, schema=LISTED)
        out.write(f"scans/{scan}/shards/{shards.name(count)}.parquet", table_to_parquet(table))
        count += 1
    return count
