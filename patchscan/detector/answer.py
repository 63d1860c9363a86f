"""The answer to one image: what the server returns, what a row stores, what a report shows."""

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ai", "real", "uncertain"]

# Headers of a served answer: what it took of the model's device (seconds of a core or of the GPU), so that a scan can
# say what it cost.
MODEL_SECONDS, DEVICE = "X-Patchscan-Model-Seconds", "X-Patchscan-Device"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One scored image.

    `logit` is the model's raw output, AI positive, averaged over the crops; `p_ai` is its calibrated probability.
    `reason` says why a verdict is `uncertain` (else None): `abstain_band` or `small_image`. `patch` is the first crop:
    x, y, size in pixels of the scored image, and its complexity. `image` is width, height, format, frames.
    """

    p_ai: float
    logit: float
    verdict: Verdict
    reason: str | None
    patch: dict[str, int]
    image: dict[str, Any]
    model: str
    version: str
    digest: str
