"""The scoreboard of one model: every generator and kind of real image by delivery tier, with intervals by source.

All figures of one data set come from one matrix of counts, how often each image is drawn in each bootstrap sample, so
tiers are compared on the same samples and a mean over generators has an interval of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from patchscan.dataset.layout import MEANS
from patchscan.detector.answer import TIERS, Tier
from patchscan.evaluation.calibration import enough, fitted_apart
from patchscan.evaluation.metrics import RESAMPLES, bootstrap_estimate, calibration_error, joined_strata
from patchscan.evaluation.results import Evaluated, kind_of
from patchscan.evaluation.scoring import stratum, usable

# The first is shown per generator too; the share of real images that each one is about.
LOW_FPRS = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_01": 0.001}


def scoreboard(evaluated: Evaluated, groups: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Return one object per data set: name, whether it has AI images (`both_classes`), ai, real, sources, rows, and
    `estimated`, the share of each delivery that looks like each tier.

    `groups` names means over generators, beside `mean of seen` and `mean of unseen`; a data set that lacks one of a
    group's generators has no row of it.
    """
    if evaluated.deliveries is None:
        return []
    return [
        _of_data(str(name), table.reset_index(drop=True), evaluated.seen, groups)
        for name, table in evaluated.deliveries.groupby("data", sort=False)
    ]


def _of_data(name: str, table: pd.DataFrame, seen: set[str], groups: Mapping[str, list[str]]) -> dict[str, Any]:
    tiers = [tier for tier in TIERS if tier in set(table.delivered)]
    stored = table[table.delivered == tiers[0]].reset_index(drop=True)
    drawn = observed_and_drawn(stored)
    by_tier = {tier: _of_tier(table[table.delivered == tier].reset_index(drop=True), drawn) for tier in tiers}
    both = bool((stored.label == 1).any())
    names = sorted(stored.generator.unique(), key=lambda one: (one not in seen, one))
    rows = []
    for one in names:
        estimates = {tier: _estimates(values[one]) for tier, values in by_tier.items()}
        rows.append(_row(one, kind_of(one, seen) if both else "real", stored[stored.generator == one], estimates))
    for title, wanted in _means(names, seen, groups, both).items():
        members = [one for one in names if one in wanted]
        # A part of a group that was asked for would be taken for all of it; a mean of one is that one's own row.
        if members and (len(members) == len(set(wanted)) if title in groups else len(members) > 1):
            means = {tier: _estimates(_mean([values[one] for one in members])) for tier, values in by_tier.items()}
            rows.append(_row(title, "group", stored[stored.generator.isin(members)], means))
    return {
        "name": name,
        "both_classes": both,
        **_counts(stored),
        "sources_known": int(stored.source_known.sum()),
        "rows": rows,
        "estimated": {tier: _estimated(table[table.delivered == tier]) for tier in tiers},
    }


def _means(names: list[str], seen: set[str], groups: Mapping[str, list[str]], both: bool) -> Mapping[str, list[str]]:
    """Which means over rows are shown, by name."""
    of_seen, of_unseen, of_kinds = MEANS
    if not both:
        return {of_kinds: names} | dict(groups)
    by_use = {of_seen: [one for one in names if one in seen], of_unseen: [one for one in names if one not in seen]}
    return by_use | dict(groups)


def _row(name: str, kind: str, part: pd.DataFrame, tiers: Mapping[Tier, Any]) -> dict[str, Any]:
    return {"name": name, "kind": kind, **_counts(part), "tiers": tiers}


def _counts(part: pd.DataFrame) -> dict[str, int]:
    ai, real = part[part.label == 1], part[part.label == 0]
    return {
        "ai": len(ai),
        "real": len(real),
        "ai_collections": int(ai.collection.nunique()),
        "real_collections": int(real.collection.nunique()),
    }


def _estimated(part: pd.DataFrame) -> dict[str, float | None]:
    shares = part.tier.value_counts(normalize=True)
    return {tier: float(shares.get(tier, 0.0)) if len(shares) else None for tier in TIERS}


def source_counts(images: pd.DataFrame, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each image is drawn in each bootstrap sample, float (resamples, images).

    Within each generator and class collections are drawn with replacement, then within each drawn collection its
    sources; the images of one source go together, and so do generators that share a collection. Of a class with a
    single collection the sources alone are drawn, so its interval covers other images of that collection and no other
    collections.
    """
    rng = np.random.default_rng(0)
    counts = np.zeros((resamples, len(images)))
    collection_of, sources = (images[name].to_numpy(dtype=str) for name in ("collection", "source"))
    groups = joined_strata(stratum(images), collection_of)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        collections, collection = np.unique(collection_of[members], return_inverse=True)
        drawn = rng.multinomial(len(collections), np.full(len(collections), 1 / len(collections)), size=resamples)
        for number, times in enumerate(drawn.T):
            inside = members[collection == number]
            names, source = np.unique(sources[inside], return_inverse=True)
            picked = rng.multinomial(times * len(names), np.full(len(names), 1 / len(names)))
            counts[:, inside] = picked[:, source]
    return counts


def observed_and_drawn(images: pd.DataFrame) -> np.ndarray:
    """Return a row of ones, which counts each image once, above `source_counts`: float (1 + RESAMPLES, images)."""
    return np.vstack([np.ones((1, len(images))), source_counts(images)])


def _of_tier(table: pd.DataFrame, drawn: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Every metric of every generator, one value per row of `drawn`, NaN where it is not defined."""
    good = usable(table).to_numpy()
    drawn = drawn * good
    logit = np.where(good, table.logit, 0.0)
    real = (table.label == 0).to_numpy()
    # One threshold for the data set's real images together: of a single generator's there are too few.
    bounds = {name: _bound(logit[real], drawn[:, real], share) for name, share in LOW_FPRS.items()}
    called = (table.measured_ai & ~table.measured_uncertain).to_numpy()
    p_ai = np.where(good, table.measured_p_ai, 0.0)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in table.generator.unique():
        index = np.flatnonzero(table.generator == name)
        ai, nature = index[~real[index]], index[real[index]]
        with np.errstate(invalid="ignore", divide="ignore"):
            low = {
                key: np.where(np.isnan(bound), np.nan, _rate(drawn[:, ai], logit[ai] > bound[:, None]))
                for key, bound in bounds.items()
            }
            found[str(name)] = {
                "auc": weighted_auc(logit[ai], drawn[:, ai], logit[nature], drawn[:, nature]),
                **low,
                "found": _rate(drawn[:, ai], called[ai]),
                "false_alarms": _rate(drawn[:, nature], called[nature]),
                "ece": calibration_error(~real[index], p_ai[index], drawn[:, index])
                if len(ai) and len(nature)
                else np.full(len(drawn), np.nan),
            }
    return found


def _rate(counts: np.ndarray, hit: np.ndarray) -> np.ndarray:
    rates: np.ndarray = (counts * hit).sum(axis=1) / counts.sum(axis=1)
    return rates


def _bound(logit: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """The logit that at most `share` of the drawn real images exceed, (resamples,); NaN with fewer than 1 / share of
    them, when there is no telling."""
    if len(logit) < 1 / share:
        return np.full(len(counts), np.nan)
    order = np.argsort(-logit)
    alarms = np.cumsum(counts[:, order], axis=1)
    bound: np.ndarray = logit[order][(alarms > share * alarms[:, -1:]).argmax(axis=1)]
    return bound


def weighted_auc(ai: np.ndarray, ai_counts: np.ndarray, real: np.ndarray, real_counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of logits ai (a,) and real (r,) that count ai_counts (b, a) and real_counts (b, r)
    times; equal logits count half. Returns (b,), NaN where a class is missing."""
    if not len(ai) or not len(real):
        return np.full(len(ai_counts), np.nan)
    logit = np.concatenate([ai, real])
    order = np.argsort(logit, kind="stable")
    starts = np.flatnonzero(np.diff(logit[order], prepend=-np.inf))
    counts = np.concatenate([ai_counts, real_counts], axis=1)[:, order]
    is_ai = order < len(ai)
    hits, alarms = (np.add.reduceat(counts * part, starts, axis=1) for part in (is_ai, ~is_ai))
    below = np.cumsum(alarms, axis=1) - alarms / 2
    area: np.ndarray = (hits * below).sum(axis=1) / (hits.sum(axis=1) * alarms.sum(axis=1))
    return area


def _mean(members: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {metric: np.mean([one[metric] for one in members], axis=0) for metric in members[0]}


def _estimates(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return {metric: asdict(bootstrap_estimate(metric, float(drawn[0]), drawn[1:])) for metric, drawn in values.items()}


def bounds_by_tier(evaluated: Evaluated) -> list[dict[str, Any]]:
    """What the decision promises of each tier and what was measured: tier, `covered`, `promised` (None where it was not
    fitted here to images that look like the tier, or to too few), and for seen and unseen photographs that look like it
    how many there are and the share called AI."""
    table = evaluated.deliveries
    if table is None:
        return []
    good = table[usable(table)]
    real = good[good.label == 0]
    called = real.measured_ai & ~real.measured_uncertain
    seen = real.generator.isin(evaluated.seen)
    decision = evaluated.card.decision
    fitted_on = good[(good.data == evaluated.calibrated_on) & good.generator.isin(evaluated.seen)]
    several = fitted_on.delivered.nunique() > 1  # of one delivery all images are fitted together
    apart = fitted_apart(fitted_on.label.to_numpy(), fitted_on.tier.to_numpy()) if several else []
    photographs = fitted_on.tier[fitted_on.label == 0].value_counts()
    rows = []
    for tier in TIERS:
        holds = tier in apart and enough(photographs[tier], evaluated.target.max_fpr)
        row: dict[str, Any] = {
            "tier": tier,
            "covered": decision.covers(tier),
            "threshold": decision.of(tier).threshold,
            "promised": evaluated.target.max_fpr if holds else None,
        }
        for group, inside in (("seen", seen), ("unseen", ~seen)):
            here = inside & (real.tier == tier)
            row[group] = {"images": int(here.sum()), "called_ai": float(called[here].mean()) if here.any() else None}
        rows.append(row)
    return rows


def card_scoreboard(board: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the card keeps of the scoreboard: data, row, tier, counts, and each metric's value and interval."""
    return [
        {
            "data": data["name"],
            "row": row["name"],
            "kind": row["kind"],
            "tier": tier,
            "ai": row["ai"],
            "real": row["real"],
        }
        | {metric: [one["value"], one["low"], one["high"]] for metric, one in estimates.items()}
        for data in board
        for row in data["rows"]
        for tier, estimates in row["tiers"].items()
    ]
