"""State how much an image's score weighs as evidence, and measure how far such statements are right.

p_ai is calibrated as if half of all images were AI, separately for each tier, so its odds are a likelihood ratio (LR):
how many times more probable this score is for an AI image than for a real one, of images like the seen generators'
validation images. LRs are log10 throughout.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from patchscan.detector.answer import TIERS, Tier
from patchscan.detector.card import Card, Decision
from patchscan.evaluation.metrics import bootstrap_estimate
from patchscan.evaluation.results import Evaluated, group_rows, kind_of
from patchscan.evaluation.scoreboard import observed_and_drawn
from patchscan.evaluation.scoring import cluster_of, usable
from patchscan.reporting.likelihood import cllr, elub, pav
from patchscan.reporting.statistics import proportion_among

# p_ai is stored as a double: nearer to 0 or 1 it is rounded to them.
LEAST_P = 1e-15
STRONG = 1.0  # log10: ten to one


@dataclass(frozen=True)
class Weight:
    """The weight of one image's score: `log10_lr`, not beyond the bounds `lower` and `upper` of its tier, which `ai`
    and `real` validation images carry; `unbounded` is what the calibration alone would say. `at_bound`: that lies
    beyond the bounds, and the data carry no more than the bound."""

    log10_lr: float
    lower: float
    upper: float
    unbounded: float
    ai: int
    real: int

    @property
    def at_bound(self) -> bool:
        return not self.lower < self.unbounded < self.upper


def log10_odds(p_ai: np.ndarray) -> np.ndarray:
    """Return log10 of the odds of p_ai (n,)."""
    clipped = np.clip(p_ai, LEAST_P, 1 - LEAST_P)
    result: np.ndarray = np.log10(clipped) - np.log10(1 - clipped)
    return result


def weight_of(p_ai: float, tier: Tier, reason: str | None, card: Card) -> Weight | str:
    """Return the weight of an answer (its p_ai, tier and reason), or why none may be stated."""
    if reason == "out_of_domain":
        return "the model cannot tell AI from real in an image like this, so its score has no weight"
    if reason == "small_image":
        return "the image is so small that it had to be enlarged, which was not validated"
    bounds = card.evidence.get(tier)
    if bounds is None:
        return (
            f"the model's card holds no bounds for images that look {tier}: `patchscan evaluate` computes them from "
            "validation images of both classes"
        )
    raw = float(log10_odds(np.array([p_ai]))[0])
    stated = min(max(raw, bounds["lower"]), bounds["upper"])
    return Weight(stated, bounds["lower"], bounds["upper"], raw, bounds["ai"], bounds["real"])


def fit_bounds(table: pd.DataFrame, decision: Decision) -> dict[str, dict[str, Any]]:
    """Return the bounds of LRs for each tier that the decision covers: `lower` and `upper`, log10, and the numbers of
    `ai` and `real` images and of their sources that they rest on.

    `table` holds the images that the decision was fitted on, with the columns of `apply_decision` (cross-fitted), and
    source. Of each image's deliveries that look like a tier, the first counts. The bounds are those of Vergeer et al.
    (`elub`), and lie within log10 of the number of sources plus one: images of one source are alike.
    """
    bounds: dict[str, dict[str, Any]] = {}
    good = table[usable(table) & ~table.small & ~table.graphic]
    for tier in TIERS:
        part = good[good.tier == tier].drop_duplicates("path")
        if not decision.covers(tier) or part.label.nunique() < 2:
            continue
        lower, upper = elub(log10_odds(part.measured_p_ai.to_numpy()), part.label.to_numpy())
        ai, real = part[part.label == 1], part[part.label == 0]
        ai_sources, real_sources = ai.source.nunique(), real.source.nunique()
        bounds[tier] = {
            "lower": max(lower, -float(np.log10(ai_sources + 1))),
            "upper": min(upper, float(np.log10(real_sources + 1))),
            "ai": len(ai),
            "real": len(real),
            "ai_sources": ai_sources,
            "real_sources": real_sources,
        }
    return bounds


def stated_lrs(table: pd.DataFrame, card: Card) -> np.ndarray:
    """Return the LR of each row as it would be stated, log10 (rows,), NaN where none may be."""
    lrs = log10_odds(table.measured_p_ai.to_numpy(dtype=float))
    lower, upper = (
        table.tier.map({tier: one[end] for tier, one in card.evidence.items()}).to_numpy(dtype=float)
        for end in ("lower", "upper")
    )
    may = (usable(table) & ~table.small & ~table.graphic).to_numpy()
    return np.where(may, np.clip(lrs, lower, upper), np.nan)


def evidence_sets(evaluated: Evaluated) -> dict[str, pd.DataFrame]:
    """Return the images as stored of each data set, with `log10_lr` and their sources; those without a stated LR are
    left in with NaN."""
    if evaluated.deliveries is None:
        tables = {
            name: table.assign(source=table.path, collection=table.path, source_known=False)
            for name, table in evaluated.tables.items()
        }
    else:
        stored = evaluated.deliveries[evaluated.deliveries.delivered == "native"]
        tables = {str(name): table for name, table in stored.groupby("data", sort=False)}
    return {
        name: table.assign(log10_lr=stated_lrs(table, evaluated.card)).reset_index(drop=True)
        for name, table in tables.items()
    }


def evidence(evaluated: Evaluated) -> dict[str, Any] | None:
    """Return, for the report, the bounds of LRs by tier, and for each data set how good the stated LRs are, by
    generator and pooled. None where the card holds no bounds, so that no LR may be stated."""
    if not evaluated.card.evidence:
        return None
    sets = []
    for name, table in evidence_sets(evaluated).items():
        drawn = observed_and_drawn(table)
        groups = group_rows(evaluated, table)
        kinds = {group: kind_of(group, evaluated.seen) for group in groups}
        if not (table.label == 1).any():  # kinds of real images, which are neither seen nor unseen generators
            groups = {group: part for group, part in groups.items() if group in ("overall", *table.generator.unique())}
            kinds = {group: "real" if kind == "unseen" else kind for group, kind in kinds.items()}
        rows = [
            {"name": group, "kind": kinds[group], **_row(part, drawn[:, part.index])} for group, part in groups.items()
        ]
        sets.append({"name": name, "rows": rows})
    return {"bounds": evaluated.card.evidence, "sets": sets}


def _row(part: pd.DataFrame, drawn: np.ndarray) -> dict[str, Any]:
    """One generator's or group's figures; `drawn` (1 + resamples, images of `part`), the first row of ones."""
    stated = part[part.log10_lr.notna()]
    lrs, label, drawn = stated.log10_lr.to_numpy(), stated.label.to_numpy(), drawn[:, part.log10_lr.notna()]
    cost = cllr(lrs, label, drawn)
    cluster = cluster_of(stated)

    def share(hit: np.ndarray, among: np.ndarray) -> dict[str, Any]:
        return asdict(proportion_among(hit, among, cluster))

    return {
        "ai": int((label == 1).sum()),
        "real": int((label == 0).sum()),
        "not_stated": len(part) - len(stated),
        "cllr": asdict(bootstrap_estimate("cllr", float(cost[0]), cost[1:])),
        "cllr_min": float(cllr(pav(lrs, label), label)[0]) if len(np.unique(label)) == 2 else None,
        "misleading_ai": share(lrs < 0, label == 1),
        "misleading_real": share(lrs > 0, label == 0),
        "strongly_misleading_real": share(lrs >= STRONG, label == 0),
    }


def evidence_curves(evaluated: Evaluated) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return, for each data set, label (n,) and stated LR (n,) of each generator and group with both classes; data sets
    without any are left out."""
    curves = {}
    for name, table in evidence_sets(evaluated).items():
        parts = {group: part[part.log10_lr.notna()] for group, part in group_rows(evaluated, table).items()}
        both = {group: part for group, part in parts.items() if part.label.nunique() == 2}
        if both:
            curves[name] = {group: (part.label.to_numpy(), part.log10_lr.to_numpy()) for group, part in both.items()}
    return curves
