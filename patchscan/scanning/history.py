"""The history of a results folder: one entry for each scan, and which planner's scan an entry names."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.scanning.plan import Plan, PlanError, RemovedPlanError, ScanSource, is_complete
from patchscan.storage import open_store
from patchscan.storage.store import Store

PLANNING_FILE = "planning.json"
ENTRY_NAME = re.compile(r"history/\d{6,}\.json")
SCAN_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
# On a store without conditional writes: the time a planner may take between reading the history and writing its entry.
SETTLE_S = 5.0
# After so long PLANNING_FILE is that of a planner that was killed.
LONGEST_PLANNING = timedelta(days=1)


class ClaimLostError(PlanError):
    """Another scan was started at the same time and has won; the same command, run again, continues that one."""

    exit_code = EXIT_INTERRUPTED


def read_entries(out: Store) -> list[str]:
    """The names of the history's entries, oldest first. What else lies there, such as a file browser's .DS_Store, is
    not ours. Some stores do not list their newest keys yet, so what follows the listed entries is asked for by name."""
    entries = sorted(filter(ENTRY_NAME.fullmatch, out.names("history/")))
    while out.read(following := next_entry(entries)) is not None:
        entries.append(following)
    return entries


def _newest_first(out: Store, entries: list[str]) -> Iterator[str]:
    """Yield the scans of these history entries. Each entry is read when it is needed: there may be thousands."""
    for name in reversed(entries):
        data = out.read(name)
        assert data is not None
        yield json.loads(data)["scan"]


def last_complete(out: Store) -> Plan | None:
    """The plan of the newest complete scan, or None. One whose plan was removed, as by a lifecycle rule that has not
    come to its newest files yet, is no longer complete."""
    for scan in _newest_first(out, read_entries(out)):
        if is_complete(out, scan):
            with suppress(RemovedPlanError):
                return Plan.read(out, scan)
    return None


def newest_scan(out: Store, endpoint_url: str | None) -> Plan:
    """The plan of the newest complete scan, its source at `endpoint_url` (None: where it was). Raises PlanError where
    there is none."""
    plan = last_complete(out)
    if plan is None:
        raise PlanError(f"{out.url} holds no complete scan; run `patchscan scan` first")
    return plan.at(endpoint_url)


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


def unfinished_plan(out: Store, entries: list[str], source: ScanSource) -> Plan | None:
    """The plan of the newest of these history entries, where it is unfinished. Raises PlanError where it is of another
    source, RemovedPlanError where it is not there any more."""
    scan = next(_newest_first(out, entries), None)
    if scan is None:
        return None
    newest = Plan.read(out, scan)
    check_source(out, newest, source)
    if is_complete(out, scan):
        return None
    if newest.conditional_writes or _is_settled(out, entries[-1], newest):
        return newest
    return unfinished_plan(out, entries, source)  # of the planner that has won


def check_source(out: Store, newest: Plan, source: ScanSource) -> None:
    """Raise PlanError where the scans of the results folder, the newest of which is given, are of another source. One
    that found nothing binds nobody: its source may have been misspelt."""
    if newest.listed == 0 and is_complete(out, newest.scan):
        return
    if (newest.source.url, newest.source.list_name) != (source.url, source.list_name):
        theirs, ours = (
            one.url + (f" (manifest {one.manifest})" if one.manifest else "") for one in (newest.source, source)
        )
        raise PlanError(
            f"{out.url} holds scans of {theirs}, not of {ours}; give each source its own results folder with --out"
        )


def next_entry(entries: list[str]) -> str:
    """The name of the entry after these."""
    number = int(Path(entries[-1]).stem) + 1 if entries else 1
    return f"history/{number:06d}.json"


@contextmanager
def announced(out: Store, entry: str) -> Iterator[None]:
    """Say in the results folder that a scan which lists the whole source is about to write this entry. Scans of named
    objects then leave it the entry: one every few minutes would else have a long listing begin again and again."""
    out.write(PLANNING_FILE, json.dumps({"entry": entry, "since": datetime.now(UTC).isoformat()}).encode())
    try:
        yield
    finally:
        withdraw_announcement(out)


def withdraw_announcement(out: Store) -> None:
    """Say no longer that a scan is being planned, as after Ctrl-C: scans of named objects would wait for it for a
    day."""
    with suppress(UserError):
        out.delete(PLANNING_FILE)


def is_planned(out: Store, entry: str) -> bool:
    """Whether a scan of the whole source is about to write this entry."""
    planning = json.loads(out.read(PLANNING_FILE) or b"{}")
    if planning.get("entry") != entry:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(planning["since"]) < LONGEST_PLANNING


def claim(out: Store, entry: str, new: Plan) -> bool:
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
    if plan.scan not in _newest_first(out, read_entries(out)):
        raise ClaimLostError(
            f"{out.url} ignores conditional writes and another scan took this one's place; run it again"
        )


def is_newest(out: Store, plan: Plan) -> bool:
    """Whether no later scan of the history is complete."""
    later = takewhile(lambda scan: scan != plan.scan, _newest_first(out, read_entries(out)))
    return not any(is_complete(out, scan) for scan in later)


def honours_conditional_writes(out: Store) -> bool:
    """Whether the store honours If-None-Match: several S3-compatible stores accept it and overwrite all the same."""
    probe = f"probe-{uuid.uuid4().hex}"
    honoured = out.write_new(probe, b"1") and not out.write_new(probe, b"2")
    out.delete(probe)
    return honoured
