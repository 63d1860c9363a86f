"""The end of a scan: count its rows, write report.html and report.json, and last of all `_SUCCESS`."""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from detector.card import Card
from evaluation import pages, plots
from scanning import summary, thumbnails
from scanning.plan import SUCCESS_FILE, Plan, PlanError
from scanning.store import Store
from scanning.table import ScanTable

Report = dict[str, Any]


def reduce(out: Store, plan: Plan) -> Report:
    """Write the reports of a scan whose shards are all worked, then `_SUCCESS`; the newest reports also stand at the
    top of the results folder. Raises Incomplete, and PlanError where the counts do not add up."""
    report, page = build(out, plan)
    if not report["totals"]["adds_up"]:
        raise PlanError(f"the rows of scan {plan.scan} do not add up to what was listed: {report['totals']}")
    text = json.dumps(report, indent=1, allow_nan=False).encode()
    for folder in (f"scans/{plan.scan}/", ""):
        out.write(f"{folder}report.json", text)
        out.write(f"{folder}report.html", page.encode())
    for name in list(out.names(f"scans/{plan.scan}/progress/")):
        out.delete(name)
    out.write(f"scans/{plan.scan}/{SUCCESS_FILE}", json.dumps(report["totals"]).encode())
    return report


def build(out: Store, plan: Plan) -> tuple[Report, str]:
    """The report of a scan, and its page."""
    with tempfile.TemporaryDirectory(prefix="patchscan-report-") as scratch:
        table = ScanTable(out, plan, Path(scratch))
        report = _figures(table, plan)
    source = plan.source.open()
    pictures = [thumbnails.thumbnail(source, row) for row in report["most_suspicious"]]
    drawing = plots.data_uri(plots.png(_histogram(report)))
    return report, pages.render("scan.html", report, package="scanning", pictures=pictures, histogram=drawing)


def _figures(table: ScanTable, plan: Plan) -> Report:
    card = Card.from_dict(plan.card)
    base = plan.source.url.removeprefix("s3://").partition("/")[2] if plan.source.url.startswith("s3://") else ""
    return {
        "scan": plan.scan,
        "source": plan.source.url,
        "started_at": plan.created_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "previous": plan.previous,
        "model": {
            "name": card.name,
            "version": card.version,
            "digest": plan.digest,
            "threshold": card.decision.threshold,
            "abstain": [card.decision.abstain_low, card.decision.abstain_high],
            "chosen_by": card.decision.chosen_by,
            "warnings": card.warnings,
        },
        "totals": summary.totals(table, plan),
        "verdicts": summary.verdicts(table),
        "errors": summary.errors(table),
        "histogram": summary.histogram(table),
        "most_suspicious": summary.most_suspicious(table),
        "by_prefix": summary.by_prefix(table, base[: base.rfind("/") + 1]),
        "by_month": summary.by_month(table),
        "cost": summary.cost(table, plan),
    }


def _histogram(report: Report) -> Any:
    drawing, axes = plots.figure(9.6, 3.2)
    axis, counts = axes[0, 0], np.array(report["histogram"])
    edges = np.linspace(0, 1, len(counts) + 1)
    threshold = report["model"]["threshold"]
    for first, last, colour in ((0.0, threshold, plots.REAL_COLOUR), (threshold, 1.01, plots.AI_COLOUR)):
        inside = (edges[:-1] >= first) & (edges[:-1] < last)
        axis.bar(edges[:-1][inside], counts[inside], width=1 / len(counts), align="edge", color=colour, alpha=0.75)
    plots.mark_decision(axis, threshold, tuple(report["model"]["abstain"]))
    axis.set(xlabel="p_ai", ylabel="images", xlim=(0, 1))
    return drawing


def summary_text(report: Report) -> str:
    """The short form of a report, for a terminal."""
    totals, verdicts = report["totals"], report["verdicts"]
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("scored", "rejected", "failed", "unchanged"))
    lines = [
        f"{report['source']}: {totals['listed']:,} objects listed = {counts}; {totals['deleted']:,} are gone",
        f"verdicts: {verdicts['ai']:,} AI, {verdicts['uncertain']:,} uncertain, {verdicts['real']:,} real",
        *(f"{row['status']} {row['code']}: {row['n']:,}, e.g. {row['examples'][0]['key']}" for row in report["errors"]),
        *(f"warning: {warning}" for warning in report["model"]["warnings"]),
    ]
    return "\n".join(lines)
