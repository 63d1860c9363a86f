"""Tell what is different about the images that are new since an earlier scan: how they are stored, what they say about
their origin, and their scores.

The images are new or changed where the earlier scan scored no object of the same key and ETag. They are compared with
all images that the earlier scan scored, so no image is on both sides.
"""

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from patchscan.reporting.statistics import difference_of_rates, holm, wilson
from patchscan.scanning import drift
from patchscan.scanning.summary import C2PA_STATE, EXAMPLES, LARGEST_GROUPS, largest_groups
from patchscan.scanning.table import ScanTable


def _steps(value: str, unit: str, bounds: tuple[int, ...], scale: int = 1) -> str:
    """SQL that names the range of a number: below the first of the bounds, between two of them, or from the last up;
    NULL of NULL."""
    between = "".join(
        f" WHEN {value} < {high * scale} THEN '{low:,} to {high:,}{unit}'" for low, high in pairwise(bounds)
    )
    return (
        f"CASE WHEN {value} IS NULL THEN NULL WHEN {value} < {bounds[0] * scale} THEN 'below {bounds[0]:,}{unit}'"
        f"{between} ELSE '{bounds[-1]:,}{unit} and more' END"
    )


QUALITIES = (60, 75, 85, 95)
STORAGE = {
    "format": "image.format",
    "file size": _steps("size", " KB", (30, 100, 300, 1_000, 3_000, 10_000), 1_000),
    "longest side": _steps("greatest(image.width, image.height)", " pixels", (512, 1_024, 2_048, 4_096)),
    "JPEG quality": (
        f"CASE WHEN image.format NOT IN ('JPEG', 'MPO') THEN 'no JPEG' ELSE {_steps('jpeg_quality', '', QUALITIES)} END"
    ),
    "looks like": "tier",
}
PROVENANCE = {
    "C2PA manifest": f"coalesce({C2PA_STATE}, 'none')",
    "C2PA signer": "coalesce(provenance.c2pa_signer, 'none')",
    "digital source type": "coalesce(provenance.digital_source_type, 'none')",
    "generator's text": "coalesce(split_part(provenance.generator, ':', 1), 'none')",
    "watermark": "watermark",
}
# A scan of named objects keeps the rows of others, also those that another model has made.
VERDICTS = {"verdict": "CASE WHEN NOT other_model THEN verdict END"}
KINDS = ("storage", "provenance", "verdicts")
# Where two lists of authorities judged the signers, who is trusted is not the files' doing.
ANY_SIGNER = (
    "CASE WHEN provenance.c2pa IN ('Trusted', 'Valid') THEN 'unaltered' ELSE coalesce(provenance.c2pa, 'none') END"
)


def what_changed(table: ScanTable, earlier: ScanTable) -> dict[str, Any]:
    """The section of report.json on what changed since an earlier scan.

    `compared_with`: that scan, and whether it is of the `same_model` and judged signers by the `same_list`. `objects`:
    how many objects with a row there are `now` and were `before`, and are `gone` (None where one of the scans did not
    look at all that the other did); how many scored images are `new` (not scored before), `changed` since they were
    scored, or the `same`. `storage`, `provenance` and `verdicts`: one object for each property of images (`_property`),
    the p values corrected by Holm's method over all of them; `verdicts` is empty and `scores` None for another model,
    else `scores` is the comparison of `drift.compare`. `examples`: the images that the page shows (`_pictured`).
    """
    table.set_beside(earlier)
    plan, before = table.plan, earlier.plan
    same_model, same_list = before.digest == plan.digest, before.c2pa_trust == plan.c2pa_trust
    provenance = PROVENANCE if same_list else PROVENANCE | {"C2PA manifest": ANY_SIGNER}
    # Else an object that only the earlier scan has a row of need not be gone.
    looked_at_the_same = not plan.sample and (plan.source.url, plan.filters) == (before.source.url, before.filters)
    sections = {
        name: [_property(table, title, value) for title, value in properties.items()]
        for name, properties in zip(KINDS, (STORAGE, provenance, VERDICTS if same_model else {}), strict=True)
    }
    properties = [one for kind in KINDS for one in sections[kind]]
    _judge(properties)
    return {
        "compared_with": {
            "scan": before.scan,
            "results": earlier.results,
            "source": before.source.url,
            "started_at": before.created_at,
            "sample": before.sample,
            "same_model": same_model,
            "same_list": same_list,
        },
        "objects": _objects(table) | ({} if looked_at_the_same else {"gone": None}),
        **sections,
        "scores": _scores(table) if same_model else None,
        "examples": _pictured(properties),
    }


def _objects(table: ScanTable) -> dict[str, Any]:
    scored_then = "(FROM earlier_rows WHERE status = 'scored')"
    return table.query_one(
        "SELECT (SELECT count(*) FROM earlier_rows) AS before, (SELECT count(*) FROM rows) AS now,"
        " (SELECT count(*) FROM earlier_rows ANTI JOIN rows USING (key)) AS gone,"
        f" (SELECT count(*) FROM new_rows ANTI JOIN {scored_then} USING (key)) AS new,"
        f" (SELECT count(*) FROM new_rows SEMI JOIN {scored_then} USING (key)) AS changed,"
        " (SELECT count(*) FROM rows WHERE status = 'scored') - (SELECT count(*) FROM new_rows) AS same"
    )


def _property(table: ScanTable, title: str, value: str) -> dict[str, Any]:
    """How the scored images divide by one property, the SQL `value`; those of which it is not known (NULL: older tables
    lack columns) are left out.

    `property`, the number of `before` and `new` images, the stability index `psi` and `p_value` (drift.shift), and
    `values`, those whose share changed most first. Each has its counts, the `change` of its share with its interval,
    and `examples`, new images if there are any; these are left out where there are too few images to compare, and
    examples where there is no change to speak of."""
    name = f"{value} AS name"
    both = (
        f"SELECT {name}, TRUE AS is_new, * FROM new_rows WHERE name IS NOT NULL UNION ALL BY NAME"
        f" SELECT {name}, FALSE AS is_new, * FROM earlier_rows WHERE status = 'scored' AND name IS NOT NULL"
    )
    counts = "count(*) FILTER (NOT is_new) AS before, count(*) FILTER (is_new) AS new"
    found = largest_groups(table, f"SELECT name, {counts} FROM ({both}) GROUP BY name ORDER BY count(*) DESC, name")
    before, new = (np.array([row[side] for row in found], np.int64) for side in ("before", "new"))
    psi, p_value = drift.shift(before, new)
    totals = {"before": int(before.sum()), "new": int(new.sum())}
    result = {"property": title, **totals, "psi": psi, "p_value": p_value}
    if psi is None:
        return result | {"values": [row | {"change": None, "examples": []} for row in found]}
    examples = _examples(table, both) if psi >= drift.PSI_MOVED else {}
    for row in found:
        now, then = (wilson(row[side], totals[side]) for side in ("new", "before"))
        row.update(change=asdict(difference_of_rates(now, then)), examples=examples.get(row["name"], []))
    return result | {"values": sorted(found, key=lambda row: -abs(row["change"]["value"]))}


def _examples(table: ScanTable, both: str) -> dict[str, list[dict[str, Any]]]:
    """A few images of each value, new ones first, in an order by a hash of their keys."""
    example = ", ".join(f"'{name}': {name}" for name in ("key", "version_id", "etag", "p_ai", "patch", "is_new"))
    found = table.query(
        f"SELECT name, arg_min({{{example}}}, (NOT is_new, md5(key), key, version_id), {EXAMPLES}) AS examples"
        f" FROM ({both}) GROUP BY name ORDER BY count(*) DESC, name LIMIT {LARGEST_GROUPS}"
    )
    return {row["name"]: row["examples"] for row in found}


def _pictured(properties: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New images of the value that grew most, of each property that shifted; `of` says of which."""
    shown: dict[tuple[str, str | None], dict[str, Any]] = {}
    for one in properties:
        if one["reading"] == drift.SHIFTED:
            grown = next(row for row in one["values"] if row["change"]["value"] > 0)
            for example in grown["examples"]:
                if example["is_new"]:
                    image = shown.setdefault((example["key"], example["version_id"]), example | {"of": []})
                    image["of"].append(f"{one['property']}: {grown['name']}")
    return list(shown.values())


def _judge(properties: list[dict[str, Any]]) -> None:
    """Add `p_corrected` and `reading` to properties: `shifted`, `moved`, `stable`, or None where there are too few
    images."""
    told = [one for one in properties if one["psi"] is not None]
    for one in properties:
        one["p_corrected"] = one["reading"] = None
    for one, p_corrected in zip(told, holm([one["p_value"] for one in told]), strict=True):
        one["p_corrected"], one["reading"] = p_corrected, drift.reading(one["psi"], p_corrected)


def _scores(table: ScanTable) -> dict[str, Any]:
    """Compare the scores of new images with all that the earlier scan's model has made."""
    before = "SELECT logit FROM earlier_rows WHERE status = 'scored' AND NOT other_model"
    sample = np.concatenate([np.empty(0), *table.stream_column(f"FROM ({before}) USING SAMPLE reservoir(100000 ROWS)")])
    if len(sample) == 0:
        return drift.compare(np.zeros(1, np.int64), np.zeros(1, np.int64))
    edges = drift.bin_edges(sample)
    now = table.stream_column("SELECT logit FROM new_rows WHERE NOT other_model")
    return drift.compare(drift.count_in_bins(table.stream_column(before), edges), drift.count_in_bins(now, edges))
