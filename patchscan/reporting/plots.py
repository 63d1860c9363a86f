"""Draw the pictures of evaluation and scan reports from plain arrays. Each function returns a Figure, which `png`
converts to bytes. Needs no torch and no display."""

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from math import ceil
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, PercentFormatter
from PIL import Image

from patchscan.common.console import printable
from patchscan.common.files import atomic_write
from patchscan.reporting.pages import show
from patchscan.reporting.statistics import principal_components, wilson

# Okabe and Ito's colours, which colour-blind readers can distinguish, also in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666", "#000000")
AI_COLOUR, REAL_COLOUR, BAND_COLOUR = "#D55E00", "#0072B2", "#f1e7cf"
INK, FAINT = "#1d2733", "#c9d1da"
MARKERS = "osD^vPX*<>hpd8"
DPI = 144
BINS = 10

P = ParamSpec("P")
# Names of files and folders are no formulas: what stands between two $ would be taken for one.
NO_MATH = {"text.parse_math": False}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6eaef",
    "text.color": INK,
    "legend.frameon": False,
    **NO_MATH,
}
LONGEST_NAME = 48

# Axis labels: the unit of the levels of each family of disturbances.
LEVELS = {
    "jpeg": "quality",
    "double jpeg": "first quality, then 90",
    "blur": "pixels",
    "resize": "factor",
    "crop": "share of each side",
    "noise": "grey levels",
    "screenshot": "0: PNG, 75: sent as JPEG",
}

Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a drawing function so that it uses the reports' style."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(rc=_STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return inside


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """Make an empty figure of width x height inches. Returns it and its axes, always a (rows, columns) array."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def panels(count: int, columns: int, width: float, height: float, above: float) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels of width x height inches, at most `columns` in a row, with `above` inches for a
    legend. Returns it and the panels' axes."""
    columns = min(columns, max(1, count))
    rows = max(1, ceil(count / columns))
    drawing, axes = figure(width * columns, height * rows + above, rows, columns)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return drawing, list(axes.flat[:count])


def shown(name: str) -> str:
    """Return a name from outside, such as a folder's, as pictures show it: one line of at most LONGEST_NAME characters.
    A legend would leave out a name that begins with `_`."""
    text = printable(name)
    text = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
    return f" {text}" if text.startswith("_") else text


def png(drawing: Figure, photographs: bool = False) -> bytes:
    """Convert the figure to PNG bytes, the same bytes for the same figure. It gets a palette of 256 colours, with which
    it takes a third of the bytes, unless it shows `photographs`."""
    buffer = io.BytesIO()
    drawing.set_dpi(DPI)
    with mpl.rc_context(rc=NO_MATH), warnings.catch_warnings():  # type: ignore[arg-type]
        # Of a script that the font lacks, boxes are drawn; the page beside the picture has the names.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        # Figure.savefig would draw everything twice, the first time for the layout, which this finds as it draws.
        canvas = FigureCanvasAgg(drawing)
        canvas.draw()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    if not photographs:
        picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_png(drawing: Figure, path: Path, photographs: bool = False) -> dict[str, Any]:
    """Write the figure as PNG, atomically. Returns what a page needs to embed it: `uri`, and `width` in CSS pixels, by
    which the letters of all pictures have the same size."""
    data = png(drawing, photographs)
    with atomic_write(path) as file:
        file.write_bytes(data)
    return {"uri": data_uri(data), "width": round(107 * drawing.get_figwidth())}


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """Encode bytes as a data URI, to embed them in a page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@styled
def roc(groups: Curves) -> Figure:
    """Draw the ROC curve of each group (name: label (n,), score (n,)), and again with a logarithmic axis, for the low
    false-positive rates that bulk scans need. Groups with one class are left out."""
    from sklearn.metrics import roc_curve  # imported here because scan reports do not need it and it takes long

    drawing, axes = figure(11, 4.3, 1, 2)
    linear, logarithmic = axes[0]
    for number, (name, (label, score)) in enumerate(two_class(groups).items()):
        fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
        look = _look(number)
        linear.plot(fpr, tpr, label=shown(name), **look)
        # The lowest false-positive rate that can be measured is one real image among all of them.
        lowest = 1 / max(1, int((label == 0).sum()))
        measurable = fpr >= lowest
        logarithmic.plot(fpr[measurable], tpr[measurable], drawstyle="steps-post", **look)
    chance = np.geomspace(1e-3, 1, 60)
    linear.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, zorder=0)
    logarithmic.plot(chance, chance, color=FAINT, linestyle="--", linewidth=1, zorder=0)
    for axis in (linear, logarithmic):
        axis.set(xlabel="false-positive rate (real images called AI)", ylabel="true-positive rate", ylim=(0, 1.02))
        axis.grid(True)
    linear.set(title="ROC", xlim=(-0.01, 1))
    logarithmic.set(title="The same near zero (logarithmic)", xscale="log", xlim=(3e-3, 1))
    logarithmic.xaxis.set_major_locator(FixedLocator([0.01, 0.05, 0.1, 0.5, 1]))
    logarithmic.xaxis.set_major_formatter(lambda value, _: show(value, "%"))
    logarithmic.xaxis.minorticks_off()
    if linear.lines[:-1]:
        drawing.legend(loc="outside right upper", fontsize=8)
    return drawing


@styled
def precision_recall(groups: Curves) -> Figure:
    """Draw precision over recall of the AI class, at the class shares of the evaluated images."""
    from sklearn.metrics import precision_recall_curve

    drawing, axes = figure(7.2, 3.9)
    axis = axes[0, 0]
    for number, (name, (label, score)) in enumerate(two_class(groups).items()):
        precision, recall, _ = precision_recall_curve(label, score)
        axis.plot(recall, precision, label=f"{shown(name)} ({show(label.mean(), '%')} AI)", **_look(number))
    axis.set(xlabel="recall (share of AI images found)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title("Precision and recall")
    axis.grid(True)
    if axis.lines:
        drawing.legend(loc="outside right upper", fontsize=8)
    return drawing


@styled
def reliability(groups: Curves) -> Figure:
    """Draw reliability diagrams, one panel per group (label (n,), p_ai (n,)): the share of AI images in each of BINS
    bins of p_ai, with Wilson's interval; larger discs for bins with more images."""
    drawing, axes = figure(2.4 * max(1, len(groups)), 2.8, 1, max(1, len(groups)))
    for axis, (name, (label, p_ai)) in zip(axes[0], groups.items(), strict=False):
        which = np.minimum((p_ai * BINS).astype(int), BINS - 1)
        axis.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
        for number in np.unique(which):
            inside = which == number
            share, low, high = wilson(int(label[inside].sum()), int(inside.sum())).bounds
            x = float(p_ai[inside].mean())
            axis.vlines(x, low, high, color=COLOURS[0], linewidth=1.4)
            axis.plot([x], [share], "o", color=COLOURS[0], markersize=3 + 5 * np.sqrt(inside.mean()))
        axis.set(title=shown(name), xlabel="p_ai", ylabel="share that is AI", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(True)
    return drawing


@styled
def histograms(groups: Curves, threshold: float, band: tuple[float, float]) -> Figure:
    """Draw histograms of p_ai of AI and real images, one panel per group (label (n,), p_ai (n,)), with threshold and
    abstain band."""
    drawing, axes = panels(len(groups), columns=3, width=3.3, height=2.3, above=0.3)
    edges = np.linspace(0, 1, 26)
    for axis, (name, (label, p_ai)) in zip(axes, groups.items(), strict=True):
        for value, colour in enumerate((REAL_COLOUR, AI_COLOUR)):
            counts, _ = np.histogram(p_ai[label == value], edges)
            # One shape each: the bars of Axes.hist take ten times as long.
            axis.stairs(counts, edges, fill=True, color=colour, alpha=0.5)
            axis.stairs(counts, edges, color=colour, linewidth=1)
        mark_decision(axis, threshold, band)
        axis.set(title=f"{shown(name)} ({len(label)})", xlabel="p_ai", ylabel="images", xlim=(0, 1))
    if groups:
        handles = [Patch(color=REAL_COLOUR, alpha=0.5, label="real"), Patch(color=AI_COLOUR, alpha=0.5, label="AI")]
        handles += [Patch(color=BAND_COLOUR, label="uncertain")] if band[1] > band[0] else []
        drawing.legend(handles=handles, fontsize=8, loc="outside upper right", ncols=3)
    return drawing


def mark_decision(axis: Axes, threshold: float, band: tuple[float, float]) -> None:
    """Draw the threshold as a line and the abstain band as a shade, on an axis with p_ai as x."""
    if band[1] > band[0]:
        axis.axvspan(*band, color=BAND_COLOUR, zorder=0)
    axis.axvline(threshold, color=INK, linewidth=1, linestyle="-")


@styled
def confusions(groups: dict[str, dict[str, int]]) -> Figure:
    """Draw confusion matrices, one panel per group (counts as `metrics.confusion` returns them), shaded by the share of
    the row."""
    drawing, axes = panels(len(groups), columns=4, width=2.4, height=2.5, above=0)
    for axis, (name, counts) in zip(axes, groups.items(), strict=True):
        table = np.array([[counts["true_ai"], counts["missed_ai"]], [counts["false_ai"], counts["true_real"]]])
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if share[row, column] > 0.6 else INK
            axis.text(column, row, f"{value}\n{show(share[row, column], '%')}", ha="center", va="center", color=colour)
        axis.set(title=shown(name), xticks=[0, 1], yticks=[0, 1], xlabel="called")
        axis.set_xticklabels(["AI", "real"])
        axis.set_yticklabels(["AI", "real"], rotation=90, va="center")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return drawing


@styled
def risk_coverage(groups: dict[str, tuple[np.ndarray, np.ndarray]], chosen: dict[str, tuple[float, float]]) -> Figure:
    """Risk over coverage (name: confidence (n,), whether right (n,)): the error among the most confident share of the
    images. `chosen` marks where each group stands with the card's abstain band, as (coverage, risk)."""
    drawing, axes = figure(5.6, 3.9)
    axis = axes[0, 0]
    for number, (name, (confidence, right)) in enumerate(groups.items()):
        order = np.argsort(-confidence, kind="stable")
        count = np.arange(1, len(right) + 1)
        risk = np.cumsum(~right[order]) / count
        last = np.append(np.diff(confidence[order]) != 0, True)  # images of equal confidence come in no order
        # A rate over fewer than 20 images is mostly noise, so the curve starts there.
        drawn = last & (count >= 20)
        axis.plot((count / len(right))[drawn], risk[drawn], label=shown(name), **_look(number))
        if name in chosen:
            axis.plot(*chosen[name], marker="o", color=_look(number)["color"], markersize=7, linestyle="none")
    axis.set(xlabel="coverage (share of images decided)", ylabel="risk (error among the decided)", xlim=(0, 1.01))
    axis.set_ylim(bottom=0)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1, symbol="\u00a0%"))
    axis.grid(True)
    if groups:
        axis.legend(fontsize=8)
    return drawing


Interval = tuple[float | None, float | None, float | None]


@styled
def forest(rows: Sequence[tuple[str, dict[str, Interval]]], xlabel: str, reference: float) -> Figure:
    """Draw estimates with intervals: one line per row, one mark per model (name: value, low, high); a dashed line at
    `reference`, the value of guessing."""
    models = list(dict.fromkeys(name for _, values in rows for name in values))
    drawing, axes = figure(4.7, 0.9 + len(rows) * (0.2 + 0.14 * len(models)))
    axis = axes[0, 0]
    step = 0.7 / max(1, len(models))
    looks: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        for number, name in enumerate(models)
    }
    for line, (_, values) in enumerate(rows):
        for number, name in enumerate(models):
            value, low, high = values.get(name, (None, None, None))
            y = line + (number - (len(models) - 1) / 2) * step
            if low is not None and high is not None:
                axis.hlines(y, low, high, color=looks[name]["color"], linewidth=2)
            if value is not None:
                axis.plot([value], [y], linestyle="none", markersize=5, **looks[name])
    axis.axvline(reference, color="#7b8794", linewidth=1, linestyle="--")
    axis.set(
        yticks=range(len(rows)), xlabel=xlabel, xlim=(min(0.4, axis.get_xlim()[0]), 1.01), ylim=(len(rows) - 0.5, -0.5)
    )
    axis.set_yticklabels([shown(name) for name, _ in rows])
    axis.grid(True, axis="x")
    if len(models) > 1:
        handles = [Line2D([], [], label=shown(name), **look) for name, look in looks.items()]
        drawing.legend(handles=handles, loc="outside upper center", fontsize=8, ncols=min(3, len(models)))
    return drawing


@styled
def robustness(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the AUC with its interval over the levels of each disturbance, one panel per family, for seen and unseen
    images; faint lines show the undisturbed AUC. Rows as `robustness.measure_robustness` returns them."""
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] != "undisturbed"))
    drawing, axes = panels(len(families), columns=4, width=2.4, height=2.3, above=0.4)
    for axis, family in zip(axes, families, strict=True):
        for number, group in enumerate(("seen", "unseen")):
            colour = COLOURS[number]
            here = [row for row in rows if row["group"] == group and row["auc"]["value"] is not None]
            points = sorted((row for row in here if row["family"] == family), key=lambda row: row["level"])
            for row in here:
                if row["family"] == "undisturbed":
                    axis.axhline(row["auc"]["value"], color=colour, linewidth=1, alpha=0.35)
            level = [str(row["level"]) for row in points]
            axis.vlines(level, [row["auc"]["low"] for row in points], [row["auc"]["high"] for row in points],
                        color=colour, linewidth=1.4)  # fmt: skip
            axis.plot(level, [row["auc"]["value"] for row in points], "o-", color=colour, markersize=4, linewidth=1.2)
        axis.axhline(0.5, color=FAINT, linestyle="--", linewidth=1)
        axis.set(title=family, ylim=(0.2, 1.02), ylabel="AUC", xlabel=LEVELS.get(family, ""))
    handles = [Line2D([], [], color=COLOURS[0], marker="o", label="seen"),
               Line2D([], [], color=COLOURS[1], marker="o", label="unseen")]  # fmt: skip
    drawing.legend(handles=handles, loc="outside upper right", fontsize=8, ncols=2)
    return drawing


@styled
def features(moments: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """Draw the first two principal components of features, one panel per moment (features (n, width), label (n,),
    generator (n,)), each with axes of its own and their shares of the variance. Colours tell the class, marks the
    generator."""
    names = sorted({str(name) for _, _, generator in moments.values() for name in generator})
    looks = {name: MARKERS[number % len(MARKERS)] for number, name in enumerate(names)}
    classes = {"real": REAL_COLOUR, "AI": AI_COLOUR}
    drawing, axes = figure(4.7 * max(1, len(moments)), 4.2, 1, max(1, len(moments)))
    for axis, (moment, (values, label, generator)) in zip(axes[0], moments.items(), strict=False):
        components, share = principal_components(values)
        for name, marker in looks.items():
            for value, colour in enumerate(classes.values()):
                points = components[(generator == name) & (label == value)]
                axis.scatter(points[:, 0], points[:, 1], s=12, c=colour, marker=marker, alpha=0.55, linewidths=0)
        axis.set(title=moment, xlabel=f"component 1 ({show(share[0], '%1')} of the variance)")
        axis.set_ylabel(f"component 2 ({show(share[1], '%1')})" if len(share) > 1 else "")
        axis.set(xticks=[], yticks=[])
    handles: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in classes.items()]
    handles += [
        Line2D([], [], linestyle="none", marker=look, color=INK, label=shown(name)) for name, look in looks.items()
    ]
    drawing.legend(handles=handles, loc="outside right upper", fontsize=7.5)
    return drawing


def two_class(groups: Curves) -> Curves:
    """Return the groups that contain both classes."""
    return {name: curve for name, curve in groups.items() if len(np.unique(curve[0])) == 2}


def _look(number: int) -> dict[str, str | float]:
    again, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linewidth": 1.6, "linestyle": ("-", "--", ":")[again % 3]}
