"""The answer to one image, as the server returns it, a row stores it and a report shows it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Verdict = Literal["ai", "real", "uncertain"]
# How an image was delivered: as stored, as the web does, by a chain of services, or enlarged (evaluation/tiers.py).
Tier = Literal["native", "web", "hard", "enlarged"]
TIERS: tuple[Tier, ...] = get_args(Tier)
# What runs a model: PyTorch, ONNX Runtime or OpenVINO.
Engine = Literal["torch", "onnx", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
# What ran it, as answers, rows and reports say: with the precision where that is not float32.
EngineUsed = Literal["torch", "torch-fp16", "onnx", "openvino", "openvino-bf16"]

# Response headers: seconds of a CPU core or of the GPU that the model used, and which of the two. A scan adds them up
# to report its cost.
MODEL_SECONDS, DEVICE = "X-Patchscan-Model-Seconds", "X-Patchscan-Device"
# A header of requests and responses of the Open Inference Protocol: the length of the JSON at the beginning of a body,
# where raw tensors follow it.
JSON_LENGTH = "Inference-Header-Content-Length"

# The most crops in one request. The largest model takes a tenth of a second of a core for each, and TorchServe kills a
# worker after two minutes.
MAX_CROPS = 1024


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result for one scored image.

    `logit` is the model's raw output, AI positive, averaged over the crops; `p_ai` is its calibrated probability.
    `reason` says why a verdict is `uncertain`: `abstain_band`, `small_image`, or `out_of_domain` where the model cannot
    tell AI from real in the image's tier, or the image is a graphic and no photograph; otherwise it is None. `tier` is
    the delivery that the pixels look like, and decides which numbers of the card apply; `jpeg_quality` (1 to 100, None
    where the file is no JPEG) is what the file's tables say, and decides nothing. `watermark` names the generator whose
    watermark the pixels bear, or is `none`; it decides nothing either. `patch` describes the first crop: x, y,
    size in pixels of the scored image, and its complexity. `image` holds width, height, format, frames. `engine` is
    what ran the model, None where a server does not say.
    """

    p_ai: float
    logit: float
    verdict: Verdict
    reason: str | None
    tier: Tier
    jpeg_quality: int | None
    watermark: str
    patch: dict[str, int]
    image: dict[str, Any]
    model: str
    version: str
    digest: str
    engine: EngineUsed | None
