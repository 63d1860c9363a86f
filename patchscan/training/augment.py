"""Augment training images with blur, resizing and JPEG, as images on the web have them; the same for both classes."""

import io

import numpy as np
from PIL import Image, ImageFilter

from patchscan.training.recipe import Augment


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
        encoded = io.BytesIO()
        low, high = steps.jpeg_quality
        image.save(encoded, "JPEG", quality=int(random.randint(low, high + 1)), subsampling=int(random.randint(0, 3)))
        image = Image.open(encoded)
    return np.asarray(image)
