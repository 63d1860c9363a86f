"""Measure how far p_ai depends on which patches are drawn: on luck, as the pixels decide the draw."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from patchscan.dataset.source import telling_of_changes
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Card
from patchscan.detector.images import decode
from patchscan.detector.patches import seed_from_pixels
from patchscan.detector.presets import draws_patches
from patchscan.evaluation.scoring import evenly_spread, usable

IMAGES, BATCH = 200, 16


def measure_draws(
    detector: BaseDetector, card: Card, read: Callable[[str], bytes], scores: pd.DataFrame
) -> dict[str, Any]:
    """Score images of a scores table (`score_images`) with the patches that the pixels decide and with another draw.

    Returns what the card stores: the digest of `card`, whose decision is used; the number of `images`, up to IMAGES,
    evenly spread; `p_ai_95`, by how much p_ai differs at most on 95 % of them; and `other_verdict`, the share with
    another verdict. A preset without a draw, as patches on a grid, differs by nothing on no images. Raises DataError
    for an image that was damaged since it was scored.
    """
    found = {"digest": card.digest, "images": 0, "p_ai_95": 0.0, "other_verdict": 0.0}
    if not draws_patches(card.preset) or not usable(scores).any():
        return found
    rows = evenly_spread(scores[usable(scores)], IMAGES)
    pairs = np.array(list(_pairs(detector, read, rows.path.tolist())))
    decisions = [card.decision.of(tier) for tier in rows.tier]
    p_ai = np.array([[one.p_ai(logit) for logit in pair] for one, pair in zip(decisions, pairs, strict=True)])
    other = [one.verdict(first) != one.verdict(second) for one, (first, second) in zip(decisions, p_ai, strict=True)]
    return found | {
        "images": len(rows),
        "p_ai_95": float(np.quantile(np.abs(p_ai[:, 0] - p_ai[:, 1]), 0.95)),
        "other_verdict": float(np.mean(other)),
    }


def _pairs(detector: BaseDetector, read: Callable[[str], bytes], paths: list[str]) -> Iterator[tuple[float, float]]:
    """The logits of each image's two draws."""
    for begin in range(0, len(paths), BATCH):
        images = []
        for path in paths[begin : begin + BATCH]:
            with telling_of_changes(path):
                images.append(decode(read(path), detector.limits).pillow)
        draws = [
            [detector.card.preset.crops(image, (seed_from_pixels(image) + number) % 2**32).pixels for image in images]
            for number in (0, 1)
        ]
        yield from zip(detector.logits(draws[0]), detector.logits(draws[1]), strict=True)
