"""Draw the pictures of an evaluation report, by file name."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from patchscan.detector.answer import TIERS
from patchscan.evaluation.metrics import confusion
from patchscan.evaluation.results import Evaluated, group_rows, side_by_side, split_seen, to_scored
from patchscan.evaluation.scoring import usable
from patchscan.reporting import plots

MOMENTS = {"before": "before training", "after": "after training"}


def overview(report: dict[str, Any], protocol: str) -> dict[str, Figure]:
    """Draw AUC and accuracy of every model on every generator, with intervals; a generator that no model has seen is
    named as unseen."""
    drawings = {}
    for metric, title in (("auc", "AUC"), ("accuracy", "accuracy at the card's threshold")):
        rows = []
        for name, each in side_by_side(report, protocol).items():
            values = {
                model["name"]: tuple(row["metrics"][metric][key] for key in ("value", "low", "high"))
                for model, row in zip(report["models"], each, strict=True)
                if row
            }
            unseen = {row["kind"] for row in each if row} == {"unseen"}
            rows.append((f"{name} (unseen)" if unseen else name, values))
        drawings[f"{protocol}-{metric}"] = plots.forest(rows, f"{title}, 95 % interval", reference=0.5)
    return drawings


def model_pictures(evaluated: Evaluated, protocol: str) -> dict[str, Figure]:
    """Draw one model's pictures under one protocol."""
    table, decision = evaluated.tables[protocol], evaluated.card.decision
    every = {name: to_scored(part) for name, part in group_rows(evaluated, table).items()}
    groups = {name: scored for name, scored in every.items() if len(scored)}
    band = (decision.abstain_low, decision.abstain_high)
    by_logit = {name: (scored.label, scored.logit) for name, scored in groups.items()}
    by_p_ai = {name: (scored.label, scored.p_ai) for name, scored in groups.items()}
    drawings = {
        "roc": plots.roc(by_logit),
        "precision-recall": plots.precision_recall(by_logit),
        "histograms": plots.histograms(by_p_ai, decision.threshold, band),
        "reliability": plots.reliability(_reliability_panels(split_seen(evaluated, table))),
        "confusion": plots.confusions({name: confusion(scored) for name, scored in every.items()}),
        "risk-coverage": _draw_risk(split_seen(evaluated, table)),
    }
    return {f"{evaluated.card.name}-{protocol}-{name}": drawing for name, drawing in drawings.items()}


def _reliability_panels(parts: dict[str, pd.DataFrame]) -> plots.Curves:
    panels: plots.Curves = {}
    for name, part in parts.items():
        scored = to_scored(part)
        if len(scored):
            panels[f"{name}, as trained"] = (scored.label, scored.uncalibrated)
            panels[f"{name}, calibrated"] = (scored.label, scored.p_ai)
    return panels


def risk_coverage_by_tier(evaluated: Evaluated) -> Figure:
    """Draw risk over coverage for each delivery, over all data sets: unseen generators and photographs, or all of them
    if there are no unseen ones."""
    table = evaluated.deliveries
    assert table is not None
    unseen = split_seen(evaluated, table)["unseen"]
    table = table if unseen.empty else unseen
    return _draw_risk({tier: table[table.delivered == tier] for tier in TIERS})


def _draw_risk(parts: dict[str, pd.DataFrame]) -> Figure:
    groups, chosen = {}, {}
    for name, images in parts.items():
        part = images[usable(images)]
        if len(part) < 20:
            continue
        right = (part.measured_ai == (part.label == 1)).to_numpy()
        groups[name] = (confidence(part.measured_p_ai.to_numpy(), part.measured_threshold.to_numpy()), right)
        decided = ~part.measured_uncertain.to_numpy(dtype=bool)
        if decided.any():
            chosen[name] = (float(decided.mean()), float((~right[decided]).mean()))
    return plots.risk_coverage(groups, chosen)


def confidence(p_ai: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Return the distance of p_ai from the threshold, scaled to 0..1: 0 at the threshold, 1 at p_ai 0 or 1."""
    largest = np.maximum(np.where(p_ai >= threshold, 1 - threshold, threshold), 1e-12)
    distance: np.ndarray = np.abs(p_ai - threshold) / largest
    return distance


def feature_moments(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read the features, labels and generators that training wrote to the run folder, `before` and `after` it."""
    moments = {}
    for moment in MOMENTS:
        path = run / f"features_{moment}.npz"
        if path.exists():
            with np.load(path) as kept:
                moments[moment] = (kept["features"], kept["label"], kept["generator"])
    return moments
