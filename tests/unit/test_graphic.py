"""Screenshots, drawings and pages get no verdict: error rates measured on photographs do not hold for them."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo.sample import load_photo
from patchscan.common.shipped import shipped
from patchscan.detector.answer import TIERS, Answer, Tier
from patchscan.detector.detector import Detector
from patchscan.detector.graphic import flat_share, is_graphic
from patchscan.detector.images import decode
from patchscan.evaluation.tiers import deliver


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_pillows_fourth_byte_is_no_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 4), np.uint8)
    pixels[..., :3] = 200
    image = Image.frombytes("RGB", (60, 80), pixels.tobytes(), "raw", "RGBX")
    assert np.unique(np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)[3::4]).size > 1
    assert flat_share(image) == 1


def window() -> Image.Image:
    """A window with a title, lines of text and a photograph in it, as a screenshot shows it."""
    image = Image.new("RGB", (640, 480), "#f4f4f6")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 640, 28), fill="#30343c")
    for line in range(14):
        draw.text((20, 48 + 28 * line), f"{line}: the quick brown fox jumps over the lazy dog", fill="black")
    image.paste(Image.fromarray(load_photo("coffee.png")).resize((200, 133)), (420, 60))
    return image


def chart() -> Image.Image:
    image = Image.new("RGB", (500, 400), "white")
    draw = ImageDraw.Draw(image)
    for number, height in enumerate((120, 260, 90, 310)):
        left = 60 + 100 * number
        draw.rectangle((left, 360 - height, left + 70, 360), fill=("#0072B2", "#D55E00")[number % 2])
    return image


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("draw", [window, chart])
def test_drawn_surfaces_are_graphics_however_they_are_delivered(draw: Callable[[], Image.Image], tier: Tier) -> None:
    assert is_graphic(decode(deliver(encoded(draw()), tier)).pillow)


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "rocket.jpg", "flower.jpg", "china.jpg"])
def test_photographs_are_none(name: str, tier: Tier) -> None:
    assert not is_graphic(decode(deliver(encoded(Image.fromarray(load_photo(name))), tier)).pillow)


def test_a_graphic_gets_no_verdict_and_its_reason() -> None:
    detector = Detector.load(shipped("model_store") / "ssp-lite")
    (answer,) = detector.score([encoded(window())])
    assert isinstance(answer, Answer)
    assert (answer.verdict, answer.reason) == ("uncertain", "out_of_domain")


def test_any_size_that_is_decoded_can_be_looked_at() -> None:
    assert is_graphic(Image.new("RGB", (8, 8), "white"))
    assert not is_graphic(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 4000, 3), dtype=np.uint8)))
