"""Say what an audit's labels tell about the bucket and about the detector in it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from patchscan.reporting import pages, survey
from patchscan.reporting.statistics import Estimate, undefined
from patchscan.scanning.audit_labels import LABELS, Label, Labels, agreement, combine, read_labels, save_labels
from patchscan.scanning.audit_sample import AUDITS, AuditError, Sample, read_sample, threshold_at
from patchscan.storage.store import Store

REPORT_SCHEMA = "patchscan-audit-report/1"
# With fewer images of a class among the labels, its rate is mostly a guess.
FEW = 10


@dataclass(frozen=True)
class Threshold:
    """A threshold between two strata: the `rates` where images are called AI whose scores lie `margin` or more above
    the scan's threshold, in log odds, which are `called` images. `own`: it is the scan's own decision."""

    margin: float
    called: int
    own: bool
    rates: survey.Rates


@dataclass(frozen=True)
class Estimates:
    """`prevalence` by prediction-powered inference, `labels_only` without the scores, and the detector's `rates` in
    this bucket, None where nothing can be said of them."""

    prevalence: Estimate
    labels_only: Estimate
    rates: survey.Rates | None
    thresholds: list[Threshold]


def estimates(sample: Mapping[str, Any], labels: Mapping[int, Label]) -> Estimates:
    """Estimate from the images that are labelled `ai` or `real`; the others count as not drawn."""
    strata = survey.merge_unlabelled(_strata(sample, labels))
    if any(one.labelled == 0 for one in strata):
        nothing = undefined("stratified")
        return Estimates(nothing, nothing, None, [])
    counts = survey.possible_counts(strata)
    thresholds = []
    # Strata are in order of their scores, those that are called last: a threshold between two calls all that follow.
    lowest_called = min((one.margin for one in strata if one.called), default=np.inf)
    for first, one in enumerate(strata[1:], 1):
        if not one.called and one.margin > lowest_called:
            continue  # uncertain whatever they score, as graphics are: no threshold begins with these
        own = one.called and not strata[first - 1].called
        found = survey.rates(strata, [index >= first for index in range(len(strata))], counts)
        called = sum(each.population for each in strata[first:])
        thresholds.append(Threshold(0.0 if own else one.margin, called, own, found))
    return Estimates(
        survey.prevalence(strata, counts),
        survey.prevalence(strata, counts, use_predictions=False),
        survey.rates(strata, [one.called for one in strata], counts),
        thresholds,
    )


def _strata(sample: Mapping[str, Any], labels: Mapping[int, Label]) -> list[survey.Stratum]:
    strata = []
    for index, one in enumerate(sample["strata"]):
        rows = [
            row for row in sample["rows"] if row["stratum"] == index and labels.get(row["number"]) in ("ai", "real")
        ]
        is_ai = np.array([labels[row["number"]] == "ai" for row in rows], float)
        predicted = np.array([row["p_ai"] for row in rows], float)
        strata.append(
            survey.Stratum(one["population"], one["called"], one["margin"][0], one["mean_p_ai"], is_ai, predicted)
        )
    return strata


def build_report(sample: Sample, reviewers: Sequence[Labels], max_fpr: float) -> dict[str, Any]:
    """Return the content of an audit's report.json. Raises AuditError where labels are of images that were not
    drawn."""
    drawn = {row["number"]: row for row in sample["rows"]}
    for one in reviewers:
        if unknown := set(one.by_number) - set(drawn):
            raise AuditError(f"the labels name image {min(unknown)}, but {len(drawn)} images were drawn")
    labels, disagreed = combine(reviewers)
    found = estimates(sample, labels)
    counted = Counter(labels.values())
    report = {
        "schema": REPORT_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: sample[name] for name in ("audit", "scan", "source", "model", "population", "left_out", "card_rates")},
        "reviewers": [
            {"name": one.reviewer, "labelled": len(one.by_number), "score_seen": len(one.score_seen)}
            for one in reviewers
        ],
        "counts": {
            "drawn": len(drawn),
            **_by_label(counted),
            "disagreed": disagreed,
            "not_labelled": len(drawn) - len(labels),
        },
        "prevalence": asdict(found.prevalence),
        "labels_only": asdict(found.labels_only),
        "images": _images(found.prevalence, sample["population"]),
        "rates": {name: asdict(one) for name, one in vars(found.rates).items()} if found.rates else None,
        "whatever": _whatever(sample, labels),
        "max_fpr": max_fpr,
        "thresholds": [
            {
                "p_ai": threshold_at(one.margin, sample["threshold"]),
                "margin": one.margin,
                "own": one.own,
                "called": one.called,
                **{name: asdict(rate) for name, rate in vars(one.rates).items()},
            }
            for one in found.thresholds
        ],
        "strata": _strata_rows(sample, labels),
        "mistakes": _mistakes(sample, labels),
        "agreement": agreement(*reviewers) if len(reviewers) == 2 else None,
    }
    return report | {"findings": _findings(report), "warnings": _warnings(report)}


def _by_label(counted: Mapping[Any, int]) -> dict[str, int]:
    return {str(label): counted.get(label, 0) for label in LABELS}


def _images(share: Estimate, population: int) -> dict[str, Any]:
    shares = {"value": share.value, "low": share.low, "high": share.high}
    return {name: None if one is None else round(one * population) for name, one in shares.items()}


def _whatever(sample: Sample, labels: Mapping[int, Label]) -> dict[str, dict[str, float]] | None:
    """The range of each figure whatever the images are that nobody could tell: the outer ends of the intervals where
    all of them that are called AI are AI, or real, and all the others are. None where all could be told."""
    undecided = {number for number, label in labels.items() if label == "cannot_tell"}
    if not undecided:
        return None
    called = {row["number"]: sample["strata"][row["stratum"]]["called"] for row in sample["rows"]}
    ranges: dict[str, dict[str, float]] = {}
    for if_called in ("ai", "real"):
        for if_not in ("ai", "real"):
            decided: dict[int, Label] = {
                number: label if number not in undecided else if_called if called[number] else if_not
                for number, label in labels.items()
            }
            found = estimates(sample, decided)
            shares = {"prevalence": found.prevalence, "labels_only": found.labels_only}
            for name, one in (shares | (vars(found.rates) if found.rates else {})).items():
                if one.value is not None:
                    _, low, high = one.bounds
                    now = ranges.setdefault(name, {"low": low, "high": high})
                    now["low"], now["high"] = min(now["low"], low), max(now["high"], high)
    return ranges


def _strata_rows(sample: Sample, labels: Mapping[int, Label]) -> list[dict[str, Any]]:
    rows = []
    for index, one in enumerate(sample["strata"]):
        given = Counter(labels.get(row["number"]) for row in sample["rows"] if row["stratum"] == index)
        rows.append(
            {
                **{name: one[name] for name in ("called", "population", "sampled", "inclusion")},
                "from_p_ai": threshold_at(one["margin"][0], sample["threshold"]),
                "to_p_ai": threshold_at(one["margin"][1], sample["threshold"]),
                **_by_label(given),
            }
        )
    return rows


def _mistakes(sample: Sample, labels: Mapping[int, Label]) -> list[dict[str, Any]]:
    """The images whose label contradicts the verdict, highest score first."""
    wrong = [
        {**{name: row[name] for name in ("key", "version_id", "p_ai", "tier", "verdict")}, "label": label}
        for row in sample["rows"]
        if (label := labels.get(row["number"])) in ("ai", "real") and row["verdict"] not in ("uncertain", label)
    ]
    return sorted(wrong, key=lambda row: -row["p_ai"])


def _findings(report: dict[str, Any]) -> list[str]:
    if report["rates"] is None:
        return ["Too few images are labelled to say anything about the bucket."]
    rates, images = report["rates"], report["images"]
    found = [
        (
            f"{_percent(report['prevalence'])} of the {report['population']:,} scored images are AI-generated: about "
            f"{images['value']:,}, between {images['low']:,} and {images['high']:,}."
        ),
        (
            f"In this bucket the scan calls {_percent(rates['tpr'])} of the AI images AI, and {_percent(rates['fpr'])} "
            f"of the real ones; {_percent(rates['precision'])} of what it calls AI is AI."
        ),
    ]
    for name, card in report["card_rates"].items():
        found_here = _against_card("finds", card["tpr"], rates["tpr"])
        alarms_here = _against_card("false alarms", card["fpr"], rates["fpr"])
        found.append(f"The card's rates for its {name}: {found_here}; {alarms_here}.")
    return [*found, _threshold_finding(report)]


def _threshold_finding(report: dict[str, Any]) -> str:
    most = report["max_fpr"]
    share = pages.show(most, "share")
    asked = f"at or below {share} of this bucket's real images, even at the upper end of the interval"
    for one in report["thresholds"]:
        if one["fpr"]["value"] is not None and one["fpr"]["high"] <= most:
            where = "the scan's own threshold" if one["own"] else f"p_ai {pages.show(one['p_ai'], '3')}"
            return (
                f"The lowest threshold of those below whose false alarms stay {asked}: {where}. It finds "
                f"{_percent(one['tpr'])} of the AI images."
            )
    return f"At no threshold here do the false alarms stay {asked}: label more images."


def _against_card(name: str, card: float, here: dict[str, Any]) -> str:
    if here["value"] is None:
        return f"{name} {pages.show(card, '%1')}, here unknown"
    place = "within" if here["low"] <= card <= here["high"] else "below" if card < here["low"] else "above"
    return f"{name} {pages.show(card, '%1')}, {place} the interval measured here"


def _percent(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "an unknown share"
    value, low, high = (pages.show(estimate[name], "%1") for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _warnings(report: dict[str, Any]) -> list[str]:
    counts, warnings = report["counts"], []
    seen = sum(one["score_seen"] for one in report["reviewers"])
    if counts["cannot_tell"]:
        warnings.append(
            f"Undecided images, where a reviewer could not tell or two disagreed: {counts['cannot_tell']}. The "
            "estimates count them as not drawn, as if they were like the others of their score; the range beside each "
            "estimate holds whatever they are."
        )
    if counts["not_labelled"]:
        warnings.append(
            f"{counts['not_labelled']} of {counts['drawn']} images have no label. That does no harm where images were "
            "labelled in the page's order, which is random; where they were picked, the estimates are biased."
        )
    if seen:
        warnings.append(f"The score was shown before {seen} of the labels were given: these may follow the detector.")
    warnings += [
        f"Images labelled {name}: only {counts[label]}. What depends on them is hardly known."
        for label, name in (("ai", "AI"), ("real", "real"))
        if counts[label] < FEW
    ]
    return warnings


def write_audit(out: Store, paths: Sequence[Path], max_fpr: float) -> dict[str, Any]:
    """Write the report of the audit that these files of labels are of, and the labels, into the results, beside its
    sample, and add the labels to those of all audits. Returns the report.

    Raises AuditError, and StoreError.
    """
    reviewers = [read_labels(path) for path in paths]
    audit = reviewers[0].audit
    if any(one.audit != audit for one in reviewers):
        raise AuditError("the files of labels are of different audits")
    sample = read_sample(out, audit)
    report = build_report(sample, reviewers, max_fpr)
    save_labels(out, sample, reviewers)
    folder = f"{AUDITS}/{audit}"
    out.write(f"{folder}/report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    out.write(f"{folder}/report.html", pages.render("patchscan.scanning", "audit.html", report).encode())
    return report
