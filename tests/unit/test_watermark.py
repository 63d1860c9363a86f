"""The watermarks of generators' reference programs, in pictures that their library wrote."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from patchscan.scanning.watermark import CHANCE, MESSAGES, least, watermarks

DATA = Path(__file__).parents[1] / "golden" / "data"


def picture(name: str) -> Image.Image:
    return Image.open(DATA / f"watermark-{name.lower().replace(' ', '-')}.png")


@pytest.mark.parametrize("name", MESSAGES)
def test_what_the_library_wrote_is_read(name: str) -> None:
    found = watermarks(np.asarray(picture(name)))
    assert found["found"] == name
    one = next(one for one in found["messages"] if one["name"] == name)
    assert one["matching"] == one["bits"] == len(MESSAGES[name])
    others = [one for one in found["messages"] if one["name"] != name]
    assert all(one["matching"] < one["least"] for one in others)


def test_a_copy_that_is_compressed_or_cut_has_lost_it() -> None:
    marked, buffer = picture("Stable Diffusion XL"), io.BytesIO()
    marked.save(buffer, "JPEG", quality=75)
    assert watermarks(np.asarray(Image.open(buffer)))["found"] is None
    assert watermarks(np.asarray(marked)[8:, 8:])["found"] is None


def test_images_without_one_bear_none() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 300, 3)).astype(np.uint8)
    for image in (noise, np.zeros((512, 512, 3), np.uint8), np.full((512, 512, 3), (255, 0, 60), np.uint8)):
        assert watermarks(image)["found"] is None
    assert [one["bits"] for one in watermarks(noise[:40, :80])["messages"]] == [32, 48, 46]
    assert watermarks(noise[:7, :7]) == {"found": None, "messages": []}


@pytest.mark.parametrize("bits", [32, 46, 48, 136])
def test_the_fewest_bits_are_those_of_the_stated_chance(bits: int) -> None:
    assert binom.sf(least(bits) - 1, bits, 0.5) <= CHANCE < binom.sf(least(bits) - 2, bits, 0.5)
