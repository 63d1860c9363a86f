"""Draw the images of a scan that people shall look at: a stratified random sample with known inclusion probabilities.

The strata are ranges of the score, on either side of the decision, so that there are enough images near the threshold
and among those called AI. Within each, images are drawn at equal distances from a list that is ordered by folder and
tier: folders and tiers get their share, and every image of a stratum has the same chance.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from patchscan.common.errors import UserError
from patchscan.detector.answer import TIERS
from patchscan.detector.card import Card, Decision
from patchscan.scanning.prevalence import card_rates
from patchscan.scanning.table import ScanTable
from patchscan.storage.store import Store

SCHEMA = "patchscan-audit/1"
AUDITS = "audits"
AUDIT_NAME = re.compile(r"[\w.:+-]{1,200}")
# Shares of the images below which the scores of the images that are not called, and are called AI, are cut.
NOT_CALLED_CUTS, CALLED_CUTS = (0.5, 0.8, 0.95), (1 / 3, 2 / 3)
# Of each stratum at least so many are drawn, if it has them.
LEAST = 4

Sample = dict[str, Any]


class AuditError(UserError):
    """A sample that cannot be drawn, or labels that do not fit one."""


def draw(table: ScanTable, decision: Decision, size: int, seed: int) -> dict[str, Any]:
    """Draw `size` scored images of the scan's model. Returns `strata`, from the lowest scores up (`called`, `margin`:
    the least and greatest distance of its scores from the threshold in log odds, `population`, `sampled`, `inclusion`:
    the chance of each image to be drawn, `mean_p_ai`), and `rows`, in random order, each with its `stratum`.

    The same rows, size and seed give the same sample. Raises AuditError where no image was scored.
    """
    scored = _scored(decision)
    cuts = {called: _cuts(table, scored, called) for called in (False, True)}
    placed = f"SELECT *, {_stratum(cuts)} AS stratum FROM ({scored})"
    strata = table.query(
        "SELECT stratum, bool_or(called) AS called, [min(margin), max(margin)] AS margin, count(*) AS population,"
        f" avg(p_ai) AS mean_p_ai FROM ({placed}) GROUP BY stratum ORDER BY stratum"
    )
    if not strata:
        raise AuditError("this scan's model has scored no image: there is nothing to draw from")
    rng = np.random.default_rng(seed)
    places: list[str] = []
    for one, count in zip(strata, allocate([one["population"] for one in strata], size), strict=True):
        places += [f"({one['stratum']}, {place})" for place in systematic(one["population"], count, rng.random())]
        one.update(sampled=count, inclusion=count / one["population"], mean_p_ai=round(one["mean_p_ai"], 12))
    rows = table.query(
        "WITH ordered AS (SELECT *, row_number() OVER (PARTITION BY stratum ORDER BY regexp_replace(key, '[^/]*$', ''),"
        f" tier, md5('{seed}:' || coalesce(version_id, '') || ':' || key), key, version_id) AS place FROM ({placed}))"
        " SELECT key, version_id, etag, tier, verdict, p_ai, patch, stratum FROM ordered"
        f" WHERE (stratum, place) IN ({', '.join(places)}) ORDER BY key, version_id"
    )
    number = {one.pop("stratum"): index for index, one in enumerate(strata)}
    ordered = [rows[index] for index in rng.permutation(len(rows))]
    numbered = [row | {"number": index, "stratum": number[row["stratum"]]} for index, row in enumerate(ordered, 1)]
    return {"strata": strata, "rows": numbered}


def _scored(decision: Decision) -> str:
    """The query of the images to draw from, with `called` and `margin`, the distance from the tier's threshold."""
    margins = []
    for tier in TIERS:
        one = decision.of(tier)
        shift = one.bias - _log_odds(one.threshold)
        margins.append(f"WHEN '{tier}' THEN logit / {one.temperature!r} + {shift!r}")
    return (
        "SELECT key, version_id, etag, tier, verdict, p_ai, patch, verdict = 'ai' AS called,"
        f" CASE coalesce(tier, 'native') {' '.join(margins)} END AS margin"
        " FROM rows WHERE status = 'scored' AND NOT other_model"
    )


def _cuts(table: ScanTable, scored: str, called: bool) -> list[float]:
    shares = CALLED_CUTS if called else NOT_CALLED_CUTS
    found = table.query(f"SELECT quantile_disc(margin, {list(shares)}) AS cuts FROM ({scored}) WHERE called = {called}")
    return sorted(set(found[0]["cuts"] or ()))


def _stratum(cuts: dict[bool, list[float]]) -> str:
    """The number of an image's stratum in SQL, greater for greater scores; those that are called come last."""

    def above(called: bool) -> str:
        return " + ".join(["0", *(f"(margin > {cut!r})::INT" for cut in cuts[called])])

    return f"CASE WHEN called THEN {len(cuts[False]) + 1} + {above(True)} ELSE {above(False)} END"


def allocate(populations: Sequence[int], size: int) -> list[int]:
    """Deal `size` images out to strata of these sizes: half in proportion to them, half in equal parts, each at least
    LEAST and at most all of its images."""
    total = sum(populations)
    if size >= total:
        return list(populations)
    wanted = np.array([size * (one / total + 1 / len(populations)) / 2 for one in populations])
    sizes = np.array([min(one, max(LEAST, int(part))) for one, part in zip(populations, wanted, strict=True)])
    while sizes.sum() < size:  # what was rounded down or does not fit goes where most is wanted
        sizes[np.argmax(np.where(sizes < populations, wanted - sizes, -np.inf))] += 1
    while sizes.sum() > size and (sizes > 1).any():
        sizes[np.argmax(np.where(sizes > 1, sizes - wanted, -np.inf))] -= 1
    return [int(one) for one in sizes]


def systematic(population: int, count: int, start: float) -> list[int]:
    """Return `count` places of 1..population at equal distances; `start`, 0..1, is random. Each place has the chance
    count / population."""
    return [int((start + index) * population / count) + 1 for index in range(count)]


def build_sample(table: ScanTable, size: int, seed: int) -> Sample:
    """Draw a sample of a scan and describe it for sample.json. Raises AuditError."""
    plan = table.plan
    card = Card.from_dict(plan.card)
    drawn = draw(table, card.decision, size, seed)
    left_out = table.query_one(
        "SELECT count(*) FILTER (status = 'rejected') AS rejected, count(*) FILTER (status = 'failed') AS failed,"
        " count(*) FILTER (status = 'scored' AND other_model) AS other_model FROM rows"
    )
    return {
        "schema": SCHEMA,
        "audit": f"{plan.scan}.n{size}.s{seed}",
        "scan": plan.scan,
        "source": plan.source.url,
        "model": {"name": card.name, "version": card.version, "digest": plan.digest},
        "threshold": card.decision.threshold,
        "chosen_by": card.decision.chosen_by,
        "card_rates": card_rates(card),
        "seed": seed,
        "asked": size,
        "population": sum(one["population"] for one in drawn["strata"]),
        "left_out": left_out,
        **drawn,
    }


def threshold_at(margin: float, threshold: float) -> float:
    """Return the p_ai that lies `margin` in log odds above the threshold."""
    return float(expit(_log_odds(threshold) + margin))


def _log_odds(threshold: float) -> float:
    return float(logit(np.clip(threshold, 1e-12, 1 - 1e-12)))


def sample_name(audit: str) -> str:
    """The name of an audit's sample in the results. Raises AuditError where `audit` is no name of one."""
    if not AUDIT_NAME.fullmatch(audit) or audit.strip(".") == "":
        raise AuditError(f"{audit!r} is not the name of an audit: were the labels saved by an audit's review page?")
    return f"{AUDITS}/{audit}/sample.json"


def write_sample(out: Store, sample: Sample) -> None:
    """Write the sample into the results, where `audit-report` finds it."""
    out.write(sample_name(sample["audit"]), json.dumps(sample, indent=1, allow_nan=False).encode())


def read_sample(out: Store, audit: str) -> Sample:
    """Read an audit's sample. Raises AuditError where the results hold no such audit."""
    data = out.read(sample_name(audit))
    if data is None:
        raise AuditError(f"{out.url} holds no audit {audit}: give the results folder that its sample was drawn from")
    sample: Sample = json.loads(data)
    return sample
