"""What a disturbance does to the rates is what it does to the verdicts: each image is decided as its tier is."""

import numpy as np
import pandas as pd
import pytest

from patchscan.dataset.sources import SOURCE_COLUMNS
from patchscan.detector.card import Decision
from patchscan.evaluation import robustness
from patchscan.evaluation.disturbances import Disturbance
from tests.scan_kit import card


def test_a_disturbed_image_is_decided_as_the_tier_that_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disturbance makes each image look like tier hard, whose threshold is p_ai 0.9, and changes no logit."""
    tiers = iter(["native", "hard"])

    def score_images(*_: object) -> pd.DataFrame:
        logit = np.array([-1.0, 1.0, 1.0, 3.0])
        return pd.DataFrame(
            {
                "path": list("abcd"), "generator": "ours", "label": [0, 0, 1, 1], "logit": logit, "tier": next(tiers),
                "small": False, "graphic": False, "status": "scored",
            }
        )  # fmt: skip

    monkeypatch.setattr(robustness, "score_images", score_images)
    monkeypatch.setattr(robustness, "disturbances", lambda: [Disturbance("jpeg", 30, "JPEG", lambda *_: b"")])
    stub = card(training={"seen": ["ours"]}, decision=Decision(tiers={"hard": Decision(threshold=0.9)}))
    images = pd.DataFrame({name: [None] * 4 for name in SOURCE_COLUMNS} | {"source_known": False})
    before, after = robustness.measure_robustness(object(), stub, lambda _: b"", images)["rows"]  # type: ignore[arg-type]
    rates = [(row["real_detection"]["value"], row["fake_detection"]["value"]) for row in (before, after)]
    assert rates == [(0.5, 1.0), (1.0, 0.5)]
