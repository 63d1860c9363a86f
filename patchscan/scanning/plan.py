"""The plan of a scan, and where it lies in the results folder.

The results folder contains

    history/000001.json         one entry for each scan; the first planner to write it wins, and all others use its plan
    planning.json               the entry that a scan of the whole source is about to write, while it lists
    scans/<scan>/plan.json      the Plan of this module
    scans/<scan>/shards/        one listing for each shard (rows.LISTED)
    scans/<scan>/rows/          one Parquet part for each shard (rows.SCHEMA), and the rows carried over unchanged
    scans/<scan>/progress/      rows of unfinished shards
    scans/<scan>/report.*       the reports (beside them evaluation/, with labels); `_SUCCESS` is written last
    report.*                    copies of the newest complete scan's reports
    audits/                     samples of scans, people's labels of them, and what these tell
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patchscan.common.errors import UserError
from patchscan.scanning.listing import Filters
from patchscan.storage import open_store
from patchscan.storage.store import Store, check_address, is_bucket, split_url

PLAN_FILE = "plan.json"
SUCCESS_FILE = "_SUCCESS"
PLAN_FORMAT = 1
# The folder of an S3 Inventory's manifest, named by its time: `.../2026-01-05T01-00Z/manifest.json`.
INVENTORY_TIME = re.compile(r"/\d{4}-\d\d-\d\dT\d\d-\d\dZ(?=/manifest\.json$)")


class PlanError(UserError):
    """The results folder or the plan does not fit the command."""


class RemovedPlanError(PlanError):
    """A scan's folder was removed, as by a lifecycle rule, or never was."""


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """Where the objects are. `manifest` is the path or URL of a file that lists the keys; None: the store is listed."""

    url: str
    endpoint_url: str | None = None
    requester_pays: bool = False
    manifest: str | None = None

    @property
    def bucket(self) -> str | None:
        """The bucket; None of a folder."""
        return split_url(self.url)[0] if is_bucket(self.url) else None

    @property
    def prefix(self) -> str:
        """What all keys begin with: nothing in a folder."""
        return split_url(self.url)[1] if is_bucket(self.url) else ""

    @property
    def list_name(self) -> str | None:
        """What names the list of objects from one scan to the next: of an inventory, not the time it was made."""
        return self.manifest and INVENTORY_TIME.sub("", self.manifest)

    def identity(self, key: str, version_id: str | None) -> tuple[str, str | None]:
        """What tells a listed object from the others: of a manifest, which may list several versions of a key, the
        version too. A store lists each key once; the version is then the one that was fetched."""
        return key, version_id if self.manifest else None

    def open(self, threads: int = 32) -> Store:
        """Open the source's store, for `threads` calls at once."""
        return open_store(self.url, endpoint_url=self.endpoint_url, requester_pays=self.requester_pays, threads=threads)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json. Counts: `listed` = objects in the shards + `unchanged`; `filtered` (also what a manifest lists outside
    the source's prefix) and `duplicates` were left out before that; `deleted` were in the previous scan's table and are
    gone. `listing` holds the seconds and requests that listing took, `card` the model's card, `digest` its digest.

    `sample`: the most objects of a random sample, 0: all; `unsampled` objects were left out by it.
    `bytes_to_score`: the size of the objects in the shards, None where the list does not say it.

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
    bytes_to_score: int | None = 0
    named: dict[str, int] | None = None
    c2pa_trust: str | None = None
    format: int = PLAN_FORMAT

    @property
    def to_score(self) -> int:
        """How many objects are not carried over."""
        return self.listed - self.unchanged

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
        """Read the plan of a scan. Raises RemovedPlanError where there is none, PlanError."""
        name = f"scans/{scan}/{PLAN_FILE}"
        data = out.read(name)
        if data is None:
            raise RemovedPlanError(f"{out.url}/{name} is missing: is this a results folder of `patchscan scan`?")
        values = json.loads(data)
        try:
            if values.get("format") == PLAN_FORMAT:
                parts = {"source": ScanSource(**values["source"]), "filters": Filters(**values["filters"])}
                return cls(**values | parts)
        except TypeError:
            pass  # a later version's plans have more fields
        raise PlanError(f"{out.url}/{name} was made by another version of patchscan; choose a new results folder")


def parse_plan_url(plan_url: str) -> tuple[str, str]:
    """Split `OUT/scans/<scan>/plan.json` into (OUT, scan). Raises PlanError."""
    root, _, scan = plan_url.removesuffix(f"/{PLAN_FILE}").rpartition("/scans/")
    if not root or not plan_url.endswith(f"/{PLAN_FILE}") or "/" in scan:
        raise PlanError(f"{plan_url} is not the address of a plan: OUT/scans/SCAN/{PLAN_FILE}")
    return root, scan


def is_complete(out: Store, scan: str) -> bool:
    """Whether the scan is complete."""
    return out.read(f"scans/{scan}/{SUCCESS_FILE}") is not None


def read_parts(out: Store, scan: str) -> Iterator[bytes]:
    """Yield the Parquet files of a scan's table: its shards' parts and the rows carried over."""
    return read_all(out, f"scans/{scan}/rows/")


def read_all(out: Store, prefix: str) -> Iterator[bytes]:
    """Yield the contents of the Parquet files whose names begin with `prefix`, in the order of their names, but of
    those that are removed meanwhile, as by a lifecycle rule."""
    for name in sorted(name for name in out.names(prefix) if name.endswith(".parquet")):
        if (data := out.read(name)) is not None:
            yield data


def delete_all(out: Store, prefix: str) -> None:
    """Remove the files whose names begin with `prefix`."""
    for name in list(out.names(prefix)):
        out.delete(name)


def absolute_url(url: str) -> str:
    """Return an s3:// URL unchanged, a folder as its absolute path. Raises StoreError as `check_address` does."""
    check_address(url)
    return url if "://" in url else str(Path(url).resolve())
