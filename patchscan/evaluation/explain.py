"""Why one image got its score: what each model saw of it, how the choice compares with other choices, and what would
make the answer uncertain. `explain_picture` draws it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from patchscan.common.errors import UserError
from patchscan.detector.answer import Answer
from patchscan.detector.card import Decision
from patchscan.detector.detector import Detector
from patchscan.detector.images import ImageError, decode
from patchscan.detector.models import Ensemble
from patchscan.detector.patches import choose_patches, seed_from_pixels
from patchscan.detector.presets import EnsemblePreset, PatchPreset, WholeImagePreset

# A patch of one flat colour or clipped to black or white carries no noise to read.
CLIPPED_SHARE, FLAT_DEVIATION = 0.25, 1.0
# Reduced by more than this, an image has lost most of what a generator left between neighbouring pixels.
STRONG_REDUCTION = 2.0
# Whole images are scored again less so many rows and columns, and covered one square of so many pixels at a time.
MOVE, SQUARE = 8, 32


class ExplainError(UserError):
    """An image that cannot be explained; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PatchView:
    """What a model of patches saw: `candidates` int (n, 2) the corners (x, y) it chose among and `complexity` int (n,)
    theirs; `chosen` int (count, 2) the corners that were scored, `patch` uint8 (size, size, 3) the first of them.
    `p_ai` is its own."""

    architecture: str
    p_ai: float
    size: int
    candidates: np.ndarray
    complexity: np.ndarray
    chosen: np.ndarray
    patch: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WholeView:
    """What a model of whole images saw: `seen` uint8 (size, size, 3) the reduced image, and `weight` float64 (k, k), by
    how much the logit falls where that square is covered with grey (occlusion, Zeiler and Fergus, arXiv 1311.2901):
    above 0 where the square speaks for AI. `reduction` is the image's shorter side over the one that was scored."""

    architecture: str
    p_ai: float
    seen: np.ndarray
    weight: np.ndarray
    reduction: float


View = PatchView | WholeView


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`answer` is what serving answers; `views` what each model saw (one, or an ensemble's members); `others` the p_ai
    of other choices: patches drawn anew, whole images moved by a few pixels; `doubts` says in words what makes the
    answer uncertain, what the card warns of included."""

    rgb: np.ndarray
    answer: Answer
    views: list[View]
    others: np.ndarray
    doubts: list[str]


def explain(detector: Detector, data: bytes, redraws: int = 20) -> Explanation:
    """Score one encoded image and look into what was scored; `redraws` further choices show how much the answer
    depends on the choice. Raises ExplainError for an image that cannot be scored."""
    try:
        prepared = detector.prepare(data)
    except ImageError as error:
        raise ExplainError(f"the image cannot be scored: {error.code}: {error.message}") from error
    rgb, preset = decode(data, detector.limits).rgb, detector.card.preset
    seed = seed_from_pixels(rgb)
    answer = detector.answer(prepared, detector.logits([prepared.crops.pixels])[0])
    views = [_view(member, rgb, seed) for member in members(detector)]
    again = [
        preset.crops(_moved(rgb, number) if _whole(views) else rgb, (seed + number) % 2**32).pixels
        for number in range(1, redraws + 1)
    ]
    others = np.array([detector.card.decision.p_ai(logit) for logit in detector.logits(again)])
    found = doubts(detector, answer, views, others)
    return Explanation(rgb=rgb, answer=answer, views=views, others=others, doubts=found)


def members(detector: Detector) -> list[Detector]:
    """The detector itself, or an ensemble's members as detectors of their own, each with its own calibration."""
    card, model = detector.card, detector.model
    if not isinstance(card.preset, EnsemblePreset) or not isinstance(model, Ensemble):
        return [detector]
    names, temperatures, biases = card.architecture.split("+"), model.temperatures.tolist(), model.biases.tolist()
    return [
        Detector(
            replace(card, architecture=name, preset=preset, decision=Decision(temperature=temperature, bias=bias)),
            member,
            str(detector.device),
        )
        for name, preset, temperature, bias, member in zip(
            names, card.preset.members, temperatures, biases, model.members, strict=True
        )
    ]


def _view(one: Detector, rgb: np.ndarray, seed: int) -> View:
    preset, decision = one.card.preset, one.card.decision
    crops = preset.crops(rgb, seed)
    logit = one.logits([crops.pixels])[0]
    if isinstance(preset, PatchPreset):
        drawn = crops
        if preset.rule in ("simplest", "most_complex"):
            count = max(preset.candidates, preset.count)
            drawn = choose_patches(rgb, rule="random", size=preset.size, count=count, seed=seed)
        return PatchView(
            architecture=one.card.architecture,
            p_ai=decision.p_ai(logit),
            size=preset.size,
            candidates=drawn.corners,
            complexity=drawn.complexity,
            chosen=crops.corners,
            patch=crops.pixels[0],
        )
    assert isinstance(preset, WholeImagePreset)  # a member is no ensemble itself
    seen = crops.pixels[0]
    return WholeView(
        architecture=one.card.architecture,
        p_ai=decision.p_ai(logit),
        seen=seen,
        weight=logit - _covered_logits(one, seen),
        reduction=min(rgb.shape[:2]) / preset.resize,
    )


def _covered_logits(one: Detector, seen: np.ndarray) -> np.ndarray:
    """The logits (k, k) of the image with each SQUARE x SQUARE part of it covered by its mean colour."""
    side, grey = seen.shape[0] // SQUARE, seen.mean(axis=(0, 1)).astype(np.uint8)
    covered = np.repeat(seen[None, None], side * side, axis=0)
    for number in range(side * side):
        y, x = (SQUARE * place for place in divmod(number, side))
        covered[number, 0, y : y + SQUARE, x : x + SQUARE] = grey
    return np.array(one.logits(list(covered))).reshape(side, side)


def _whole(views: list[View]) -> bool:
    return any(isinstance(view, WholeView) for view in views)


def _moved(rgb: np.ndarray, number: int) -> np.ndarray:
    """The image less MOVE rows and columns, `number` deciding at which of its edges."""
    if min(rgb.shape[:2]) <= 2 * MOVE:
        return rgb
    x, y = np.random.default_rng(number).integers(0, MOVE + 1, 2)
    return rgb[y : rgb.shape[0] - MOVE + y, x : rgb.shape[1] - MOVE + x]


def doubts(detector: Detector, answer: Answer, views: list[View], others: np.ndarray) -> list[str]:
    """What makes an answer uncertain, one sentence each; empty where nothing does."""
    decision, found = detector.card.decision, list(detector.card.all_warnings)
    if answer.reason == "small_image":
        found.append("The image is smaller than what is scored and had to be enlarged: no verdict is given.")
    if answer.reason == "abstain_band":
        found.append(f"p_ai lies in the abstain band, {decision.abstain_low:.3f} to {decision.abstain_high:.3f}.")
    verdicts = [decision.verdict(p_ai) for p_ai in others]
    differ = sum(verdict != answer.verdict for verdict in verdicts)
    if differ and answer.reason != "small_image":
        what = "moves of the image by a few pixels" if _whole(views) else "draws of patches"
        found.append(f"{differ} of {len(others)} other {what} would give another verdict.")
    if len({view.p_ai >= 0.5 for view in views}) > 1:
        each = ", ".join(f"{view.architecture} {view.p_ai:.2f}" for view in views)
        found.append(f"The members disagree: {each}.")
    for view in views:
        found += _doubts_of_view(view)
    if answer.image["format"] == "GIF" or answer.image["frames"] > 1:
        found.append("The file is an animation or has a palette: only its first frame was scored.")
    return found


def _doubts_of_view(view: View) -> list[str]:
    if isinstance(view, WholeView):
        if view.reduction <= STRONG_REDUCTION:
            return []
        return [
            f"{view.architecture} saw the image reduced {view.reduction:.1f} x: its finest traces are averaged away."
        ]
    found = []
    clipped = float(((view.patch == 0) | (view.patch == 255)).mean())
    if clipped > CLIPPED_SHARE:
        found.append(f"{clipped:.0%} of the patch is clipped to black or white, where no noise is left.")
    if float(view.patch.std(axis=(0, 1)).max()) < FLAT_DEVIATION:
        found.append("The patch is almost of one colour: there is hardly any noise to read.")
    return found


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """The explanation's figures, for JSON."""
    return {
        **asdict(explanation.answer),
        "views": [_figures(view) for view in explanation.views],
        "p_ai_of_other_choices": explanation.others.tolist(),
        "doubts": explanation.doubts,
    }


def _figures(view: View) -> dict[str, Any]:
    shown = {"architecture": view.architecture, "p_ai": view.p_ai}
    if isinstance(view, WholeView):
        return shown | {"weight": view.weight.tolist(), "reduction": view.reduction}
    return shown | {
        "chosen": view.chosen.tolist(),
        "candidates": view.candidates.tolist(),
        "complexity": view.complexity.tolist(),
    }
