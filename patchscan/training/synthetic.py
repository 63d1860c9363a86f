"""Make fakes from training photographs, without any generator: only the traces of upsampling and of periodic layers.

Content, camera and compression are the photograph's, so the trace is all that a model can learn. In the ablation of
docs/results.md, these fakes are what makes a detector work on a generator that it was not trained on.
"""

import numpy as np
from PIL import Image, ImageFilter

ENLARGE = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def synthetic_fake(photo: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Make a fake from `photo`, uint8 (H, W, 3); returns the same shape. The caller compresses it like the photograph.

    One time in four, the photo's detail gets a periodic gain, as strided layers leave it. Otherwise the photo is
    shrunk, gets a little noise and is enlarged again by nearest, bilinear or bicubic, as a decoder does, keeping up to
    half its detail.
    """
    pixels = photo.astype(np.float32)
    kind = int(random.randint(1 + len(ENLARGE)))
    if kind == 0:
        return _to_bytes(pixels + _periodic_detail(photo, pixels, random))
    enlarged = _shrink_and_enlarge(photo, ENLARGE[kind - 1], random)
    return _to_bytes(enlarged + random.uniform(0.0, 0.5) * (pixels - enlarged))


def _periodic_detail(photo: np.ndarray, pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Detail (pixels minus their 3 x 3 mean) times a zero-mean gain of period 2, 4 or 8."""
    period = int(random.choice([2, 2, 4, 8]))
    gain = random.normal(0, 1, (period, period, 1)).astype(np.float32)
    gain -= gain.mean()
    gain /= np.abs(gain).max()
    height, width = photo.shape[:2]
    tiled = np.tile(gain, (-(-height // period), -(-width // period), 1))[:height, :width]
    mean = np.asarray(Image.fromarray(photo).filter(ImageFilter.BoxBlur(1)), dtype=np.float32)
    return random.uniform(0.3, 1.0) * tiled * (np.abs(pixels - mean) + random.uniform(0, 2))


def _shrink_and_enlarge(photo: np.ndarray, enlarge: Image.Resampling, random: np.random.RandomState) -> np.ndarray:
    """Shrink 2 or 4 times, add a little noise, enlarge again."""
    factor = int(random.choice([2, 2, 4]))
    height, width = photo.shape[:2]
    size = (max(1, width // factor), max(1, height // factor))
    small = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BOX), dtype=np.float32)
    small = _to_bytes(small + random.normal(0, random.uniform(0, 3), small.shape))
    return np.asarray(Image.fromarray(small).resize((width, height), enlarge), dtype=np.float32)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.clip(pixels.round(), 0, 255).astype(np.uint8)
    return result
