"""The steps of scoring that need no torch: bytes to crops before the model, logit to answer after it."""

import time
from dataclasses import dataclass
from typing import Any

from patchscan.detector.answer import Answer, EngineUsed, Tier
from patchscan.detector.card import Card
from patchscan.detector.graphic import is_graphic
from patchscan.detector.images import Limits, decode
from patchscan.detector.patches import Patches, complexity, seed_from_pixels
from patchscan.detector.presets import EnsemblePreset, PatchPreset, Preset
from patchscan.detector.tier import estimate_tier
from patchscan.detector.watermark import watermark


@dataclass(frozen=True)
class Prepared:
    """The crops of one image, and the facts about the image that its answer states.

    The decoded image is not kept, so that many prepared images can wait for the model. `decode_s` and `patch_s` are the
    seconds spent on decoding and on choosing the crops. `graphic`: see `is_graphic`. `watermark`: what
    `watermark.watermark` says.
    """

    image: dict[str, Any]
    tier: Tier
    graphic: bool
    jpeg_quality: int | None
    watermark: str
    crops: Patches
    decode_s: float
    patch_s: float


def prepare(data: bytes, preset: Preset, limits: Limits = Limits()) -> Prepared:
    """Decode one encoded image and choose its crops. Raises ImageError."""
    started = time.perf_counter()
    image = decode(data, limits)
    decoded = time.perf_counter()
    facts = {"width": image.width, "height": image.height, "format": image.format, "frames": image.frames}
    crops = preset.crops(image.pillow, seed_from_pixels(image.pillow))
    tier = estimate_tier(image.pillow)
    graphic = is_graphic(image.pillow)
    found = watermark(image.pillow, image.jpeg_quality)
    seconds = (decoded - started, time.perf_counter() - decoded)
    return Prepared(facts, tier, graphic, image.jpeg_quality, found, crops, *seconds)


def build_answer(prepared: Prepared, logit: float, card: Card, engine: EngineUsed | None) -> Answer:
    """Build the answer to a prepared image from its logit, which `engine` computed. Raises NotFiniteError if the logit
    is NaN or infinite."""
    decision = card.decision.of(prepared.tier)
    p_ai = decision.p_ai(logit)
    verdict = decision.verdict(p_ai)
    reason = "abstain_band" if verdict == "uncertain" else None
    if prepared.graphic or not card.decision.covers(prepared.tier):
        verdict, reason = "uncertain", "out_of_domain"
    if prepared.crops.upscaled:
        verdict, reason = "uncertain", "small_image"
    first = card.preset.members[0] if isinstance(card.preset, EnsemblePreset) else card.preset
    return Answer(
        p_ai=p_ai,
        logit=logit,
        verdict=verdict,
        reason=reason,
        tier=prepared.tier,
        jpeg_quality=prepared.jpeg_quality,
        watermark=prepared.watermark,
        patch=_describe_first(prepared.crops, first),
        image=prepared.image,
        model=card.name,
        version=card.version,
        digest=card.digest,
        engine=engine,
    )


def _describe_first(crops: Patches, preset: Preset) -> dict[str, int]:
    """The first crop as an answer's `patch` has it. The whole image, reduced, has no complexity."""
    (x, y), pixels = crops.corners[0].tolist(), crops.pixels[:1, : preset.size, : preset.size]
    of_patch = int(complexity(pixels)[0]) if isinstance(preset, PatchPreset) else 0
    return {"x": x, "y": y, "size": preset.size, "complexity": of_patch}
