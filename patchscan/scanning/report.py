"""Finish a scan: count its rows, write report.html and report.json, and last of all `_SUCCESS`."""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from patchscan.common.console import printable, sentence, tell
from patchscan.detector.card import Card
from patchscan.reporting import pages, plots
from patchscan.scanning import claims, prevalence, summary
from patchscan.scanning.alerts import find_alerts
from patchscan.scanning.changes import what_changed
from patchscan.scanning.history import check_claimed, is_newest
from patchscan.scanning.plan import SUCCESS_FILE, Plan, PlanError, delete_all, is_complete
from patchscan.scanning.table import ScanTable
from patchscan.scanning.thumbnails import PictureReader
from patchscan.scanning.trust import describe_trust
from patchscan.storage.store import Store, StoreError

Report = dict[str, Any]


def reduce(out: Store, plan: Plan, labels: str | None = None, compare_with: tuple[Store, Plan] | None = None) -> Report:
    """Write the reports of a scan whose shards are all done, then `_SUCCESS`, and return the report. The reports are
    also copied to the top of the results folder, unless a later scan is complete. `labels` (labels.scores_table) adds
    evaluation's report, unless nothing was listed. `compare_with` is the earlier scan to compare with, and where its
    results are, None: the previous one.

    Raises IncompleteScanError, LabelError, ClaimLostError, and PlanError where the counts do not add up.
    """
    check_claimed(out, plan)
    folder = f"scans/{plan.scan}/"
    with tempfile.TemporaryDirectory(prefix="patchscan-report-", ignore_cleanup_errors=True) as scratch:
        table = ScanTable(out, plan, Path(scratch))
        earlier = _earlier(plan, out, compare_with, Path(scratch))
        report = _figures(table) | {"finished_at": _finished_at(out, plan)}
        report["what_files_say"] = claims.what_files_say(table, _base(plan), earlier)
        report["changes"] = what_changed(table, earlier) if earlier else None
        report["evaluation"] = _evaluate(table, labels, out, Path(scratch)) if labels and plan.listed else None
    report["alerts"] = find_alerts(report)
    if not report["totals"]["adds_up"]:
        raise PlanError(f"the rows of scan {plan.scan} do not add up to what was listed: {report['totals']}")
    examples = report["changes"]["examples"] if report["changes"] else []
    pictures, changed = _thumbnails(plan, report["most_suspicious"], examples)
    drawing = plots.data_uri(plots.png(_histogram(report)))
    page = pages.render(
        "patchscan.scanning", "scan.html", report, pictures=pictures, changed=changed, histogram=drawing
    )
    figures = json.dumps(report, indent=1, allow_nan=False).encode()
    for where in (folder, "") if is_newest(out, plan) else (folder,):
        out.write(f"{where}report.json", figures)
        out.write(f"{where}report.html", page.encode())
    delete_all(out, f"{folder}progress/")
    out.write(f"{folder}{SUCCESS_FILE}", json.dumps(report["totals"]).encode())
    return report


def _thumbnails(plan: Plan, *shown: list[dict[str, Any]]) -> list[list[str | None]]:
    """The thumbnails of each list of rows, None for what can no longer be read. Where the source itself cannot be read,
    as when it is gone or on a machine that has no credentials for it, a report without pictures is better than none."""
    try:
        reader = PictureReader(plan.source.open())
        pictures = [[reader.thumbnail(row) for row in rows] for rows in shown]
    except StoreError as error:
        tell(f"the report has no pictures: {error}")
        return [[None] * len(rows) for rows in shown]
    drawn = [picture for rows in pictures for picture in rows]
    if missing := drawn.count(None):
        where = f"are not in {plan.source.url} as they were scored"
        tell(f"{missing} of the report's {len(drawn)} pictures are missing: the images {where}")
    return pictures


def _earlier(plan: Plan, out: Store, compare_with: tuple[Store, Plan] | None, scratch: Path) -> ScanTable | None:
    """The scan to compare with; None where there is no previous one, or it was removed, as older scans may be."""
    if compare_with:
        where, before = compare_with
        if before.scan == plan.scan:
            raise PlanError(f"{plan.scan} is the scan that is reported on: name an earlier one to compare with")
        return ScanTable(where, before, scratch)
    if plan.previous is None:
        return None
    try:
        return ScanTable(out, Plan.read(out, plan.previous), scratch)
    except PlanError:
        return None


def _base(plan: Plan) -> str:
    """What the keys of all objects begin with, up to the last folder."""
    prefix = plan.source.prefix
    return prefix[: prefix.rfind("/") + 1]


def _evaluate(table: ScanTable, labels: str, out: Store, scratch: Path) -> dict[str, Any]:
    """Write evaluation's report beside the scan's. Returns where it is and how many objects have labels. Where none of
    these has a score there is none: a scan must be complete without it."""
    from patchscan.scanning.labels import NotScoredError, evaluate, scores_table

    plan = table.plan
    try:
        scores, said = scores_table(table, labels, plan.source.endpoint_url)
    except NotScoredError as error:
        return {"labels": labels, "labelled": 0, "report": None, "findings": [str(error)]}
    files, where = scratch / "evaluation", f"scans/{plan.scan}/evaluation"
    found = evaluate(scores, said, Card.from_dict(plan.card), plan.source.url, files)
    for path in sorted(files.rglob("*")):
        if path.is_file():
            out.write(f"{where}/{path.relative_to(files).as_posix()}", path.read_bytes())
    return {
        "labels": labels,
        "labelled": len(scores),
        "report": f"{where}/report.html",
        "findings": found["findings"]["models"],
    }


def _finished_at(out: Store, plan: Plan) -> str:
    """When the scan was finished: also in a report that is written again later."""
    written = out.read(f"scans/{plan.scan}/report.json") if is_complete(out, plan.scan) else None
    return json.loads(written)["finished_at"] if written else datetime.now(UTC).isoformat(timespec="seconds")


def _figures(table: ScanTable) -> Report:
    plan, kinds = table.plan, summary.kinds(table)
    card = Card.from_dict(plan.card)
    return {
        "scan": plan.scan,
        "source": plan.source.url,
        "started_at": plan.created_at,
        "previous": plan.previous,
        "model": {
            "name": card.name,
            "version": card.version,
            "digest": plan.digest,
            "engines": summary.engines(table),
            "deciders": summary.deciders(table),
            "threshold": card.decision.threshold,
            "abstain": [card.decision.abstain_low, card.decision.abstain_high],
            "chosen_by": card.decision.chosen_by,
            "warnings": card.all_warnings,
        },
        "c2pa_trust": describe_trust(plan.c2pa_trust) if plan.c2pa_trust else None,
        "named": summary.named(table),
        "totals": summary.totals(table),
        "verdicts": {name: kinds[name] for name in summary.VERDICTS},
        "without_score": {name: kinds[name] for name in summary.WITHOUT_SCORE},
        "whole": summary.whole(plan, kinds),
        "errors": summary.errors(table),
        "histogram": summary.histogram(table),
        "by_tier": summary.by_tier(table, card.decision),
        "by_reason": summary.by_reason(table),
        "most_suspicious": summary.most_suspicious(table),
        "by_prefix": summary.by_prefix(table, _base(plan)),
        "by_month": summary.by_month(table),
        "provenance": summary.provenance(table),
        "prevalence": prevalence.estimate(*summary.flagged(table, card.decision), card),
        "cost": summary.cost(table),
    }


@plots.styled
def _histogram(report: Report) -> Figure:
    drawing, axes = plots.figure(9.6, 3.2)
    axis, below = axes[0, 0], np.zeros(summary.HISTOGRAM_BINS)
    edges = np.linspace(0, 1, summary.HISTOGRAM_BINS + 1)
    for verdict, colour in (("real", plots.REAL_COLOUR), ("uncertain", plots.FAINT), ("ai", plots.AI_COLOUR)):
        above = below + report["histogram"][verdict]
        axis.stairs(above, edges, baseline=below, fill=True, color=colour, label=f"verdict: {verdict}")
        below = above
    axis.set(xlabel="p_ai", ylabel="images", xlim=(0, 1))
    axis.legend(fontsize=8, loc="upper center", ncols=3)
    return drawing


def _whole_text(whole: dict[str, Any] | None) -> list[str]:
    if not whole or not whole["sampled"]:
        return []
    kinds = [(one["kind"], one["estimate"]) for one in whole["kinds"] if one["kind"] in ("ai", "uncertain", "real")]
    told = ", ".join(f"{one['value']:,.0f} {kind} ({one['low']:,.0f} to {one['high']:,.0f})" for kind, one in kinds)
    return [f"of all {whole['objects']:,} objects, by a sample of {whole['sampled']:,}, 95 % intervals: {told}"]


def _left_out_text(totals: dict[str, Any]) -> str:
    told = (("filtered", "left out by prefix or filters"), ("duplicates", "listed twice"))
    return "".join(f", {totals[name]:,} {words}" for name, words in told if totals.get(name))


def summary_text(report: Report) -> str:
    """Return a summary of a report for the terminal; what strangers wrote in it is escaped."""
    totals, verdicts = report["totals"], report["verdicts"]
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("scored", "rejected", "failed", "unchanged"))
    lines = [
        _what_was_named(report)
        if report["named"]
        else f"{report['source']}: {totals['listed']:,} objects listed = {counts}; {totals['deleted']:,} are gone"
        + _left_out_text(totals),
        f"verdicts: {verdicts['ai']:,} AI, {verdicts['uncertain']:,} uncertain, {verdicts['real']:,} real",
        *_whole_text(report["whole"]),
        *(sentence(one) for one in (report["evaluation"] or {"findings": ()})["findings"]),
        # Those carried over were told of when they were new.
        *(
            f"{row['status']} {row['code']}: {row['new']:,}, e.g. {row['examples'][0]['key']}"
            for row in report["errors"]
            if row["new"]
        ),
        *(f"alert: {alert['message']}" for alert in report["alerts"]),
        *(f"warning about the detector and its training: {warning}" for warning in report["model"]["warnings"]),
    ]
    return "\n".join(map(printable, lines))


def _what_was_named(report: Report) -> str:
    """What a scan of named objects looked at and what it kept, in a sentence."""
    totals, named = report["totals"], report["named"]
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("scored", "rejected", "failed", "filtered"))
    others = f", {named['other_model']:,} of all rows by another model" if named["other_model"] else ""
    return (
        f"{report['source']} was not listed; {named['objects']:,} objects were named = {counts}, "
        f"{named['unchanged']:,} unchanged; {named['missing']:,} names are of no object; "
        f"{named['kept']:,} rows of others were kept{others}"
    )
