"""Measure how far computing in fewer bits changes a detector's answers: the rule by which bfloat16 may be used."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from patchscan.dataset.source import DataSource
from patchscan.detector.card import Card, Decision
from patchscan.detector.engines import EngineError, choose_engine
from patchscan.detector.openvino_detector import OpenVinoBf16Detector, OpenVinoDetector, has_bf16
from patchscan.evaluation.evaluate import validation_images
from patchscan.evaluation.scoring import apply_decision, score_images, usable
from patchscan.reporting.statistics import wilson

# p_ai changes by less than MAX_CHANGE on at least MIN_SHARE of the images, and no generator's accuracy falls below the
# interval that it has in float32.
MAX_CHANGE, MIN_SHARE = 0.01, 0.99


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What fewer bits keep: `answers`, the share of images whose p_ai changes by less than MAX_CHANGE; `accuracies`,
    the share of generators whose accuracy stays within or above its 95 % interval (Wilson) in float32."""

    images: int
    answers: float
    accuracies: float

    @property
    def enough(self) -> bool:
        """Whether the rule holds."""
        return self.answers >= MIN_SHARE and self.accuracies == 1


def compare(
    before: np.ndarray, after: np.ndarray, is_ai: np.ndarray, generator: np.ndarray, threshold: np.ndarray | float
) -> Kept:
    """Compare p_ai before and after, float (n,), NaN where there is no score any more, of images of known class (bool)
    and generator; `threshold`: from which p_ai each is called AI."""
    right = [(p_ai >= threshold) == is_ai for p_ai in (before, after)]
    held = []
    for name in np.unique(generator):
        first, second = (wilson(int(one[generator == name].sum()), int((generator == name).sum())) for one in right)
        held.append((second.value or 0.0) >= (first.low or 0.0))
    changed_little = np.abs(before - after) < MAX_CHANGE
    return Kept(images=len(before), answers=float(changed_little.mean()), accuracies=float(np.mean(held)))


def compare_scores(before: pd.DataFrame, after: pd.DataFrame, decision: Decision) -> Kept:
    """Compare two tables of `score_images`, of the same images, with this decision."""
    rows = usable(before).to_numpy()
    first, second = (apply_decision(table, decision)[rows] for table in (before, after))
    threshold = first.tier.map(lambda tier: decision.of(tier).threshold).to_numpy()
    label, generator = first.label.to_numpy() == 1, first.generator.to_numpy()
    return compare(first.p_ai.to_numpy(), second.p_ai.to_numpy(), label, generator, threshold)


def measure_bf16(run: Path, data: str | Path) -> Card:
    """Score a data set's validation images with the run folder's `model.onnx` in OpenVINO, in float32 and in bfloat16.
    Returns the card with the result, which decides whether bfloat16 is used.

    Raises CardError, EvaluationError if there are no validation images, EngineError if OpenVINO is not installed, this
    CPU does not compute in bfloat16, or nothing of the model would be.
    """
    choose_engine(run, engine="openvino")
    if not has_bf16():
        raise EngineError(
            "this CPU does not compute in bfloat16, so --data can measure nothing: archive on one with AMX or "
            "avx512_bf16 (lscpu lists them), or leave out --data, for float32"
        )
    in_float32, in_bfloat16 = OpenVinoDetector.load(run), OpenVinoBf16Detector.load(run)
    if in_bfloat16.engine == in_float32.engine:
        raise EngineError(
            "the model has no convolutions, which alone are computed in bfloat16, so --data can measure nothing: "
            "leave it out, for float32"
        )
    card, images, source = Card.read(run), validation_images(data), DataSource(data)
    before, after = (
        score_images(detector, source.read, images, f"score {card.name} with {detector.engine}")
        for detector in (in_float32, in_bfloat16)
    )
    kept = compare_scores(before, after, card.decision)
    return replace(card, bf16={**vars(kept), "kept": kept.enough, "digest": card.digest})
