"""Compute the sections of report.json: counts, verdicts, errors, scores, prefixes, months, provenance, cost."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from patchscan.detector.answer import TIERS
from patchscan.detector.card import Decision
from patchscan.reporting.statistics import population_count
from patchscan.scanning.plan import Plan
from patchscan.scanning.table import ScanTable

HISTOGRAM_BINS = 50
MOST_SUSPICIOUS = 24
EXAMPLES = 3
# The generator whose watermark an image bears, NULL where it bears none.
WATERMARK = "nullif(watermark, 'none')"
# Who signed a manifest makes three different things of it.
C2PA_STATE = (
    "CASE provenance.c2pa WHEN 'Trusted' THEN 'unaltered, trusted signer' WHEN 'Valid' THEN 'unaltered, unknown signer'"
    " WHEN 'Invalid' THEN 'invalid' ELSE provenance.c2pa END"
)
LARGEST_GROUPS = 30

BY_STATUS = """
    SELECT count(*) AS rows,
           count(*) FILTER (NOT carried AND status = 'scored') AS scored,
           count(*) FILTER (NOT carried AND status = 'rejected') AS rejected,
           count(*) FILTER (NOT carried AND status = 'failed') AS failed,
           count(*) FILTER (carried) AS unchanged,
           count(*) FILTER (NOT carried AND verdict = 'ai') AS new_ai,
           count(DISTINCT (key, version_id)) AS objects
    FROM rows
"""
VERDICTS, WITHOUT_SCORE = ("ai", "real", "uncertain"), ("rejected", "failed")
BY_VERDICT = ", ".join(f"count(*) FILTER (verdict = '{name}') AS {name}" for name in VERDICTS)
GROUPED = (
    "SELECT {group} AS name, count(*) AS objects, count(*) FILTER (status = 'scored') AS scored,"
    f" {BY_VERDICT}, count(*) FILTER (status = 'rejected') AS rejected, count(*) FILTER (status = 'failed') AS failed"
    " FROM rows GROUP BY name"
)


def totals(table: ScanTable) -> dict[str, Any]:
    """The scan's counts, and whether they add up: listed = scored + rejected + failed + unchanged, and no object twice.
    `new_ai` of the scored images were called AI."""
    counted, plan = table.query_one(BY_STATUS), table.plan
    rows, objects = counted.pop("rows"), counted.pop("objects")
    return {
        "listed": plan.listed,
        **counted,
        "deleted": plan.deleted,
        "filtered": plan.filtered,
        "duplicates": plan.duplicates,
        "adds_up": rows == objects == plan.listed,
    }


def named(table: ScanTable) -> dict[str, Any] | None:
    """What a scan of named objects looked at: `objects`, of them `unchanged`, and `missing` names; `kept` rows of
    others were carried over without a look, `other_model` of all rows are of another model. None where the whole source
    was listed."""
    if table.plan.named is None:
        return None
    kept = table.plan.unchanged - table.plan.named["unchanged"]
    return {**table.plan.named, "kept": kept, "other_model": table.count("other_model")}


def kinds(table: ScanTable) -> dict[str, int]:
    """All objects by verdict (VERDICTS), and those without a score by status, those carried over included."""
    found = table.query("SELECT coalesce(verdict, status) AS kind, count(*) AS n FROM rows GROUP BY kind")
    return dict.fromkeys((*VERDICTS, *WITHOUT_SCORE), 0) | {row["kind"]: row["n"] for row in found}


def whole(plan: Plan, found: Mapping[str, int]) -> dict[str, Any] | None:
    """What a random sample says about all objects: how many are of each kind in `found`, which adds up to the sample,
    with 95 % intervals. None where all objects were scanned."""
    if not plan.sample:
        return None
    population = plan.listed + plan.unsampled
    counted = {kind: population_count(count, plan.listed, population) for kind, count in found.items()}
    return {
        "sampled": plan.listed,
        "objects": population,
        "kinds": [
            {"kind": kind, "sampled": found[kind], "estimate": {"value": one.value, "low": one.low, "high": one.high}}
            for kind, one in counted.items()
        ],
    }


def engines(table: ScanTable) -> list[dict[str, Any]]:
    """Scored objects by the engine that scored them (None: unknown), those carried over included."""
    return table.query(
        "SELECT engine, count(*) AS scored FROM rows WHERE status = 'scored' GROUP BY ALL ORDER BY scored DESC, engine"
    )


def deciders(table: ScanTable) -> list[dict[str, Any]]:
    """Scored objects by the detector of a cascade that decided; empty where there is no cascade."""
    return table.query(
        "SELECT decided_by AS name, count(*) AS scored FROM rows WHERE decided_by IS NOT NULL GROUP BY ALL"
        " ORDER BY scored DESC, name"
    )


def errors(table: ScanTable) -> list[dict[str, Any]]:
    """Objects without a score: status, code, how many, how many of them were not carried over (`new`), and the first
    few by key, new ones first."""
    return table.query(
        "SELECT status, error_code AS code, count(*) AS n, count(*) FILTER (NOT carried) AS new,"
        f" arg_min({{'key': key, 'message': error_message}}, (carried, key, version_id), {EXAMPLES}) AS examples"
        " FROM rows WHERE status <> 'scored' GROUP BY ALL ORDER BY n DESC, code"
    )


def histogram(table: ScanTable) -> dict[str, list[int]]:
    """Scored objects in HISTOGRAM_BINS equal bins of p_ai, for each verdict."""
    found = table.query(
        f"SELECT verdict, least(floor(p_ai * {HISTOGRAM_BINS})::INT, {HISTOGRAM_BINS - 1}) AS bin, count(*) AS n"
        " FROM rows WHERE status = 'scored' GROUP BY ALL"
    )
    counts = {verdict: [0] * HISTOGRAM_BINS for verdict in ("real", "uncertain", "ai")}
    for row in found:
        counts[row["verdict"]][row["bin"]] = row["n"]
    return counts


def by_tier(table: ScanTable, decision: Decision) -> list[dict[str, Any]]:
    """Scored objects and their verdicts by tier, with the numbers that decide there; `covered` is false where all
    verdicts are uncertain, because the model cannot tell AI from real in that tier."""
    counts = {row["name"]: row for row in table.query(GROUPED.format(group="tier"))}
    return [
        {
            "tier": tier,
            **{name: counts[tier][name] for name in ("scored", "ai", "uncertain", "real")},
            "threshold": decision.of(tier).threshold,
            "abstain_low": decision.of(tier).abstain_low,
            "abstain_high": decision.of(tier).abstain_high,
            "covered": decision.covers(tier),
        }
        for tier in TIERS
        if tier in counts and counts[tier]["scored"]
    ]


def by_reason(table: ScanTable) -> list[dict[str, Any]]:
    """How many images are uncertain for each reason, the most frequent first."""
    return table.query(
        "SELECT reason, count(*) AS n FROM rows WHERE verdict = 'uncertain' AND reason IS NOT NULL"
        " GROUP BY ALL ORDER BY n DESC, reason"
    )


def most_suspicious(table: ScanTable) -> list[dict[str, Any]]:
    """The images with the highest p_ai and a verdict of `ai`, highest first."""
    return table.query(
        "SELECT key, version_id, etag, size, p_ai, verdict, patch, image, provenance,"
        f" {WATERMARK} AS watermark FROM rows WHERE verdict = 'ai'"
        f" ORDER BY p_ai DESC, logit DESC, key LIMIT {MOST_SUSPICIOUS}"
    )


def folder_name(base: str) -> str:
    """SQL for the first folder of a key below `base`."""
    inner = f"substr(key, {len(base) + 1})"
    return f"CASE WHEN contains({inner}, '/') THEN split_part({inner}, '/', 1) || '/' ELSE '(no folder)' END"


def largest_groups(table: ScanTable, groups: str) -> list[dict[str, Any]]:
    """The first groups that a query returns, and the sums of its others as `(others)`. There may be a group for each
    object, so these are left to the database."""
    shown = table.query(f"{groups} LIMIT {LARGEST_GROUPS}")
    columns = ", ".join(f"sum({field})::BIGINT AS {field}" for field in shown[0] if field != "name") if shown else "1"
    others = table.query_one(f"SELECT count(*) AS n, {columns} FROM ({groups} OFFSET {LARGEST_GROUPS})")
    if others["n"]:
        shown.append({"name": f"({others.pop('n'):,} others)", **others})
    return shown


def by_prefix(table: ScanTable, base: str) -> list[dict[str, Any]]:
    """Counts by the first folder below `base`, the largest first; the others together as `(others)`."""
    return largest_groups(table, GROUPED.format(group=folder_name(base)) + " ORDER BY objects DESC, name")


def by_month(table: ScanTable) -> list[dict[str, Any]]:
    """Counts by the month of last modification, oldest first."""
    return table.query(GROUPED.format(group="coalesce(strftime(last_modified, '%Y-%m'), 'unknown')") + " ORDER BY name")


def provenance(table: ScanTable) -> list[dict[str, Any]]:
    """Verdicts of the files that claim something about their own origin, by kind of claim and claim."""
    claims = (
        ("C2PA manifest", C2PA_STATE),
        ("C2PA signer, unaltered", "provenance.c2pa_signer"),
        ("digital source type", "provenance.digital_source_type"),
        ("generator text", "split_part(provenance.generator, ':', 1)"),
        ("watermark", WATERMARK),
    )
    found: list[dict[str, Any]] = []
    for kind, claim in claims:
        found += table.query(
            f"SELECT '{kind}' AS kind, {claim} AS claim, count(*) AS objects, {BY_VERDICT}"
            f" FROM rows WHERE {claim} IS NOT NULL GROUP BY ALL ORDER BY objects DESC, claim LIMIT {LARGEST_GROUPS}"
        )
    return found


def flagged(table: ScanTable, decision: Decision) -> tuple[int, int]:
    """How many images this scan's model has scored at or over the threshold of their tier, abstain band or not, and how
    many it has scored. As in the rates that evaluation measures, a graphic (out of domain in a tier that the model
    covers) is not over it."""
    covered = ", ".join(f"'{tier}'" for tier in TIERS if decision.covers(tier))
    graphic = f"coalesce(reason = 'out_of_domain' AND tier IN ({covered}), false)"
    thresholds = [decision.of(tier).threshold for tier in TIERS]
    threshold = f"CASE tier {' '.join(f'WHEN {tier!r} THEN ?' for tier in TIERS)} END"
    counted = table.query_one(
        f"SELECT count(*) FILTER (p_ai >= {threshold} AND NOT {graphic}) AS over, count(p_ai) AS n FROM rows"
        " WHERE NOT other_model",
        *thresholds,
    )
    return counted["over"], counted["n"]


def cost(table: ScanTable) -> dict[str, Any]:
    """What this scan used, listing included. `model_s` are seconds of forward passes by device: of cores (`cpu`) or of
    GPUs (`cuda`). `per_1000` figures are for 1,000 objects that were not carried over."""
    spent, listing = table.cost, table.plan.listing
    processed = table.count("NOT carried")
    requests = Counter(listing["requests"]) + Counter(_spent_by(spent, "requests."))
    per_thousand = 1000 / processed if processed else 0.0
    return {
        "objects": processed,
        "wall_s": float(spent["wall_s"]),
        "objects_per_s": processed / spent["wall_s"] if spent["wall_s"] else None,
        "cpu_s_per_1000": spent["cpu_s"] * per_thousand,
        "model_s_per_1000": {device: s * per_thousand for device, s in _spent_by(spent, "model_s.").items()},
        "bytes_read": int(spent["bytes_read"]),
        "requests": {operation: int(count) for operation, count in requests.items()},
        "listing_s": listing["seconds"],
    }


def _spent_by(spent: Mapping[str, float], kind: str) -> dict[str, float]:
    """The entries whose names begin with `kind`, by the rest of their names."""
    return {name.removeprefix(kind): value for name, value in spent.items() if name.startswith(kind)}
