"""How far p_ai depends on the draw of patches is measured, and stands on the card."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from patchscan.dataset.source import DataError
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Card
from patchscan.detector.images import Limits
from patchscan.detector.presets import EnsemblePreset, PatchPreset, Preset, WholeImagePreset
from patchscan.evaluation.draws import IMAGES, measure_draws
from tests.image_tree import picture
from tests.serving_kit import encoded


class Brightness(BaseDetector):
    """Its logit is the mean of the crops, around zero and a tenth of a grey level."""

    def logits(self, crops: Sequence[np.ndarray]) -> list[float]:
        return [float(one.mean() - 128) / 10 for one in crops]


def measured(preset: Preset, images: int) -> tuple[Card, dict[str, Any]]:
    card = Card(name="bright", version="1", architecture="x", preset=preset, weights_sha256="0")
    files = {f"{number}.png": encoded(Image.fromarray(picture(number, 160, 120)), "PNG") for number in range(10)}
    paths = [f"{number % 10}.png" for number in range(images)]
    scores = pd.DataFrame({"path": paths, "tier": "native", "status": "scored", "logit": 0.0})
    found = measure_draws(Brightness(card, Limits()), card, files.__getitem__, scores)
    return replace(card, draws=found), found


@pytest.mark.parametrize("preset", [PatchPreset(rule="random"), PatchPreset(rule="simplest", candidates=3)])
def test_one_patch_of_many_moves_p_ai_with_the_draw(preset: PatchPreset) -> None:
    card, found = measured(preset, IMAGES + 50)
    assert found["digest"] == card.digest
    assert found["images"] == IMAGES
    assert found["p_ai_95"] > 0.1
    assert 0 < found["other_verdict"] < 1
    assert f"moved it by more than {found['p_ai_95']:.2f} on 5 % of 200 images" in card.all_warnings[1]
    _, of_many = measured(PatchPreset(rule="random", count=200), 10)
    assert of_many["p_ai_95"] < found["p_ai_95"] / 3


@pytest.mark.parametrize(
    "preset",
    [
        PatchPreset(rule="grid", count=4),
        WholeImagePreset(size=64, resize=64),
        EnsemblePreset(members=(PatchPreset(rule="grid"), WholeImagePreset(size=64, resize=64))),
    ],
    ids=["grid", "whole", "both"],
)
def test_without_a_draw_nothing_moves(preset: Preset) -> None:
    card, found = measured(preset, 5)
    assert (found["images"], found["p_ai_95"], found["other_verdict"]) == (0, 0.0, 0.0)
    assert len(card.all_warnings) == 1


def test_an_image_that_was_damaged_since_it_was_scored_is_told_by_name() -> None:
    """Its scores are kept from an earlier evaluation."""
    card = Card(name="bright", version="1", architecture="x", preset=PatchPreset(), weights_sha256="0")
    scores = pd.DataFrame({"path": ["a.png"], "tier": "native", "status": "scored", "logit": 0.0})
    with pytest.raises(DataError, match=r"a.png changed since it was indexed"):
        measure_draws(Brightness(card, Limits()), card, lambda path: b"", scores)
