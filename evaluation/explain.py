"""Why one image got its score: the chosen patch on the image, what the network saw of it, how the candidates compare,
and what would make the answer uncertain, as one picture."""

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.signal import correlate2d

from detector.answer import Answer
from detector.detector import Detector
from detector.errors import UserError
from detector.images import ImageError
from detector.patches import choose_patches, seed_from_bytes
from detector.presets import PatchPreset
from detector.srm import srm_kernels
from evaluation import plots

FILTERS = ("KB, all directions", "KV, all directions", "second difference, horizontal")
# A patch of one flat colour or clipped to black or white carries no noise to read.
CLIPPED_SHARE, FLAT_DEVIATION = 0.25, 1.0


class ExplainError(UserError):
    """An image or model that cannot be explained; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """`answer` is what serving answers; `candidates` (n, 2) the drawn corners and `complexity` (n,) theirs; `chosen`
    the corners that were scored and `patch` the first of them, uint8; `others` are the scores of the image's other
    draws of patches; `doubts` says in words what makes the answer uncertain."""

    rgb: np.ndarray
    answer: Answer
    candidates: np.ndarray
    complexity: np.ndarray
    chosen: np.ndarray
    patch: np.ndarray
    others: np.ndarray
    doubts: list[str]


def explain(detector: Detector, data: bytes, redraws: int = 20) -> Explanation:
    """Score one encoded image and look into its patches; `redraws` further draws of patches show how much the answer
    depends on the draw. Raises ExplainError for an image that cannot be scored or a model without patches."""
    preset = detector.card.preset
    if not isinstance(preset, PatchPreset):
        raise ExplainError(f"{detector.card.name} does not score patches: explain a model that does (ssp, ssp-lite)")
    try:
        prepared = detector.prepare(data)
    except ImageError as error:
        raise ExplainError(f"the image cannot be scored: {error.code}: {error.message}") from error
    rgb, seed = prepared.image.rgb, seed_from_bytes(data)
    answer = detector.answer(prepared, detector.logits([prepared.crops.pixels])[0])
    drawn = choose_patches(rgb, rule="random", size=preset.size, count=max(preset.candidates, preset.count), seed=seed)
    again = [preset.crops(rgb, seed + number).pixels for number in range(1, redraws + 1)]
    others = np.array([detector.card.decision.p_ai(logit) for logit in detector.logits(again)])
    patch = prepared.crops.pixels[0]
    return Explanation(
        rgb=rgb,
        answer=answer,
        candidates=drawn.corners,
        complexity=drawn.complexity,
        chosen=prepared.crops.corners,
        patch=patch,
        others=others,
        doubts=doubts(detector, answer, patch, others),
    )


def doubts(detector: Detector, answer: Answer, patch: np.ndarray, others: np.ndarray) -> list[str]:
    """What makes an answer uncertain, one sentence each; empty where nothing does."""
    decision, found = detector.card.decision, []
    if answer.reason == "small_image":
        found.append("The image is smaller than a patch and had to be enlarged: no verdict is given.")
    if answer.reason == "abstain_band":
        found.append(f"p_ai lies in the abstain band, {decision.abstain_low:.3f} to {decision.abstain_high:.3f}.")
    verdicts = [decision.verdict(p_ai) for p_ai in others]
    differ = sum(verdict != answer.verdict for verdict in verdicts)
    if differ and answer.reason != "small_image":
        found.append(f"{differ} of {len(others)} other draws of patches would give another verdict.")
    clipped = float(((patch == 0) | (patch == 255)).mean())
    if clipped > CLIPPED_SHARE:
        found.append(f"{clipped:.0%} of the patch is clipped to black or white, where no noise is left.")
    if float(patch.std(axis=(0, 1)).max()) < FLAT_DEVIATION:
        found.append("The patch is almost of one colour: there is hardly any noise to read.")
    if answer.image["format"] == "GIF" or answer.image["frames"] > 1:
        found.append("The file is an animation or has a palette: only its first frame was scored.")
    return found


def noise_maps(patch: np.ndarray) -> np.ndarray:
    """SRM's three noise maps of a patch (uint8, size x size x 3) in grey levels of its mean channel, unclamped:
    (3, size - 4, size - 4), where the filters fit."""
    grey = patch.astype(np.float64).mean(axis=2)
    return np.stack([correlate2d(grey, kernel, mode="valid") for kernel in srm_kernels().double().numpy()])


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """The explanation's figures, for JSON."""
    return {
        **asdict(explanation.answer),
        "chosen": explanation.chosen.tolist(),
        "candidates": explanation.candidates.tolist(),
        "complexity": explanation.complexity.tolist(),
        "p_ai_of_other_draws": explanation.others.tolist(),
        "doubts": explanation.doubts,
    }


@plots.styled
def draw(explanation: Explanation, detector: Detector, title: str) -> Figure:
    """The explanation as one picture."""
    drawing = Figure(figsize=(10.5, 8.4), layout="constrained")
    grid = drawing.add_gridspec(3, 4, height_ratios=(1.9, 1, 0.95))
    _image(drawing.add_subplot(grid[0, :2]), explanation, detector.card.preset.size)
    _verdict(drawing.add_subplot(grid[0, 2:]), explanation, detector, title)
    _patch(drawing.add_subplot(grid[1, 0]), explanation.patch, "the patch")
    for number, (name, noise) in enumerate(zip(FILTERS, noise_maps(explanation.patch), strict=True), start=1):
        _noise(drawing.add_subplot(grid[1, number]), noise, name)
    _complexity(drawing.add_subplot(grid[2, :2]), explanation)
    _other_draws(drawing.add_subplot(grid[2, 2:]), explanation, detector)
    return drawing


def _image(axis: Axes, explanation: Explanation, size: int) -> None:
    axis.imshow(explanation.rgb)
    for corners, colour, width in (
        (explanation.candidates, "#ffffff", 0.7),
        (explanation.chosen, plots.AI_COLOUR, 2.2),
    ):
        for x, y in corners:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), size, size, fill=False, edgecolor=colour, linewidth=width))
    axis.set(title="candidates (white) and the scored patches (orange)", xticks=[], yticks=[])


def _verdict(axis: Axes, explanation: Explanation, detector: Detector, title: str) -> None:
    answer, decision = explanation.answer, detector.card.decision
    axis.set_axis_off()
    axis.text(0, 1, title, fontsize=10, va="top", wrap=True, color="#55616e")
    axis.text(0, 0.88, answer.verdict.upper(), fontsize=26, weight="bold", va="top", color=plots.INK)
    lines = [
        f"p_ai {answer.p_ai:.4f}   (logit {answer.logit:.3f})",
        f"AI from {decision.threshold:.4f}; uncertain {decision.abstain_low:.4f} to {decision.abstain_high:.4f}",
        f"{answer.image['width']} x {answer.image['height']} {answer.image['format']}",
        f"model {answer.model} {answer.version}, digest {answer.digest[:16]}",
        "",
        "What makes it uncertain:" if explanation.doubts else "Nothing in this image speaks for more doubt than",
        *([] if explanation.doubts else ["the model's error rates on its card."]),
        *(line for doubt in explanation.doubts for line in textwrap.wrap("- " + doubt, 58, subsequent_indent="  ")),
        "",
        *textwrap.wrap("A score is no proof. It says how this file's noise compares with the images the model was "
                       "trained on.", 58),
    ]  # fmt: skip
    axis.text(0, 0.68, "\n".join(lines), fontsize=9, va="top", linespacing=1.45)


def _patch(axis: Axes, patch: np.ndarray, title: str) -> None:
    axis.imshow(patch, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


def _noise(axis: Axes, noise: np.ndarray, title: str) -> None:
    limit = max(1.0, float(np.abs(noise).max()))
    axis.imshow(noise, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[], xlabel=f"up to {limit:.0f} grey levels")


def _complexity(axis: Axes, explanation: Explanation) -> None:
    order = np.argsort(explanation.complexity, kind="stable")
    scored = {tuple(corner) for corner in explanation.chosen.tolist()}
    colours = [
        plots.AI_COLOUR if tuple(explanation.candidates[one].tolist()) in scored else plots.FAINT for one in order
    ]
    axis.bar(np.arange(len(order)), explanation.complexity[order], color=colours)
    axis.set(title="complexity of the candidates, simplest first", xlabel="candidate", ylabel="sum of differences")


def _other_draws(axis: Axes, explanation: Explanation, detector: Detector) -> None:
    decision = detector.card.decision
    plots.mark_decision(axis, decision.threshold, (decision.abstain_low, decision.abstain_high))
    height = np.linspace(0.2, 0.8, len(explanation.others)) if len(explanation.others) else np.array([])
    axis.plot(explanation.others, height, "o", color=plots.REAL_COLOUR, alpha=0.5, markersize=5)
    axis.axvline(explanation.answer.p_ai, color=plots.AI_COLOUR, linewidth=2)
    axis.set(title="this answer (orange) and other draws of patches", xlabel="p_ai", xlim=(-0.02, 1.02), ylim=(0, 1))
    axis.set_yticks([])


def write_explanation(run: Path, image: Path, out: Path, device: str = "cpu") -> Explanation:
    """Explain a file and write the picture to `out` (.png). Raises ExplainError where the file cannot be read."""
    detector = Detector.load(run, device)
    try:
        data = image.read_bytes()
    except OSError as error:
        raise ExplainError(f"cannot read {image}: {error.strerror}") from error
    explanation = explain(detector, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(plots.png(draw(explanation, detector, image.name)))
    return explanation
