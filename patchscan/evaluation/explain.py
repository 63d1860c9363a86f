"""Explain one image's score: what each model saw, how the score changes with other patches or crops, and what makes the
answer uncertain. `explain_picture` draws the explanation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from patchscan.common.errors import UserError
from patchscan.detector.answer import Answer, Tier
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import IMPORTED, Card, Decision
from patchscan.detector.detector import Detector
from patchscan.detector.graph_detector import GRAPH_FILE, GraphDetector
from patchscan.detector.images import ImageError, decode
from patchscan.detector.models import Ensemble
from patchscan.detector.onnx_detector import OnnxDetector
from patchscan.detector.patches import Rule, choose_patches, complexity, seed_from_pixels
from patchscan.detector.presets import EnsemblePreset, PatchPreset, WholeImagePreset

# Limits above (below) which a patch is reported as clipped (flat): there is little noise in such a patch.
CLIPPED_SHARE, FLAT_DEVIATION = 0.25, 1.0
# An image reduced more than this has lost most of the traces that a generator leaves between neighbouring pixels.
STRONG_REDUCTION = 2.0
# For a model of whole images, in pixels: how much is cut off to shift the image, and the side of the covered squares.
SHIFT, SQUARE = 8, 32


class ExplainError(UserError):
    """The image cannot be explained; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PatchView:
    """What a model that scores patches saw.

    `candidates` int (n, 2): corners (x, y) of the candidate patches; `complexity` int (n,): their complexity; `chosen`
    int (count, 2): corners of the scored patches; `votes` float64 (count,): p_ai of each of them alone; `patch` uint8
    (size, size, 3): the first of them. `rule` is the patch rule, `p_ai` this model's own.
    """

    architecture: str
    p_ai: float
    rule: Rule
    size: int
    candidates: np.ndarray
    complexity: np.ndarray
    chosen: np.ndarray
    votes: np.ndarray
    patch: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WholeImageView:
    """What a model that scores whole images saw.

    `pixels` uint8 (size, size, 3): the reduced image; `weight` float64 (k, k): by how much the logit falls when that
    square is covered with the mean colour (occlusion, Zeiler and Fergus, arXiv 1311.2901), above 0 if the square speaks
    for AI; `reduction`: the image's shorter side over that of the reduced image. `p_ai` is this model's own.
    """

    architecture: str
    p_ai: float
    pixels: np.ndarray
    weight: np.ndarray
    reduction: float


View = PatchView | WholeImageView


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The explanation of one image's score.

    `rgb` uint8 (height, width, 3): the image; `answer`: the same as in serving; `views`: what the model, or each member
    of an ensemble, saw; `alternative_p_ai` float64 (redraws,): p_ai with other patches, or with the image shifted by a
    few pixels; `doubts`: what makes the answer uncertain, one sentence each, with the card's warnings.
    """

    rgb: np.ndarray
    answer: Answer
    views: list[View]
    alternative_p_ai: np.ndarray
    doubts: list[str]


def explain(detector: BaseDetector, data: bytes, redraws: int = 20, run: Path | None = None) -> Explanation:
    """Score one encoded image and explain the score. It is also scored `redraws` times with other patches, or shifted,
    to show how much the answer depends on them. `run`: the detector's run folder, which only an ensemble with an
    imported member needs. Raises ExplainError if the image cannot be scored."""
    try:
        prepared = detector.prepare(data)
    except ImageError as error:
        raise ExplainError(f"the image cannot be scored: {error.code}: {error.message}") from error
    rgb, preset = decode(data, detector.limits).rgb, detector.card.preset
    seed = seed_from_pixels(rgb)
    answer = detector.answer(prepared, detector.logits([prepared.crops.pixels])[0])
    views = [_view(member, rgb, seed, answer.tier) for member in members(detector, run)]
    redrawn = [
        preset.crops(_shifted(rgb, number) if is_shifted(views) else rgb, (seed + number) % 2**32).pixels
        for number in range(1, redraws + 1)
    ]
    decision = detector.card.decision.of(answer.tier)
    alternatives = np.array([decision.p_ai(logit) for logit in detector.logits(redrawn)])
    doubts = find_doubts(detector, answer, views, alternatives)
    return Explanation(rgb=rgb, answer=answer, views=views, alternative_p_ai=alternatives, doubts=doubts)


def members(detector: BaseDetector, run: Path | None) -> Sequence[BaseDetector]:
    """Return the members of an ensemble as separate detectors, each with its own calibration; for any other model, the
    detector itself. `run` as in `explain`."""
    card = detector.card
    if run is not None and card.architecture == IMPORTED and isinstance(card.preset, EnsemblePreset):
        return _joined_members(card, card.preset, (run / GRAPH_FILE).read_bytes())
    if not isinstance(detector, Detector) or not isinstance(detector.model, Ensemble):
        return [detector]
    model, preset = detector.model, card.preset
    presets = preset.members if isinstance(preset, EnsemblePreset) else (preset,) * len(model.members)
    names, temperatures, biases = card.architecture.split("+"), model.temperatures.tolist(), model.biases.tolist()
    return [
        Detector(
            replace(card, architecture=name, preset=preset, decision=Decision(temperature=temperature, bias=bias)),
            member,
            str(detector.device),
        )
        for name, preset, temperature, bias, member in zip(
            names, presets, temperatures, biases, model.members, strict=True
        )
    ]


def _joined_members(card: Card, preset: EnsemblePreset, graph: bytes) -> list[BaseDetector]:
    """The members of an ensemble whose graphs were joined."""
    from patchscan.detector.ensemble_graph import split_graph

    parts = zip(card.training["members"], preset.members, split_graph(graph, preset), strict=True)
    return [
        OnnxDetector(replace(card, architecture=described["name"], preset=member, decision=decision), alone)
        for described, member, (alone, decision) in parts
    ]


def _view(detector: BaseDetector, rgb: np.ndarray, seed: int, tier: Tier) -> View:
    preset, decision = detector.card.preset, detector.card.decision.of(tier)
    crops = preset.crops(rgb, seed)
    logit = detector.logits([crops.pixels])[0]
    if isinstance(preset, PatchPreset):
        candidates = crops
        if preset.rule in ("simplest", "most_complex"):
            count = max(preset.candidates, preset.count)
            candidates = choose_patches(rgb, rule="random", size=preset.size, count=count, seed=seed)
        # A graph may take this number of crops and no other; the mean of one crop's copies is its own logit.
        copies = len(crops.pixels) if isinstance(detector, GraphDetector) else 1
        alone = np.repeat(crops.pixels[:, None], copies, axis=1)
        return PatchView(
            architecture=detector.card.architecture,
            p_ai=decision.p_ai(logit),
            rule=preset.rule,
            size=preset.size,
            candidates=candidates.corners,
            complexity=complexity(candidates.pixels),
            chosen=crops.corners,
            votes=np.array([decision.p_ai(one) for one in detector.logits(list(alone))]),
            patch=crops.pixels[0],
        )
    assert isinstance(preset, WholeImagePreset)  # a member is no ensemble itself
    pixels = crops.pixels[0]
    return WholeImageView(
        architecture=detector.card.architecture,
        p_ai=decision.p_ai(logit),
        pixels=pixels,
        weight=logit - _covered_logits(detector, pixels),
        reduction=min(rgb.shape[:2]) / preset.resize,
    )


def _covered_logits(detector: BaseDetector, pixels: np.ndarray) -> np.ndarray:
    """The logits (k, k) of the image, each with one SQUARE x SQUARE part covered by the mean colour."""
    squares, mean = max(1, pixels.shape[0] // SQUARE), pixels.mean(axis=(0, 1)).astype(np.uint8)
    covered = np.repeat(pixels[None, None], squares * squares, axis=0)
    for number in range(squares * squares):
        y, x = (SQUARE * position for position in divmod(number, squares))
        covered[number, 0, y : y + SQUARE, x : x + SQUARE] = mean
    return np.array(detector.logits(list(covered))).reshape(squares, squares)


def is_shifted(views: list[View]) -> bool:
    """Whether the alternatives are shifts of the image: some model's crops depend on no draw."""
    return any(isinstance(view, WholeImageView) or view.rule == "grid" for view in views)


def _shifted(rgb: np.ndarray, seed: int) -> np.ndarray:
    """The image without SHIFT rows and columns, cut off at edges that `seed` decides."""
    if min(rgb.shape[:2]) <= 2 * SHIFT:
        return rgb
    x, y = np.random.default_rng(seed).integers(0, SHIFT + 1, 2)
    return rgb[y : rgb.shape[0] - SHIFT + y, x : rgb.shape[1] - SHIFT + x]


def find_doubts(detector: BaseDetector, answer: Answer, views: list[View], alternatives: np.ndarray) -> list[str]:
    """List what makes an answer uncertain, one sentence each; empty if nothing does. `alternatives` is p_ai with other
    patches or shifts, (n,)."""
    decision, found = detector.card.decision.of(answer.tier), list(detector.card.all_warnings)
    if answer.reason == "small_image":
        found.append(
            "The image is smaller than the model's input and had to be enlarged or continued: no verdict is given."
        )
    if answer.reason == "out_of_domain":
        covered = detector.card.decision.covers(answer.tier)
        looks_like = "a drawing, a screenshot or a page" if covered else answer.tier
        found.append(f"The image looks like {looks_like}, and there the model cannot tell AI from real: no verdict.")
    if answer.reason == "abstain_band":
        found.append(f"p_ai lies in the abstain band, {decision.abstain_low:.3f} to {decision.abstain_high:.3f}.")
    verdicts = [decision.verdict(p_ai) for p_ai in alternatives]
    differ = sum(verdict != answer.verdict for verdict in verdicts)
    if differ and answer.reason not in ("small_image", "out_of_domain"):
        what = "shifts of the image by a few pixels" if is_shifted(views) else "draws of patches"
        found.append(f"{differ} of {len(alternatives)} other {what} would give another verdict.")
    if len({view.p_ai >= 0.5 for view in views}) > 1:
        scores = ", ".join(f"{view.architecture} {view.p_ai:.2f}" for view in views)
        found.append(f"The members disagree: {scores}.")
    for view in views:
        found += _doubts_about_view(view)
    if answer.image["format"] == "GIF" or answer.image["frames"] > 1:
        found.append("The file is an animation or has a palette: only its first frame was scored.")
    return found


def _doubts_about_view(view: View) -> list[str]:
    if isinstance(view, WholeImageView):
        if view.reduction <= STRONG_REDUCTION:
            return []
        return [f"{view.architecture} saw the image reduced {view.reduction:.1f} x, which removes its finest traces."]
    found = []
    clipped = float(((view.patch == 0) | (view.patch == 255)).mean())
    if clipped > CLIPPED_SHARE:
        found.append(f"{clipped * 100:.0f} % of the patch is clipped to black or white, where no noise is left.")
    if float(view.patch.std(axis=(0, 1)).max()) < FLAT_DEVIATION:
        found.append("The patch is almost uniform in colour: it contains hardly any noise.")
    return found


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """Return the explanation's figures, for JSON."""
    return {
        **asdict(explanation.answer),
        "views": [_figures(view) for view in explanation.views],
        "p_ai_of_other_choices": explanation.alternative_p_ai.tolist(),
        "doubts": explanation.doubts,
    }


def _figures(view: View) -> dict[str, Any]:
    figures = {"architecture": view.architecture, "p_ai": view.p_ai}
    if isinstance(view, WholeImageView):
        return figures | {"weight": view.weight.tolist(), "reduction": view.reduction}
    return figures | {
        "chosen": view.chosen.tolist(),
        "votes": view.votes.tolist(),
        "candidates": view.candidates.tolist(),
        "complexity": view.complexity.tolist(),
    }
