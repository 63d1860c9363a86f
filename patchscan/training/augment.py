"""Augment training images as images on the web were: blurred, resized, sharpened, compressed. Both classes alike."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from patchscan.detector.images import encode
from patchscan.training.recipe import Augment, Delivery

FILTERS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
    Image.Resampling.HAMMING,
)
# Pixels around a crop that let it lie anywhere on the grid of blocks that compression makes; JPEG's have 16 at most.
MARGIN = 16


def augment(rgb: np.ndarray, steps: Augment, random: np.random.RandomState) -> np.ndarray:
    """Apply each configured step with `steps.probability`, in the order blur, resize, JPEG (which comes last in
    practice too). `rgb` is uint8 (H, W, 3); returns uint8 (H', W', 3)."""
    image = Image.fromarray(rgb)
    if steps.blur_sigma and random.random_sample() < steps.probability:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*steps.blur_sigma)))
    if steps.resize and random.random_sample() < steps.probability:
        factor = random.uniform(*steps.resize)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    jpeg_probability = steps.probability if steps.jpeg_probability is None else steps.jpeg_probability
    if steps.jpeg_quality and random.random_sample() < jpeg_probability:
        low, high = steps.jpeg_quality
        quality, subsampling = int(random.randint(low, high + 1)), int(random.randint(0, 3))
        image = stored(image, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(image)


def deliver(rgb: np.ndarray, steps: Delivery, random: np.random.RandomState) -> np.ndarray:
    """Cut a random crop of `rgb`, uint8 (H, W, 3), that was delivered as `steps` say. Returns uint8 (size, size, 3)."""
    size = steps.size
    if random.random_sample() < steps.plain:
        return random_region(rgb, size, size, random)
    image = _resized_region(rgb, _draw_factor(rgb, steps, random), size, random)
    if random.random_sample() < steps.sharpen:
        percent = int(random.randint(30, 151))
        image = image.filter(ImageFilter.UnsharpMask(random.uniform(0.5, 2), percent, 0))
    if random.random_sample() < steps.compress:
        twice = random.random_sample() < steps.twice
        image = _compressed(image, steps, random)
        if twice:
            image = _compressed(_moved(image, size, random), steps, random)
    return random_region(np.asarray(image), size, size, random)


def _draw_factor(rgb: np.ndarray, steps: Delivery, random: np.random.RandomState) -> float:
    """How much larger the image becomes; it is not reduced below the size of a crop."""
    draw = random.random_sample()
    if draw < steps.shrink:
        return float(random.uniform(max(steps.smallest, min(1.0, steps.size / min(rgb.shape[:2]))), 1.0))
    return float(random.uniform(1.1, steps.largest)) if draw < steps.shrink + steps.enlarge else 1.0


def _resized_region(rgb: np.ndarray, factor: float, size: int, random: np.random.RandomState) -> Image.Image:
    """A random part of the image, resized to a crop with its margin (less where the image has no more): resizing all of
    a photograph would take longer than everything else."""
    part = math.ceil((size + MARGIN) / factor)
    height, width = (min(part, max(side, math.ceil(size / factor))) for side in rgb.shape[:2])
    image = Image.fromarray(random_region(rgb, height, width, random))
    return image if factor == 1.0 else _resized(image, factor, size, random)


def _resized(image: Image.Image, factor: float, size: int, random: np.random.RandomState) -> Image.Image:
    """The image resized by `factor` with a random filter, but never below the size of a crop."""
    width, height = (max(size, round(side * factor)) for side in image.size)
    return image.resize((width, height), FILTERS[random.randint(len(FILTERS))])


def _compressed(image: Image.Image, steps: Delivery, random: np.random.RandomState) -> Image.Image:
    quality = int(random.randint(steps.quality[0], steps.quality[1] + 1))
    if random.random_sample() < 0.3:
        return stored(image, "WEBP", quality=quality, method=0)
    return stored(image, "JPEG", quality=quality, subsampling=2 if random.random_sample() < 0.7 else 0)


def stored(image: Image.Image, form: str, **options: Any) -> Image.Image:
    """Return an image as it is read from a file of this format. `options`: Pillow's for writing it."""
    return Image.open(io.BytesIO(encode(image, form, **options)))


def _moved(image: Image.Image, size: int, random: np.random.RandomState) -> Image.Image:
    """The image on another grid of blocks, and half of the time reduced, but never below the size of a crop."""
    left, top = (int(random.randint(min(8, side - size) + 1)) for side in image.size)
    image = image.crop((left, top, image.width, image.height))
    if random.random_sample() < 0.5:
        image = _resized(image, random.uniform(max(0.75, size / min(image.size)), 1.0), size, random)
    return image


def random_region(rgb: np.ndarray, height: int, width: int, random: np.random.RandomState) -> np.ndarray:
    """Return a random part of an image, uint8 (H, W, 3), of this size; one that is too small is first continued by its
    mirror image."""
    missing = [(0, max(0, wanted - side)) for wanted, side in zip((height, width), rgb.shape[:2], strict=True)]
    if any(after for _, after in missing):
        rgb = np.pad(rgb, (*missing, (0, 0)), mode="symmetric")
    y, x = random.randint(rgb.shape[0] - height + 1), random.randint(rgb.shape[1] - width + 1)
    return rgb[y : y + height, x : x + width]
