"""The watermarks of generators' reference programs, in pictures that their library wrote."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from patchscan.detector.watermark import CHANCE, LEAST, MESSAGES, watermark, watermarks

DATA = Path(__file__).parents[1] / "golden" / "data"


def picture(name: str) -> Image.Image:
    return Image.open(DATA / f"watermark-{name.lower().replace(' ', '-')}.png")


@pytest.mark.parametrize("name", MESSAGES)
def test_what_the_library_wrote_is_read(name: str) -> None:
    found = watermarks(picture(name))
    assert found["found"] == name
    one = next(one for one in found["messages"] if one["name"] == name)
    assert one["matching"] == one["bits"] == len(MESSAGES[name])
    others = [one for one in found["messages"] if one["name"] != name]
    assert all(one["matching"] < one["least"] for one in others)


def test_a_copy_that_is_compressed_or_cut_has_lost_it() -> None:
    marked, buffer = picture("Stable Diffusion XL"), io.BytesIO()
    marked.save(buffer, "JPEG", quality=75)
    assert watermarks(Image.open(buffer))["found"] is None
    assert watermarks(marked.crop((8, 8, *marked.size)))["found"] is None


def test_images_without_one_bear_none() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3)).astype(np.uint8))
    for image in (noise, Image.new("RGB", (512, 512)), Image.new("RGB", (512, 512), (255, 0, 60))):
        assert watermarks(image)["found"] is None
    assert [one["bits"] for one in watermarks(noise.crop((0, 0, 80, 40)))["messages"]] == [32, 48, 46]
    assert watermarks(noise.crop((0, 0, 7, 300))) == {"found": None, "messages": []}


def test_only_files_that_can_bear_one_are_searched() -> None:
    marked = picture("FLUX")
    assert watermark(marked, None) == watermark(marked, 95) == "FLUX"
    assert watermark(marked, 94) == "none"
    assert watermark(Image.new("RGB", (300, 300)), None) == "none"
    assert watermark(marked.crop((0, 0, 256, 280)), None) == "none"


@pytest.mark.parametrize("name", MESSAGES)
def test_the_rows_in_the_middle_are_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.detector.watermark.ENOUGH_PIXELS", 312 * 130)
    assert watermark(picture(name), None) == name


def test_the_fewest_bits_are_those_of_the_stated_chance() -> None:
    assert LEAST.keys() == {len(message) for message in MESSAGES.values()}
    for bits, least in LEAST.items():
        assert binom.sf(least - 1, bits, 0.5) <= CHANCE < binom.sf(least - 2, bits, 0.5)
