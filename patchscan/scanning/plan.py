"""Plan a scan: list the source, find what is unchanged since the last scan, and cut the rest into shards.

The results folder contains

    history/000001.json         one entry for each scan; the first planner to write it wins, and all others use its plan
    planning.json               the entry that a scan of the whole source is about to write, while it lists
    scans/<scan>/plan.json      the Plan of this module
    scans/<scan>/shards/        one listing for each shard (rows.LISTED)
    scans/<scan>/rows/          one Parquet part for each shard (rows.SCHEMA), and the rows carried over unchanged
    scans/<scan>/progress/      rows of unfinished shards
    scans/<scan>/report.*       the reports; `_SUCCESS` is written last
"""

import json
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.detector.card import Card
from patchscan.scanning import manifest, shards
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.scanning.rows import LISTED, from_parquet, table_to_parquet
from patchscan.scanning.trust import trust_digest
from patchscan.storage import open_store
from patchscan.storage.store import ObjectInfo, Store, is_bucket, split_url

PLAN_FILE = "plan.json"
SUCCESS_FILE = "_SUCCESS"
PLANNING_FILE = "planning.json"
PLAN_FORMAT = 1
SCAN_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
# On a store without conditional writes: the time a planner may take between reading the history and writing its entry.
SETTLE_S = 5.0
# After so long PLANNING_FILE is that of a planner that was killed.
LONGEST_PLANNING = timedelta(days=1)
LOOK_UP_THREADS = 32


class PlanError(UserError):
    """The results folder or the plan does not fit the command."""


class ClaimLostError(PlanError):
    """Another scan was started at the same time and has won; the same command, run again, continues that one."""

    exit_code = EXIT_INTERRUPTED


class ScanUnderWayError(PlanError):
    """A scan of the whole source is planned or unfinished; run again when it is done, the same command goes on."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """Where the objects are. `manifest` is the path or URL of a file that lists the keys; None: the store is listed."""

    url: str
    endpoint_url: str | None = None
    requester_pays: bool = False
    manifest: str | None = None

    def identity(self, key: str, version_id: str | None) -> tuple[str, str | None]:
        """What tells a listed object from the others: of a manifest, which may list several versions of a key, the
        version too. A store lists each key once; the version is then the one that was fetched."""
        return key, version_id if self.manifest else None

    def open(self, threads: int = 32) -> Store:
        """Open the source's store, for `threads` calls at once."""
        return open_store(self.url, endpoint_url=self.endpoint_url, requester_pays=self.requester_pays, threads=threads)


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """The limits of a shard; it ends at the one that is reached first."""

    max_objects: int = 5_000
    max_bytes: int = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json. Counts: `listed` = objects in the shards + `unchanged`; `filtered` and `duplicates` were left out
    before that; `deleted` were in the previous scan's table and are gone. `listing` holds the seconds and requests that
    listing took, `card` the model's card, `digest` its digest.

    `sample`: the most objects of a random sample, 0: all; `unsampled` objects were left out by it.
    `bytes_to_score`: the size of the objects in the shards.

    `c2pa_trust`: the PEM text of the authorities whose signers of C2PA manifests are trusted, None: of none. It stands
    here so that all workers judge by the same list.

    `named` is None where the whole source was listed. A scan of named objects holds there how many `objects` it looked
    at, how many of them were `unchanged`, and how many names were `missing`; it carries over all other rows."""

    scan: str
    source: ScanSource
    filters: Filters
    model: str
    version: str
    digest: str
    shards: int
    listed: int
    listed_bytes: int
    unchanged: int
    deleted: int
    filtered: int
    duplicates: int
    previous: str | None
    listing: dict[str, Any]
    conditional_writes: bool
    created_at: str
    card: dict[str, Any] = field(default_factory=dict)
    sample: int = 0
    unsampled: int = 0
    bytes_to_score: int = 0
    named: dict[str, int] | None = None
    c2pa_trust: str | None = None
    format: int = PLAN_FORMAT

    def write(self, out: Store) -> None:
        """Write plan.json."""
        # Neither asdict(self), which would copy the card value by value, nor indented: both take long for a large card.
        values = vars(self) | {"source": asdict(self.source), "filters": asdict(self.filters)}
        out.write(f"scans/{self.scan}/{PLAN_FILE}", json.dumps(values).encode())

    def at(self, endpoint_url: str | None) -> "Plan":
        """The plan with the source at another address; None: where it was."""
        return replace(self, source=replace(self.source, endpoint_url=endpoint_url)) if endpoint_url else self

    def address(self, out: Store) -> str:
        """The path or URL of plan.json."""
        return f"{out.url.rstrip('/')}/scans/{self.scan}/{PLAN_FILE}"

    @classmethod
    def read(cls, out: Store, scan: str) -> "Plan":
        """Read the plan of a scan. Raises PlanError."""
        name = f"scans/{scan}/{PLAN_FILE}"
        data = out.read(name)
        if data is None:
            raise PlanError(f"{out.url}/{name} is missing: is this a results folder of `patchscan scan`?")
        values = json.loads(data)
        if values.get("format") != PLAN_FORMAT:
            raise PlanError(f"{out.url}/{name} was made by another version of patchscan; choose a new results folder")
        values["source"] = ScanSource(**values["source"])
        values["filters"] = Filters(**values["filters"])
        return cls(**values)


def parse_plan_url(plan_url: str) -> tuple[str, str]:
    """Split `OUT/scans/<scan>/plan.json` into (OUT, scan). Raises PlanError."""
    root, _, scan = plan_url.removesuffix(f"/{PLAN_FILE}").rpartition("/scans/")
    if not root or not plan_url.endswith(f"/{PLAN_FILE}") or "/" in scan:
        raise PlanError(f"{plan_url} is not the address of a plan: OUT/scans/SCAN/{PLAN_FILE}")
    return root, scan


def is_complete(out: Store, scan: str) -> bool:
    """Whether the scan is complete."""
    return out.read(f"scans/{scan}/{SUCCESS_FILE}") is not None


def history(out: Store) -> list[str]:
    """The scans of a results folder, oldest first."""
    return list(_newest_first(out, sorted(out.names("history/"))))[::-1]


def _newest_first(out: Store, entries: list[str]) -> Iterator[str]:
    """Yield the scans of these history entries. Each entry is read when it is needed: there may be thousands."""
    for name in reversed(entries):
        data = out.read(name)
        assert data is not None
        yield json.loads(data)["scan"]


def last_complete(out: Store) -> Plan | None:
    """The plan of the newest complete scan, or None."""
    scans = _newest_first(out, sorted(out.names("history/")))
    return next((Plan.read(out, scan) for scan in scans if is_complete(out, scan)), None)


def earlier_scan(out: Store, wanted: str, endpoint_url: str | None = None) -> tuple[Store, Plan]:
    """The complete scan that `wanted` names, and where its results are: the name of a scan in `out`, or another results
    folder (s3:// or a path), whose newest complete scan it is. Raises PlanError and StoreError."""
    if SCAN_NAME.fullmatch(wanted):
        plan = Plan.read(out, wanted)
        if not is_complete(out, wanted):
            raise PlanError(f"{plan.address(out)} is not complete: there is nothing to compare with")
        return out, plan
    results = open_store(wanted, endpoint_url=endpoint_url)
    newest = last_complete(results)
    if newest is None:
        raise PlanError(f"{wanted} is neither the name of a scan in {out.url} nor a results folder with a complete one")
    return results, newest


def plan_scan(
    source: ScanSource,
    filters: Filters,
    card: Card,
    out: Store,
    shard_size: ShardSize = ShardSize(),
    max_objects: int = 0,
    retry_archived: bool = False,
    sample: int = 0,
    c2pa_trust: str | None = None,
) -> Plan:
    """Return the unfinished plan of the same source, filters, model and `c2pa_trust`, if there is one, else make a new
    one, which is incremental on the last complete scan. Planners that run at the same time all get the same plan.
    `retry_archived`: what the last scan found in cold storage is tried again. `sample`: plan a random sample of so many
    objects (0: all).

    Raises PlanError where `out` belongs to another source or lies inside it, holds more objects than the sample or an
    unfinished scan of another sample, or a new plan would score more than `max_objects` objects (0: no limit), and
    StoreError.
    """
    check_results_outside_source(source, out)
    while True:
        entries = sorted(out.names("history/"))
        unfinished = _unfinished(out, entries, source)
        if unfinished and unfinished.named is None and _continues(unfinished, card, filters, c2pa_trust):
            if unfinished.sample != sample:
                raise PlanError(
                    f"{out.url} holds an unfinished scan {_scope(unfinished.sample)}: finish that first: "
                    "nothing is then scored twice"
                )
            return _at_source(unfinished, source, out)
        entry = _next_entry(entries)
        with _planning(out, entry):
            limits = (shard_size, max_objects, retry_archived)
            new = _make(source, filters, card, out, *limits, sample=sample, c2pa_trust=c2pa_trust)
            if _claim(out, entry, new):
                return new
            _discard(out, new.scan)


def plan_estimate(
    source: ScanSource,
    filters: Filters,
    card: Card,
    out: Store,
    scratch: Store,
    most: int,
    retry_archived: bool = False,
    sample: int = 0,
    c2pa_trust: str | None = None,
) -> Plan:
    """Plan what `plan_scan` would with `out`, but write it to `scratch`, and into its one shard `most` of the objects
    to score, chosen at random. Raises PlanError and StoreError."""
    check_results_outside_source(source, out)
    size = ShardSize(max_objects=most, max_bytes=2**63)
    limits = (size, 0, retry_archived)
    return _make(
        source,
        filters,
        card,
        scratch,
        *limits,
        None,
        sample,
        previous_in=out,
        most_to_score=most,
        c2pa_trust=c2pa_trust,
    )


def plan_named(
    source: ScanSource,
    filters: Filters,
    card: Card,
    out: Store,
    keys: Iterable[str],
    shard_size: ShardSize = ShardSize(),
    max_objects: int = 0,
    retry_archived: bool = False,
    c2pa_trust: str | None = None,
) -> tuple[Plan | None, bool]:
    """Plan a scan of the named objects alone, which carries over the rows of all others from the last complete scan.
    The source is not listed; each object is looked up as it is now.

    Returns a plan, and whether it is the one for these keys: else it is of an unfinished scan of other named objects,
    to be finished first. A plan without shards has nothing to score: it is not written, and there is nothing to do.
    Without a key there is no plan, but maybe that of others.

    Raises ScanUnderWayError while a scan of the whole source is planned or unfinished, which would otherwise lack these
    objects or list everything again; and what `plan_scan` raises.
    """
    check_results_outside_source(source, out)
    while True:
        entries = sorted(out.names("history/"))
        entry = _next_entry(entries)
        unfinished = _unfinished(out, entries, source)
        if _is_planned(out, entry) or (unfinished and unfinished.named is None):
            raise ScanUnderWayError(f"{out.url}: a scan of the whole source is under way; run again when it is done")
        if unfinished and _continues(unfinished, card, filters, c2pa_trust):
            return _at_source(unfinished, source, out), False
        keys = dict.fromkeys([*keys, *(_objects_to_score(out, unfinished) if unfinished else ())])
        if not keys:
            return None, True
        limits = (shard_size, max_objects, retry_archived)
        new = _make(source, filters, card, out, *limits, [*keys], c2pa_trust=c2pa_trust)
        if not new.shards or _claim(out, entry, new):
            return new, True
        _discard(out, new.scan)


def _unfinished(out: Store, entries: list[str], source: ScanSource) -> Plan | None:
    """The plan of the newest of these history entries, where it is unfinished. Raises PlanError where it is of another
    source."""
    for scan in islice(_newest_first(out, entries), 1):
        newest = Plan.read(out, scan)
        if (newest.source.url, newest.source.manifest) != (source.url, source.manifest):
            raise PlanError(f"{out.url} holds scans of {newest.source.url}; give each source its own results folder")
        if is_complete(out, scan):
            return None
        if newest.conditional_writes or _is_settled(out, entries[-1], newest):
            return newest
        return _unfinished(out, entries, source)  # of the planner that has won
    return None


def _continues(plan: Plan, card: Card, filters: Filters, c2pa_trust: str | None) -> bool:
    return (plan.digest, plan.filters, plan.c2pa_trust) == (card.digest, filters, c2pa_trust)


def _at_source(plan: Plan, source: ScanSource, out: Store) -> Plan:
    """The plan, written again where its store has moved."""
    if plan.source != source:
        plan = replace(plan, source=source)
        plan.write(out)
    return plan


def _next_entry(entries: list[str]) -> str:
    number = int(Path(entries[-1]).stem) + 1 if entries else 1
    return f"history/{number:06d}.json"


@contextmanager
def _planning(out: Store, entry: str) -> Iterator[None]:
    """Say in the results folder that a scan which lists the whole source is about to write this entry. Scans of named
    objects then leave it the entry: one every few minutes would else have a long listing begin again and again."""
    out.write(PLANNING_FILE, json.dumps({"entry": entry, "since": datetime.now(UTC).isoformat()}).encode())
    try:
        yield
    finally:
        with suppress(UserError):
            out.delete(PLANNING_FILE)


def _is_planned(out: Store, entry: str) -> bool:
    """Whether a scan of the whole source is about to write this entry."""
    planning = json.loads(out.read(PLANNING_FILE) or b"{}")
    if planning.get("entry") != entry:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(planning["since"]) < LONGEST_PLANNING


def _objects_to_score(out: Store, plan: Plan) -> list[str]:
    """The keys in a plan's shards. A scan that takes the place of this one has to look at them, too: whoever named them
    to it may have been told that they are done."""
    prefix = f"scans/{plan.scan}/shards/"
    return [key for data in _read_all(out, prefix) for key in from_parquet(data).column("key").to_pylist()]


def _claim(out: Store, entry: str, new: Plan) -> bool:
    """Write the new plan into the history, unless another planner was faster; returns whether the entry is this
    plan's."""
    if new.conditional_writes:
        return out.write_new(entry, _naming(new))
    if out.read(entry) is not None:
        return False
    out.write(entry, _naming(new))
    return _is_settled(out, entry, new)


def _naming(plan: Plan) -> bytes:
    """The history entry of a plan."""
    return json.dumps({"scan": plan.scan}).encode()


def _is_settled(out: Store, entry: str, plan: Plan) -> bool:
    """On a store without conditional writes, where the last planner to write wins: whether an entry that names this
    plan will go on to do so. After the wait, all planners that saw no entry have written theirs."""
    time.sleep(SETTLE_S)
    return out.read(entry) == _naming(plan)


def check_claimed(out: Store, plan: Plan) -> None:
    """Raise ClaimLostError where the history does not name this plan's scan."""
    if plan.scan not in _newest_first(out, sorted(out.names("history/"))):
        raise ClaimLostError(
            f"{out.url} ignores conditional writes and another scan took this one's place; run it again"
        )


def is_newest(out: Store, plan: Plan) -> bool:
    """Whether no later scan of the history is complete."""
    later = takewhile(lambda scan: scan != plan.scan, _newest_first(out, sorted(out.names("history/"))))
    return not any(is_complete(out, scan) for scan in later)


def check_results_outside_source(source: ScanSource, out: Store) -> None:
    """Raise PlanError where the results lie inside the source: they would be scanned as new objects every time."""
    inner, outer = absolute_url(out.url), absolute_url(source.url)
    # A bucket's prefix `s3://b/pho` covers `s3://b/photos`; a bucket `s3://b` does not cover `s3://b2`, nor do folders.
    covers_longer_names = "://" in outer and outer.count("/") > 2
    outer = outer if covers_longer_names else f"{outer}/"
    if source.manifest is None and f"{inner.rstrip('/')}/".startswith(outer):
        raise PlanError(f"--out {out.url} lies inside what is scanned, {source.url}; choose another place")


def honours_conditional_writes(out: Store) -> bool:
    """Whether the store honours If-None-Match: several S3-compatible stores accept it and overwrite all the same."""
    probe = f"probe-{uuid.uuid4().hex}"
    honoured = out.write_new(probe, b"1") and not out.write_new(probe, b"2")
    out.delete(probe)
    return honoured


def _make(
    source: ScanSource,
    filters: Filters,
    card: Card,
    out: Store,
    shard_size: ShardSize,
    max_objects: int,
    retry_archived: bool,
    keys: Sequence[str] | None = None,
    sample: int = 0,
    previous_in: Store | None = None,
    most_to_score: int = 0,
    c2pa_trust: str | None = None,
) -> Plan:
    """List the source, or look up these keys alone, and write all of a plan but its entry in the history. For an
    estimate, the last scan is in `previous_in` instead of `out`, and `most_to_score` of the objects go into shards."""
    scan = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    store = source.open()
    started = time.monotonic()
    before = previous_in or out
    previous = last_complete(before)
    _check_sample(before, previous, sample, named=keys is not None)
    with tempfile.TemporaryDirectory(prefix="patchscan-plan-", ignore_cleanup_errors=True) as scratch:
        by_version = source.manifest is not None
        join = ListingJoin(Path(scratch), filters, by_version=by_version, part_only=keys is not None)
        found = None if keys is None else _look_up(store, keys)
        join.add_listing(_objects(source, store) if found is None else found)
        listing = {"seconds": time.monotonic() - started, "requests": dict(store.requests)}
        if sample:
            join.sample(sample)
        if previous:
            judged_by = trust_digest(c2pa_trust) if c2pa_trust else None
            parts = read_parts(before, previous.scan)
            join.add_previous(parts, card.digest, retry_archived=retry_archived, c2pa_trust=judged_by)
        counts = join.counts()
        _check_number(source, counts, max_objects)
        to_score = counts["listed"] - counts["unchanged"]
        named = None
        if keys is not None and found is not None:
            unchanged = len(found) - counts["filtered"] - to_score
            named = {"objects": len(found), "unchanged": unchanged, "missing": len(keys) - len(found)}
        is_needed = named is None or to_score > 0
        bytes_to_score = join.bytes_to_score()
        if most_to_score:
            join.sample(most_to_score)
        for index, table in enumerate(join.unchanged() if is_needed and not most_to_score else ()):
            out.write(f"scans/{scan}/rows/unchanged-{shards.name(index)}.parquet", table_to_parquet(table))
        count = 0
        for table in _shard_tables(join, shard_size):
            out.write(f"scans/{scan}/shards/{shards.name(count)}.parquet", table_to_parquet(table))
            count += 1
        plan = Plan(
            scan=scan,
            source=source,
            filters=filters,
            model=card.name,
            version=card.version,
            digest=card.digest,
            card=asdict(card),
            shards=count,
            previous=previous.scan if previous else None,
            listing=listing,
            conditional_writes=honours_conditional_writes(out),
            created_at=datetime.now(UTC).isoformat(),
            sample=sample,
            bytes_to_score=bytes_to_score,
            named=named,
            c2pa_trust=c2pa_trust,
            **counts,
        )
    if is_needed:
        plan.write(out)
    return plan


def _look_up(store: Store, keys: Sequence[str]) -> list[ObjectInfo]:
    """The objects with these keys, as they are now; of a key without an object, nothing."""
    with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
        return [info for info in pool.map(store.look_up, keys) if info]


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


def _check_number(source: ScanSource, counts: dict[str, int], max_objects: int) -> None:
    """Raise PlanError where there is more to score than the user allows: somebody may have named a whole bucket by
    mistake."""
    to_score = counts["listed"] - counts["unchanged"]
    if 0 < max_objects < to_score:
        raise PlanError(
            f"{source.url} holds {to_score:,} objects to score, more than --max-objects {max_objects:,} "
            "(MAX_OBJECTS on a cluster): nothing was scored; raise it, or scan less"
        )


def _objects(source: ScanSource, store: Store) -> Iterator[ObjectInfo]:
    if source.manifest is None:
        return store.objects()
    bucket, prefix = split_url(source.url) if is_bucket(source.url) else (None, "")
    listed = manifest.objects(source.manifest, bucket, source.endpoint_url)
    return (info for info in listed if info.key.startswith(prefix))


def read_parts(out: Store, scan: str) -> Iterator[bytes]:
    """Yield the Parquet files of a scan's table: its shards' parts and the rows carried over."""
    return _read_all(out, f"scans/{scan}/rows/")


def _read_all(out: Store, prefix: str) -> Iterator[bytes]:
    for name in sorted(out.names(prefix)):
        data = out.read(name)
        assert data is not None
        yield data


def _shard_tables(join: ListingJoin, shard_size: ShardSize) -> Iterator[pa.Table]:
    """The objects to score, cut into shards, one at a time."""
    rows = join.to_score()
    for first, end in shards.cut(join.sizes_to_score(), shard_size.max_objects, shard_size.max_bytes):
        yield pa.Table.from_pylist([next(rows) for _ in range(end - first)], schema=LISTED)


def _discard(out: Store, scan: str) -> None:
    for name in list(out.names(f"scans/{scan}/")):
        out.delete(name)


def absolute_url(url: str) -> str:
    """Return an s3:// URL unchanged, a folder as its absolute path."""
    return url if "://" in url else str(Path(url).resolve())
