"""Measure how often the intervals of `patchscan audit-report` hold the truth, on simulated buckets.

    python -m tests.audit_coverage --buckets 1000 --sample 200

In each bucket the share of AI images, the detector's power, how far its p_ai is off, and how AI images gather in
folders and tiers are drawn at random. The sample is drawn and the intervals are made by the code of the commands; its
labels are true. Prints one line for each figure: the share of the buckets whose interval holds the truth, and its mean
width.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from scipy.special import expit

from patchscan.detector.answer import TIERS
from patchscan.detector.card import Decision
from patchscan.reporting.statistics import Estimate
from patchscan.scanning.audit_report import estimates
from patchscan.scanning.audit_sample import draw
from patchscan.scanning.table import ScanTable

SHARES = (0.005, 0.02, 0.1, 0.4)


class Bucket(ScanTable):
    """The rows of a simulated scan as the SQL view `rows`; `rows` has the true label too, `is_ai`."""

    def __init__(self, images: int, share: float, rng: np.random.Generator):
        self.decision = Decision(threshold=0.7, abstain_low=0.7, abstain_high=0.7)
        tier = rng.choice(4, images, p=[0.4, 0.4, 0.15, 0.05])
        folder = rng.choice(12, images, p=rng.dirichlet(np.ones(12)))
        # AI images gather in some folders and tiers.
        odds = share * rng.gamma(0.5, 2, 12)[folder] * rng.gamma(2, 0.5, 4)[tier]
        is_ai = rng.random(images) < np.clip(odds, 0, 0.95)
        power, bias, scale = rng.uniform(1, 4), rng.normal(-2, 1), rng.uniform(0.5, 2)
        score = (rng.normal(0, 1.3, images) + power * is_ai - 0.3 * tier + bias) * scale
        p_ai = expit(score)
        called = p_ai >= self.decision.threshold
        self.rows = pd.DataFrame(
            {
                "key": [f"{one}/{number}.jpg" for number, one in enumerate(folder)],
                "version_id": None,
                "etag": None,
                "tier": np.array(TIERS)[tier],
                "verdict": np.where(called, "ai", "real"),
                "p_ai": p_ai,
                "logit": score,
                "patch": None,
                "status": "scored",
                "other_model": False,
                "is_ai": is_ai,
            }
        )
        self._db = duckdb.connect(config={"threads": 1})
        self._db.register("rows", self.rows)

    def query(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return list(self._db.sql(query).to_arrow_table().to_pylist())

    def truth(self) -> dict[str, float]:
        """The figures of the whole bucket; NaN where one is undefined."""
        ai, called = self.rows.is_ai.to_numpy(), (self.rows.verdict == "ai").to_numpy()

        def share(part: np.ndarray, whole: np.ndarray) -> float:
            return float((part & whole).sum() / whole.sum()) if whole.any() else np.nan

        everything = np.ones(len(ai), bool)
        return {
            "prevalence": share(ai, everything),
            "labels alone": share(ai, everything),
            "tpr": share(called, ai),
            "fpr": share(called, ~ai),
            "precision": share(ai, called),
            "missed": share(ai, ~called),
        }


def audit(bucket: Bucket, size: int, seed: int) -> dict[str, Estimate]:
    """The figures' estimates from a sample whose labels are the truth."""
    sample = draw(bucket, bucket.decision, size, seed)
    is_ai = dict(zip(bucket.rows.key, bucket.rows.is_ai, strict=True))
    found = estimates(sample, {row["number"]: "ai" if is_ai[row["key"]] else "real" for row in sample["rows"]})
    rates = vars(found.rates) if found.rates else {}
    return {"prevalence": found.prevalence, "labels alone": found.labels_only, **rates}


def simulate(buckets: int, size: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield, for each bucket and figure: the bucket's share, whether the interval holds the truth, and its width."""
    for number in range(buckets):
        rng = np.random.default_rng([seed, number])
        share = SHARES[number % len(SHARES)]
        bucket = Bucket(int(rng.integers(2_000, 20_000)), share, rng)
        truth = bucket.truth()
        for figure, found in audit(bucket, size, number).items():
            if found.value is not None and not np.isnan(truth[figure]):
                _, low, high = found.bounds
                yield {"figure": figure, "share": share, "held": low <= truth[figure] <= high, "width": high - low}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--buckets", type=int, default=1000, help="how many buckets to simulate")
    parser.add_argument("--sample", type=int, default=200, help="images labelled in each")
    parser.add_argument("--seed", type=int, default=0, help="of the first random numbers")
    options = parser.parse_args()
    table = pd.DataFrame(simulate(options.buckets, options.sample, options.seed))
    for by in (["figure"], ["figure", "share"]):
        print(
            table.groupby(by, sort=False).agg(buckets=("held", "size"), held=("held", "mean"), width=("width", "mean"))
        )


if __name__ == "__main__":
    main()
