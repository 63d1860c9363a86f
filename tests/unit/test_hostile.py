"""What tests/fuzz.py found, each as one small case."""

import io
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchscan.detector.card import Card
from patchscan.detector.images import ErrorCode, ImageError, decode
from patchscan.detector.models import build_model
from patchscan.detector.presets import PatchPreset, WholeImagePreset
from tests.image_tree import picture
from tests.scan_kit import card


def test_a_damaged_avif_is_the_images_fault() -> None:
    """Its decoder raises RuntimeError, as no other of Pillow's does."""
    file = io.BytesIO()
    Image.fromarray(picture(7, 160, 120)).save(file, "AVIF")
    data = file.getvalue()
    pixels = data.index(b"mdat") + 4
    with pytest.raises(ImageError) as caught:
        decode(data[:pixels] + bytes(len(data) - pixels))
    assert caught.value.code == ErrorCode.TRUNCATED


def test_a_ribbon_is_not_enlarged_whole() -> None:
    """8 x 100,000 pixels in a small file would become 256 x 3,200,000, 3 GB: the middle of it is scored."""
    ribbon = picture(1, 100_000, 8)
    middle = ribbon[:, 50_000 - 64 : 50_000 + 64]
    crops, alone = (WholeImagePreset().crops(pixels, 0) for pixels in (ribbon, middle))
    assert np.array_equal(crops.pixels, alone.pixels)
    assert (crops.corners == alone.corners + np.array([50_000 - 64, 0])).all()
    tall = WholeImagePreset().crops(ribbon.transpose(1, 0, 2), 0)
    assert tall.corners.tolist() == [[0, int(crops.corners[0, 0])]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "patch"},
        {"preset": {"kind": "patch", "size": 10**9}},
        {"preset": {"kind": "patch", "rule": "x"}},
        {"preset": {"kind": "patch", "candidates": 10**9}},
        {"preset": {"kind": "whole", "resize": 10**9}},
        {"preset": {"kind": "whole", "size": 0}},
        {"decision": {"temperature": 0.0}},
        {"decision": {"threshold": float("nan")}},
        {"decision": {"bias": None}},
        {"decision": {"bias": 10**400}},
        {"decision": []},
    ],
    ids=json.dumps,
)
def test_a_card_that_asks_for_the_impossible_is_no_card(wrong: dict[str, Any]) -> None:
    values = asdict(card())
    assert Card.from_dict(values) == card()
    with pytest.raises(ValueError):  # noqa: PT011 -- of many wordings
        Card.from_dict(values | wrong)


def test_a_card_cannot_ask_for_any_number_of_models() -> None:
    with pytest.raises(ValueError, match="at most 8 members"):
        build_model("+".join(["resnet50"] * 10_000))


def test_a_patch_preset_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="count and candidates must be 1 to 1024"):
        PatchPreset(count=0)
