"""The answer to one image, as the server returns it, a row stores it and a report shows it."""

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ai", "real", "uncertain"]

# Response headers: seconds of a CPU core or of the GPU that the model used, and which of the two. A scan adds them up
# to report its cost.
MODEL_SECONDS, DEVICE = "X-Patchscan-Model-Seconds", "X-Patchscan-Device"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result for one scored image.

    `logit` is the model's raw output, AI positive, averaged over the crops; `p_ai` is its calibrated probability.
    `reason` says why a verdict is `uncertain`: `abstain_band` or `small_image`; otherwise it is None. `patch` describes
    the first crop: x, y, size in pixels of the scored image, and its complexity. `image` holds width, height, format,
    frames.
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
