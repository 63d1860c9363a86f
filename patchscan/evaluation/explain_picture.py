"""Draw an explanation as one picture: the image with the scored patches, the verdict and what makes it uncertain, and
one row per model with what it saw."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from patchscan.detector.base import BaseDetector
from patchscan.detector.engines import load_any
from patchscan.detector.images import ImageError, read_image
from patchscan.detector.srm import srm_kernels
from patchscan.evaluation.explain import ExplainError, Explanation, PatchView, View, WholeImageView, explain, is_shifted
from patchscan.reporting import plots

# Height of one line of text, and of the heading above the lines.
LINE_INCHES, HEADING_INCHES = 0.185, 1.25
FILTERS = ("KB, all directions", "KV, all directions", "second difference, horizontal")


def write_explanation(run: Path, image: Path, out: Path, device: str = "cpu") -> Explanation:
    """Explain a file and write the picture to `out` (.png). Raises ExplainError if it cannot be read or scored."""
    detector = load_any(run, device)
    try:
        data = read_image(image, detector.limits)
    except OSError as error:
        raise ExplainError(f"cannot read {image}: {error.strerror}") from error
    except ImageError as error:
        raise ExplainError(f"the image cannot be scored: {error.code}: {error.message}") from error
    explanation = explain(detector, data, run=run)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.write_png(draw(explanation, detector, image.name), out, photographs=True)
    return explanation


@plots.styled
def draw(explanation: Explanation, detector: BaseDetector, title: str) -> Figure:
    """Draw the explanation, with one row per model."""
    views = explanation.views
    lines = _verdict_lines(explanation, detector)
    heights = (max(4.1, HEADING_INCHES + LINE_INCHES * len(lines)), *[2.2] * len(views), 2.1)
    drawing = Figure(figsize=(10.5, sum(heights)), layout="constrained")
    grid = drawing.add_gridspec(2 + len(views), 4, height_ratios=heights)
    _image(drawing.add_subplot(grid[0, :2]), explanation)
    _verdict(drawing.add_subplot(grid[0, 2:]), plots.shown(title), explanation.answer.verdict, lines, heights[0])
    for row, view in enumerate(views, start=1):
        _row(drawing, [grid[row, column] for column in range(4)], view, len(views) > 1)
    last = drawing.add_subplot(grid[-1, :2])
    if len(views) > 1:
        _members(last, views)
    elif isinstance(views[0], PatchView) and views[0].rule == "grid":
        _votes(last, views[0])
    elif isinstance(views[0], PatchView):
        _complexity(last, views[0])
    else:
        _weights(last, views[0])
    _alternatives(drawing.add_subplot(grid[-1, 2:]), explanation, detector)
    return drawing


def noise_maps(patch: np.ndarray) -> np.ndarray:
    """Return SRM's three noise maps of a patch uint8 (size, size, 3), of the mean of its channels, in grey levels, not
    clamped: float64 (3, size - 4, size - 4)."""
    grey = patch.astype(np.float64).mean(axis=2)
    kernels = srm_kernels().double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(grey, kernels.shape[1:])
    maps: np.ndarray = np.einsum("yxij,kij->kyx", windows, kernels)
    return maps


def _image(axis: Axes, explanation: Explanation) -> None:
    axis.imshow(explanation.rgb)
    patches = [view for view in explanation.views if isinstance(view, PatchView)]
    for view in patches:
        for corners, colour, width in ((view.candidates, "#ffffff", 0.7), (view.chosen, plots.AI_COLOUR, 2.2)):
            for x, y in corners:
                place = (x - 0.5, y - 0.5)
                axis.add_patch(Rectangle(place, view.size, view.size, fill=False, edgecolor=colour, linewidth=width))
        if view.rule == "grid":
            for number, (x, y) in enumerate(view.chosen, start=1):
                number_box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # readable on any picture
                axis.annotate(
                    str(number), (x, y), (4, -10), textcoords="offset points", color=plots.AI_COLOUR, bbox=number_box
                )
    choice = any(len(view.candidates) > len(view.chosen) for view in patches)
    title = "the scored patches (orange)" + " and the other candidates (white)" * choice if patches else "the image"
    axis.set(title=title, xticks=[], yticks=[])


def _verdict(axis: Axes, title: str, verdict: str, lines: list[str], height: float) -> None:
    """`height` is the axis' height in inches."""
    axis.set_axis_off()
    axis.text(0, 1, title, fontsize=10, va="top", wrap=True, color="#55616e")
    axis.text(0, 1 - 0.45 / height, verdict.upper(), fontsize=26, weight="bold", va="top", color=plots.INK)
    axis.text(0, 1 - HEADING_INCHES / height, "\n".join(lines), fontsize=9, va="top", linespacing=1.45)


def _verdict_lines(explanation: Explanation, detector: BaseDetector) -> list[str]:
    answer = explanation.answer
    decision = detector.card.decision.of(answer.tier)
    abstains = decision.abstain_low < decision.abstain_high
    band = f"; uncertain {decision.abstain_low:.4f} to {decision.abstain_high:.4f}" if abstains else ""
    return [
        f"p_ai {answer.p_ai:.4f}   (logit {answer.logit:.3f})",
        f"AI from {decision.threshold:.4f}{band}",
        f"{answer.image['width']} x {answer.image['height']} {answer.image['format']}, looks like {answer.tier}",
        f"model {answer.model} {answer.version}, digest {answer.digest[:16]}",
        "",
        "What makes it uncertain:" if explanation.doubts else "No special reason for doubt in this image. The card",
        *([] if explanation.doubts else ["states the model's error rates."]),
        *(line for doubt in explanation.doubts for line in textwrap.wrap("- " + doubt, 58, subsequent_indent="  ")),
        "",
        *textwrap.wrap("A score is not proof. It compares this file with the images that the model was trained on.",
                       58),
    ]  # fmt: skip


def _row(drawing: Figure, places: list[Any], view: View, several: bool) -> None:
    label = f"{view.architecture}, p_ai {view.p_ai:.3f}\n" if several else ""
    if isinstance(view, WholeImageView):
        _pixels(drawing.add_subplot(places[0]), view.pixels, f"{label}the image as scored")
        map_axis = drawing.add_subplot(places[1])
        _signed(map_axis, view.weight, 1e-6, "what speaks for AI (red)", "logit changes up to {:.2g}")
        return
    _pixels(drawing.add_subplot(places[0]), view.patch, f"{label}the patch")
    for place, name, noise in zip(places[1:], FILTERS, noise_maps(view.patch), strict=True):
        _signed(drawing.add_subplot(place), noise, 1.0, name, "up to {:.0f} grey levels")


def _pixels(axis: Axes, pixels: np.ndarray, title: str) -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


def _signed(axis: Axes, values: np.ndarray, least: float, title: str, xlabel: str) -> None:
    """Draw values around 0 in blue and red, up to the greatest of them, which `xlabel` names, or to `least`."""
    limit = max(least, float(np.abs(values).max()))
    axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[], xlabel=xlabel.format(limit))


def _weights(axis: Axes, view: WholeImageView) -> None:
    weights = np.sort(view.weight.ravel())[::-1]
    colours = [plots.AI_COLOUR if weight > 0 else plots.FAINT for weight in weights]
    axis.bar(np.arange(len(weights)), weights, color=colours)
    axis.set(title="how much each square matters", xlabel="square", ylabel="fall of the logit when covered")


def _members(axis: Axes, views: list[View]) -> None:
    names = [plots.shown(view.architecture) for view in views]
    axis.barh(np.arange(len(views)), [view.p_ai for view in views], color=plots.AI_COLOUR, height=0.6)
    axis.set(title="each member's own p_ai", xlim=(0, 1), yticks=np.arange(len(views)), yticklabels=names)
    axis.invert_yaxis()


def _votes(axis: Axes, view: PatchView) -> None:
    places = np.arange(len(view.votes))
    axis.bar(places, view.votes, color=plots.AI_COLOUR)
    axis.set(title="p_ai of each view alone", xlabel="view, numbered in the image", ylim=(0, 1))
    axis.set_xticks(places, [str(place + 1) for place in places])


def _complexity(axis: Axes, view: PatchView) -> None:
    order = np.argsort(view.complexity, kind="stable")
    scored = {tuple(corner) for corner in view.chosen.tolist()}
    colours = [plots.AI_COLOUR if tuple(view.candidates[i].tolist()) in scored else plots.FAINT for i in order]
    axis.bar(np.arange(len(order)), view.complexity[order], color=colours)
    axis.set(title="complexity of the candidates, simplest first", xlabel="candidate", ylabel="sum of differences")


def _alternatives(axis: Axes, explanation: Explanation, detector: BaseDetector) -> None:
    decision, p_ai = detector.card.decision.of(explanation.answer.tier), explanation.alternative_p_ai
    plots.mark_decision(axis, decision.threshold, (decision.abstain_low, decision.abstain_high))
    axis.plot(p_ai, np.linspace(0.2, 0.8, len(p_ai)), "o", color=plots.REAL_COLOUR, alpha=0.5, markersize=5)
    axis.axvline(explanation.answer.p_ai, color=plots.AI_COLOUR, linewidth=2)
    others = "the image shifted by a few pixels" if is_shifted(explanation.views) else "other patches"
    axis.set(title=f"this answer (orange), {others}", xlabel="p_ai", xlim=(-0.02, 1.02), ylim=(0, 1), yticks=[])
