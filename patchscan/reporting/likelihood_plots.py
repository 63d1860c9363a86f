"""Draw how good likelihood ratios are: Tippett plots and empirical cross-entropy, one panel for each group."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchscan.reporting.likelihood import cross_entropy, pav
from patchscan.reporting.plots import AI_COLOUR, FAINT, INK, REAL_COLOUR, panels, shown, styled

# Label (n,) and log10 LR (n,), by the name of the group: one at least, and both classes are present.
Groups = Mapping[str, tuple[np.ndarray, np.ndarray]]


@styled
def tippett(groups: Groups) -> Figure:
    """Draw, for each LR, the share of AI and of real images whose LR is at least as great."""

    def draw(axis: Axes, label: np.ndarray, log10_lr: np.ndarray) -> None:
        axis.axvline(0, color=FAINT, linestyle="--", linewidth=1)
        for one, name, colour in ((1, "AI images", AI_COLOUR), (0, "real images", REAL_COLOUR)):
            ordered = np.sort(log10_lr[label == one])
            above = np.arange(len(ordered), 0, -1) / len(ordered)
            axis.step([*ordered, ordered[-1]], [*above, 0], where="pre", color=colour, linewidth=1.6, label=name)
        axis.set(xlabel="log10 LR", ylabel="share at least as great", ylim=(0, 1.02))

    return _panels(groups, draw)


@styled
def empirical_cross_entropy(groups: Groups) -> Figure:
    """Draw what remains unknown at each prior with these LRs, with the best calibration of their order, and without any
    LR."""
    prior = np.linspace(-2.5, 2.5, 61)

    def draw(axis: Axes, label: np.ndarray, log10_lr: np.ndarray) -> None:
        lines = (
            ("no LR", np.zeros(len(label)), FAINT, "--"),
            ("LRs as stated", log10_lr, INK, "-"),
            ("best calibrated", pav(log10_lr, label), REAL_COLOUR, ":"),
        )
        for name, lrs, colour, style in lines:
            axis.plot(prior, cross_entropy(lrs, label, prior), color=colour, linestyle=style, label=name)
        axis.set(xlabel="log10 prior odds of AI", ylabel="cross-entropy, bits", ylim=(0, 1.2))

    return _panels(groups, draw)


def _panels(groups: Groups, draw: Callable[[Axes, np.ndarray, np.ndarray], None]) -> Figure:
    drawing, axes = panels(len(groups), columns=4, width=2.6 if len(groups) > 2 else 4.2, height=2.3, above=0.3)
    for axis, (name, (label, log10_lr)) in zip(axes, groups.items(), strict=True):
        draw(axis, label, log10_lr)
        axis.set_title(f"{shown(name)} ({len(label)})")
    drawing.legend(handles=axes[0].get_legend_handles_labels()[0], fontsize=8, loc="outside upper right", ncols=3)
    return drawing
