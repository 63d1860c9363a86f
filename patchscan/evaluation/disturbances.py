"""Change images as they are changed when they are shared: JPEG, double JPEG, blur, resizing, cropping, noise and
screenshots, each the same every time."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from patchscan.detector.images import ImageError, decode, encode
from patchscan.detector.patches import seed_from_pixels

# Makes the changed file from the decoded image and a random generator; Encode also from a level.
Change = Callable[[Image.Image, np.random.Generator], bytes]
Encode = Callable[[Image.Image, float, np.random.Generator], bytes]


def changed(data: bytes, change: Change) -> bytes:
    """Change an encoded image, in the same way every time. Bytes that are not an image are returned unchanged."""
    try:
        rgb = decode(data).rgb
    except ImageError:
        return data
    return change(Image.fromarray(rgb), np.random.default_rng(seed_from_pixels(rgb)))


@dataclass(frozen=True)
class Disturbance:
    """One change to an image: `family` and `level` give its place on a curve, `label` names it; `encode` makes the
    disturbed file from the decoded image, the level and a random generator."""

    family: str
    level: float
    label: str
    encode: Encode

    def disturb(self, data: bytes) -> bytes:
        """Disturb an encoded image (`changed`)."""
        return changed(data, lambda image, rng: self.encode(image, self.level, rng))


def jpeg(image: Image.Image, quality: float) -> bytes:
    """Encode as JPEG, with the chroma subsampling (4:2:0) that cameras and messengers use."""
    return encode(image, "JPEG", quality=int(quality), subsampling=2)


def png(image: Image.Image) -> bytes:
    """Encode without loss, so that only the disturbance changes the pixels."""
    return encode(image, "PNG", compress_level=1)


def scaled(image: Image.Image, factor: float, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Resize both sides by `factor`."""
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), resample)


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Cut out the middle of the image, `share` of each side."""
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def off_grid(image: Image.Image) -> Image.Image:
    """Cut off 3 pixels at the left and top, so that an earlier JPEG's grid moves; less of a smaller image."""
    return image.crop((min(3, image.width - 1), min(3, image.height - 1), image.width, image.height))


def noisy(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise with a standard deviation of `deviation` grey levels to every sample."""
    pixels = np.asarray(image) + rng.normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Apply a Gaussian blur of `sigma` pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def double_jpeg(image: Image.Image, first: float) -> bytes:
    """Encode as JPEG at quality `first`, decode, and encode as JPEG at 90."""
    return jpeg(Image.open(io.BytesIO(jpeg(image, first))), 90)


def screenshot(image: Image.Image, quality: float) -> bytes:
    """Imitate a screenshot: enlarge 1.25 times, as on a scaled desktop, and cut `off_grid`. Encode as PNG; if `quality`
    is not 0, reduce to 0.8 and encode as JPEG instead."""
    taken = off_grid(scaled(image, 1.25, Image.Resampling.BILINEAR))
    return jpeg(scaled(taken, 0.8), quality) if quality else png(taken)


FAMILIES: dict[str, tuple[str, tuple[float, ...], Encode]] = {
    "jpeg": ("JPEG quality {}", (95, 85, 75, 60, 45, 30), lambda image, level, _: jpeg(image, level)),
    "double jpeg": ("JPEG {}, then 90", (90, 75, 50), lambda image, level, _: double_jpeg(image, level)),
    "blur": ("blur of {} pixels", (0.5, 1, 2), lambda image, level, _: png(blurred(image, level))),
    "resize": ("resized {} x", (0.5, 0.75, 1.5, 2), lambda image, level, _: png(scaled(image, level))),
    "crop": ("middle {} of each side", (0.75, 0.5), lambda image, level, _: png(cropped(image, level))),
    "noise": ("noise of {} grey levels", (2, 5, 10), lambda image, level, rng: png(noisy(image, level, rng))),
    "screenshot": ("screenshot, sent as JPEG {}", (0, 75), lambda image, level, _: screenshot(image, level)),
}


def disturbances() -> list[Disturbance]:
    """Return all disturbances that are measured."""
    return [
        Disturbance(family, level, label.format(level).replace(", sent as JPEG 0", ", PNG"), encode)
        for family, (label, levels, encode) in FAMILIES.items()
        for level in levels
    ]
