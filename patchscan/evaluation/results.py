"""Compute one model's part of report.json from its scores: metrics per generator, operating points, calibration."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from patchscan.dataset.layout import POOLED
from patchscan.detector.card import Card
from patchscan.evaluation.calibration import Target, conformal_bound, cross_fitted, decide
from patchscan.evaluation.metrics import Scored, confusion, measure, resampled
from patchscan.evaluation.scoring import cluster_of, stratum, usable
from patchscan.reporting.statistics import complement, precision_at, proportion_among

PREVALENCES = (0.001, 0.01, 0.1, 0.5)
THRESHOLD_FPRS = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Evaluated:
    """A model and its scores tables, by protocol (`raw`, `matched`), with the columns source, collection and
    source_known where these were looked for.

    `calibrated_on` is the protocol whose seen generators the decision was fitted on in this evaluation, None if it was
    not fitted; `target` holds the error rates asked for. `deliveries` are all data sets in every tier (columns of
    `apply_decision`, and data, delivered, source, collection, source_known); None for a labelled scan.
    """

    card: Card
    tables: dict[str, pd.DataFrame]
    calibrated_on: str | None
    target: Target
    deliveries: pd.DataFrame | None = None

    @property
    def seen(self) -> set[str]:
        return set(self.card.training.get("seen", []))


def protocol_title(name: str) -> str:
    """Return what a report calls one of its sets of images: `raw protocol`, or the name of one data set of several."""
    return f"{name} protocol" if name in ("raw", "matched") else name


def row_places(report: Mapping[str, Any], protocol: str) -> dict[str, list[int | None]]:
    """Return, for each generator and then each group, at which place among each model's rows in the report it stands;
    None for a model without it."""
    places = [
        {row["name"]: place for place, row in enumerate(model["results"][protocol]["rows"])}
        for model in report["models"]
    ]
    names = dict.fromkeys(name for part in places for name in part)
    ordered = [*(name for name in names if name not in POOLED), *(name for name in POOLED if name in names)]
    return {name: [part.get(name) for part in places] for name in ordered}


def side_by_side(report: Mapping[str, Any], protocol: str) -> dict[str, list[dict[str, Any] | None]]:
    """Return each model's row of each name, as `row_places` has them."""
    rows = [model["results"][protocol]["rows"] for model in report["models"]]
    return {
        name: [None if place is None else part[place] for part, place in zip(rows, places, strict=True)]
        for name, places in row_places(report, protocol).items()
    }


def seen_rows(card: Card, table: pd.DataFrame) -> pd.Series:
    """Return which rows come from generators that the model was trained on, bool (rows,)."""
    return table.generator.isin(card.training.get("seen", []))


def split_seen(evaluated: Evaluated, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split the table's rows into those of `seen` and of `unseen` generators."""
    seen = seen_rows(evaluated.card, table)
    return {"seen": table[seen], "unseen": table[~seen]}


def group_rows(evaluated: Evaluated, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Group the table's rows: one group per generator, seen ones first; then `all seen` and `all unseen`, if there is
    more than one generator in them; then `overall`."""
    parts = split_seen(evaluated, table)
    names = sorted(table.generator.unique(), key=lambda name: (name not in evaluated.seen, name))
    groups = {name: table[table.generator == name] for name in names}
    pooled = dict(zip(POOLED, (parts["seen"], parts["unseen"], table), strict=True))
    return groups | {name: part for name, part in pooled.items() if part.generator.nunique() > 1 or name == "overall"}


def kind_of(name: str, seen: set[str]) -> str:
    """Return what a row is about: a `group`, a `seen` or an `unseen` generator."""
    if name in POOLED:
        return "group"
    return "seen" if name in seen else "unseen"


def to_scored(table: pd.DataFrame) -> Scored:
    """Convert the usable rows to the arrays that metrics take."""
    part = table[usable(table)]
    return Scored(
        label=part.label.to_numpy(),
        logit=part.logit.to_numpy(),
        p_ai=part.measured_p_ai.to_numpy(),
        says_ai=part.measured_ai.to_numpy(),
        uncertain=part.measured_uncertain.to_numpy(),
        stratum=stratum(part),
        cluster=cluster_of(part),
    )


def result_rows(evaluated: Evaluated, protocol: str) -> list[dict[str, Any]]:
    """Return one row per generator and group: name, kind ('seen', 'unseen', 'group'), counts, metrics, confusion."""
    table = evaluated.tables[protocol]
    rows = []
    for name, part in group_rows(evaluated, table).items():
        scored = to_scored(part)
        rows.append(
            {
                "name": name,
                "kind": kind_of(name, evaluated.seen),
                "counts": counts(part),
                "metrics": {key: asdict(value) for key, value in measure(scored).items()},
                "confusion": confusion(scored),
            }
        )
    return rows


def counts(part: pd.DataFrame) -> dict[str, int]:
    """Count the images by class, and those without a usable score by reason."""
    good = usable(part)
    return {
        "images": len(part),
        "scored": int(good.sum()),
        "ai": int((good & (part.label == 1)).sum()),
        "real": int((good & (part.label == 0)).sum()),
        "rejected": int((part.status == "rejected").sum()),
        "not_finite": int(((part.status == "scored") & ~np.isfinite(part.logit)).sum()),
        "uncertain": int((good & part.measured_uncertain).sum()),
    }


def operating_points(evaluated: Evaluated, protocol: str) -> list[dict[str, Any]]:
    """Measure the card's threshold, and thresholds for each of THRESHOLD_FPRS on the seen generators: detection and
    false-alarm rates on seen and unseen images, and precision at each of PREVALENCES."""
    table = evaluated.tables[protocol]
    table = table[usable(table)]
    decision = evaluated.card.decision
    points = [_point("the card's threshold", decision.threshold, table.measured_ai.to_numpy(), evaluated, table)]
    seen = seen_rows(evaluated.card, table).to_numpy()
    label, logit = table.label.to_numpy(), table.logit.to_numpy()
    if len(np.unique(label[seen])) < 2:
        return points
    for fpr in THRESHOLD_FPRS:
        bound = conformal_bound(logit[seen & (label == 0)], fpr)
        says_ai = logit >= bound
        # Seen images are decided by thresholds that were chosen without them (cross-fitting).
        says_ai[seen] = cross_fitted(logit[seen], label[seen], stratum(table[seen]), Target(max_fpr=fpr)).says_ai
        p_ai = float(decide(np.array([bound]), decision).p_ai[0])
        points.append(_point(f"{fpr * 100:g} % of seen real images", p_ai, says_ai, evaluated, table))
    return points


def _point(
    name: str, threshold: float, says_ai: np.ndarray, evaluated: Evaluated, table: pd.DataFrame
) -> dict[str, Any]:
    seen = seen_rows(evaluated.card, table).to_numpy()
    groups = {}
    for group, inside in (("seen", seen), ("unseen", ~seen)):
        part, called = table[inside], says_ai[inside]
        label, cluster = part.label.to_numpy(), cluster_of(part)
        found = proportion_among(called, label == 1, cluster)
        alarms = complement(proportion_among(~called, label == 0, cluster))
        groups[group] = {
            "fake_detection": asdict(found),
            "false_alarms": asdict(alarms),
            "precision": [asdict(precision_at(share, found, alarms)) for share in PREVALENCES],
        }
    return {"name": name, "threshold": threshold, "groups": groups}


def calibration_summary(evaluated: Evaluated, protocol: str) -> dict[str, Any]:
    """Compute ECE and Brier score before calibration (the sigmoid of the logit) and after, for seen and unseen
    images."""
    summary = {}
    for group, part in split_seen(evaluated, evaluated.tables[protocol]).items():
        scored = to_scored(part)
        before, after = resampled(replace(scored, p_ai=scored.uncalibrated)), resampled(scored)
        summary[group] = {
            moment: {key: asdict(values[key]) for key in ("ece", "brier")}
            for moment, values in (("before", before), ("after", after))
        }
    return summary


def card_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of the rows that the card stores, by name: kind, counts, and each metric's value and interval."""
    return {
        row["name"]: {
            "kind": row["kind"],
            "counts": row["counts"],
            "confusion": row["confusion"],
            **{name: [metric["value"], metric["low"], metric["high"]] for name, metric in row["metrics"].items()},
        }
        for row in rows
    }
