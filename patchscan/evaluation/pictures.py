"""The pictures of an evaluation report, by file name: which plot shows which rows of which model."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from patchscan.evaluation.results import Evaluated, groups_of, scored_of, seen_rows
from patchscan.reporting import plots

MOMENTS = {"before": "before training", "after": "after training"}


def overview(report: dict[str, Any], protocol: str) -> dict[str, Figure]:
    """AUC and accuracy of every model on every generator, with intervals."""
    drawings = {}
    for metric, title in (("auc", "AUC"), ("accuracy", "accuracy at the card's threshold")):
        names = list(
            dict.fromkeys(row["name"] for model in report["models"] for row in model["results"][protocol]["rows"])
        )
        rows = []
        for name in names:
            values = {
                model["name"]: tuple(row["metrics"][metric][key] for key in ("value", "low", "high"))
                for model in report["models"]
                for row in model["results"][protocol]["rows"]
                if row["name"] == name
            }
            rows.append((name, values))
        drawings[f"{protocol}-{metric}"] = plots.forest(rows, f"{title}, 95 % interval", reference=0.5)
    return drawings


def of_model(evaluated: Evaluated, protocol: str, run: Path) -> dict[str, Figure]:
    """One model's pictures under one protocol; the feature pictures only where the run folder holds features."""
    table, decision = evaluated.tables[protocol], evaluated.card.decision
    scored = {name: one for name, part in groups_of(evaluated, table).items() if len(one := scored_of(part))}
    band = (decision.abstain_low, decision.abstain_high)
    by_logit = {name: (one.label, one.logit) for name, one in scored.items()}
    drawings = {
        "roc": plots.roc(by_logit),
        "precision-recall": plots.precision_recall(by_logit),
        "histograms": plots.histograms(
            {name: (one.label, one.p_ai) for name, one in scored.items()}, decision.threshold, band
        ),
        "reliability": plots.reliability(_reliability_panels(evaluated, protocol)),
        "confusion": plots.confusions(_confusions(evaluated, protocol)),
        "risk-coverage": _risk_coverage(evaluated, protocol),
    }
    features = feature_moments(run)
    if features:
        drawings["features"] = plots.principal_components(features)
    return {f"{evaluated.label}-{protocol}-{name}": drawing for name, drawing in drawings.items()}


def _reliability_panels(evaluated: Evaluated, protocol: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    table = evaluated.tables[protocol]
    seen = seen_rows(evaluated, table)
    panels: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, part in (("seen", table[seen]), ("unseen", table[~seen])):
        scored = scored_of(part)
        if len(scored):
            raw = 1 / (1 + np.exp(-np.clip(scored.logit, -700, 700)))
            panels |= {f"{name}, as trained": (scored.label, raw), f"{name}, calibrated": (scored.label, scored.p_ai)}
    return panels


def _confusions(evaluated: Evaluated, protocol: str) -> dict[str, dict[str, int]]:
    from patchscan.evaluation.metrics import confusion

    groups = groups_of(evaluated, evaluated.tables[protocol])
    return {name: confusion(scored_of(part)) for name, part in groups.items()}


def _risk_coverage(evaluated: Evaluated, protocol: str) -> Figure:
    table = evaluated.tables[protocol]
    seen = seen_rows(evaluated, table)
    groups, chosen = {}, {}
    for name, part in (("seen", table[seen]), ("unseen", table[~seen])):
        scored = scored_of(part)
        if len(scored) < 20:
            continue
        right = scored.says_ai == (scored.label == 1)
        groups[name] = (confidence(scored.p_ai, evaluated.card.decision.threshold), right)
        decided = ~scored.uncertain
        if decided.any():
            chosen[name] = (float(decided.mean()), float((~right[decided]).mean()))
    return plots.risk_coverage(groups, chosen)


def confidence(p_ai: np.ndarray, threshold: float) -> np.ndarray:
    """How far p_ai lies from the threshold, as a share of the room on its side: 0 on the threshold, 1 at 0 or 1."""
    room = np.where(p_ai >= threshold, max(1 - threshold, 1e-12), max(threshold, 1e-12))
    return np.abs(p_ai - threshold) / room


def feature_moments(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Penultimate features that training left in the run folder, by moment."""
    moments = {}
    for moment, title in MOMENTS.items():
        path = run / f"features_{moment}.npz"
        if path.exists():
            with np.load(path) as kept:
                moments[title] = (kept["features"], kept["label"], kept["generator"])
    return moments
