"""What a scan found, as the dict that report.json holds: counts, verdicts, errors, scores, prefixes, months, cost."""

from typing import Any

from scanning.plan import Plan
from scanning.table import ScanTable

HISTOGRAM_BINS = 50
MOST_SUSPICIOUS = 24
EXAMPLES = 3
LARGEST_GROUPS = 30

BY_STATUS = """
    SELECT count(*) AS rows,
           count(*) FILTER (NOT carried AND status = 'scored') AS scored,
           count(*) FILTER (NOT carried AND status = 'rejected') AS rejected,
           count(*) FILTER (NOT carried AND status = 'failed') AS failed,
           count(*) FILTER (carried) AS unchanged,
           count(DISTINCT key) AS keys
    FROM rows
"""
GROUPED = """
    SELECT {group} AS name, count(*) AS objects,
           count(*) FILTER (status = 'scored') AS scored,
           count(*) FILTER (verdict = 'ai') AS ai,
           count(*) FILTER (verdict = 'real') AS real,
           count(*) FILTER (verdict = 'uncertain') AS uncertain,
           count(*) FILTER (status = 'rejected') AS rejected,
           count(*) FILTER (status = 'failed') AS failed
    FROM rows GROUP BY name
"""


def totals(table: ScanTable, plan: Plan) -> dict[str, Any]:
    """The scan's counts, and whether they add up: listed = scored + rejected + failed + unchanged, no key twice."""
    counted = table.one(BY_STATUS)
    rows, keys = counted.pop("rows"), counted.pop("keys")
    return {
        "listed": plan.listed,
        **counted,
        "deleted": plan.deleted,
        "filtered": plan.filtered,
        "duplicates": plan.duplicates,
        "adds_up": rows == keys == plan.listed,
    }


def verdicts(table: ScanTable) -> dict[str, int]:
    """Scored objects by verdict, those carried over included."""
    found = table.ask("SELECT verdict, count(*) AS n FROM rows WHERE status = 'scored' GROUP BY verdict")
    return {"ai": 0, "real": 0, "uncertain": 0} | {row["verdict"]: row["n"] for row in found}


def errors(table: ScanTable) -> list[dict[str, Any]]:
    """Objects without a score: status, code, how many, and the first few of them by key."""
    return table.ask(
        "SELECT status, error_code AS code, count(*) AS n,"
        f" list({{'key': key, 'message': error_message}} ORDER BY key)[:{EXAMPLES}] AS examples"
        " FROM rows WHERE status <> 'scored' GROUP BY ALL ORDER BY n DESC, code"
    )


def histogram(table: ScanTable) -> list[int]:
    """Scored objects in HISTOGRAM_BINS equal bins of p_ai."""
    found = table.ask(
        f"SELECT least(floor(p_ai * {HISTOGRAM_BINS})::INT, {HISTOGRAM_BINS - 1}) AS bin, count(*) AS n"
        " FROM rows WHERE status = 'scored' GROUP BY bin"
    )
    counts = {row["bin"]: row["n"] for row in found}
    return [counts.get(number, 0) for number in range(HISTOGRAM_BINS)]


def most_suspicious(table: ScanTable) -> list[dict[str, Any]]:
    """The images with the highest p_ai and a verdict of `ai`, highest first."""
    return table.ask(
        "SELECT key, version_id, etag, size, p_ai, verdict, patch, image FROM rows WHERE verdict = 'ai'"
        f" ORDER BY p_ai DESC, logit DESC, key LIMIT {MOST_SUSPICIOUS}"
    )


def by_prefix(table: ScanTable, base: str) -> list[dict[str, Any]]:
    """Counts by the first folder below `base`, the largest first; the others together as `(others)`."""
    inner = f"substr(key, {len(base) + 1})"
    group = f"CASE WHEN contains({inner}, '/') THEN split_part({inner}, '/', 1) || '/' ELSE '(no folder)' END"
    found = table.ask(GROUPED.format(group=group) + " ORDER BY objects DESC, name")
    shown, others = found[:LARGEST_GROUPS], found[LARGEST_GROUPS:]
    if others:
        numbers = {field: sum(row[field] for row in others) for field in others[0] if field != "name"}
        shown.append({"name": f"({len(others)} others)"} | numbers)
    return shown


def by_month(table: ScanTable) -> list[dict[str, Any]]:
    """Counts by the month of last modification, oldest first."""
    return table.ask(GROUPED.format(group="coalesce(strftime(last_modified, '%Y-%m'), 'unknown')") + " ORDER BY name")


def cost(table: ScanTable, plan: Plan) -> dict[str, Any]:
    """What this scan used, listing included. `server_s` is the wall-clock time with at least one request of a worker at
    the scorer: a GPU's seconds where a worker has a GPU to itself. Per 1,000 means of the objects not carried over."""
    spent = table.cost
    worked = table.one("SELECT count(*) FILTER (NOT carried) AS n FROM rows")["n"]
    requests: dict[str, int] = {name: int(count) for name, count in plan.listing["requests"].items()}
    for name, count in spent.items():
        if name.startswith("requests."):
            operation = name.removeprefix("requests.")
            requests[operation] = requests.get(operation, 0) + int(count)
    per_thousand = 1000 / worked if worked else 0.0
    return {
        "objects": worked,
        "wall_s": float(spent["wall_s"]),
        "objects_per_s": worked / spent["wall_s"] if spent["wall_s"] else None,
        "cpu_s_per_1000": spent["cpu_s"] * per_thousand,
        "server_s_per_1000": spent["server_s"] * per_thousand,
        "bytes_read": int(spent["bytes_read"]),
        "requests": requests,
        "listing_s": plan.listing["seconds"],
    }
