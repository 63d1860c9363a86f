"""Decide whether a detector is good enough to publish: the quality gate of a training Job.

    python -m patchscan.evaluation.quality auc:unseen:0.8,real_detection:seen:0.95 RUN

Each bound is METRIC:GROUP:LEAST. GROUP is seen, unseen, overall, or a generator's name; LEAST is compared with the
metric's value that the evaluation wrote to RUN's card (of the matched images where they were scored). Exit code 3 where
a bound is not met.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscan.common.console import say, user_errors_told
from patchscan.common.errors import UserError
from patchscan.dataset.layout import CLASSES
from patchscan.detector.card import Card

# The metrics of a card of which more is better; each is between 0 and 1.
METRICS = (
    *("accuracy", "auc", "average_precision", "balanced_accuracy", "f1_ai", "fake_detection"),
    *("precision_ai", "precision_real", "real_detection", "tpr_at_fpr_1", "tpr_at_fpr_5"),
)
# Those that images of one class suffice for; the others need both.
OF_ONE_CLASS = {"fake_detection": ("ai",), "real_detection": ("nature",), "accuracy": ()}


class BoundError(UserError):
    """A bound is malformed, or the evaluation has no such metric or group."""


class QualityError(UserError):
    """The detector is not good enough to publish; the message says in what."""

    exit_code = 3


@dataclass(frozen=True)
class Bound:
    """The least value that a metric must have on a group of generators."""

    metric: str
    group: str
    least: float

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of images without which the metric is not defined."""
        return OF_ONE_CLASS.get(self.metric, CLASSES)


def parse_bounds(text: str) -> list[Bound]:
    """Parse `auc:unseen:0.8`, or several of these with commas between them. Raises BoundError."""
    return [_parse_bound(part.strip()) for part in text.split(",")]


def _parse_bound(text: str) -> Bound:
    metric, _, rest = text.partition(":")
    group, _, least = rest.rpartition(":")
    try:
        bound = Bound(metric, group, float(least))
    except ValueError:
        bound = Bound(metric, group, math.nan)
    if not group or not 0 <= bound.least <= 1:
        raise BoundError(
            f"MIN_METRIC {text}: write METRIC:GROUP:LEAST with a number from 0 to 1, such as auc:unseen:0.8"
        )
    if metric not in METRICS:
        raise BoundError(f"MIN_METRIC {text}: the metric must be one of {', '.join(METRICS)}")
    return bound


def check_quality(card: Card, bounds: list[Bound]) -> list[str]:
    """Compare a card's metrics with bounds. Returns a sentence for each one that is met. Raises QualityError where one
    is not met, BoundError where the card does not have it."""
    rows = card.metrics.get("matched") or card.metrics.get("raw") or {}
    sentences, missed = [], []
    for bound in bounds:
        value = _value(rows, bound)
        text = f"{bound.metric} of {bound.group} is {value:.3f}"
        if value >= bound.least:
            sentences.append(f"{text}, at least {bound.least:g}")
        else:
            missed.append(f"{text}, less than {bound.least:g}")
    if missed:
        raise QualityError(f"not published: {'; '.join(missed)} (MIN_METRIC)")
    return sentences


def _value(rows: dict[str, Any], bound: Bound) -> float:
    """The metric's value on the bound's group. Raises BoundError."""
    of_kind = [row for row in rows.values() if row["kind"] == bound.group]
    # A group of one generator has no row of its own.
    row = rows.get(f"all {bound.group}") or (of_kind[0] if len(of_kind) == 1 else rows.get(bound.group))
    if row is None:
        there = ", ".join(["seen", "unseen", *rows])
        raise BoundError(f"MIN_METRIC: the evaluation has no group {bound.group}; there are {there}")
    value = row.get(bound.metric, [None])[0]
    if value is None:
        raise BoundError(f"MIN_METRIC: {bound.metric} of {bound.group} is not defined for these images")
    return float(value)


if __name__ == "__main__":
    with user_errors_told():
        say("; ".join(check_quality(Card.read(Path(sys.argv[2])), parse_bounds(sys.argv[1]))))
