"""Look for the watermark that generators' reference programs put into pixels with the library `invisible-watermark`.

Stable Diffusion 1 and 2, Stable Diffusion XL and FLUX each repeat one known message over the image. Its decoder is
written here because that library, last released in 2023, imports PyTorch and OpenCV for these few lines.
`tests/golden/watermarked.py` has it write images that this decoder must read.
"""

from typing import Any

import numpy as np
from PIL import Image

# The messages, as bits of 0 and 1, as the programs give them to the library.
MESSAGES = {
    "Stable Diffusion 1": "".join(f"{byte:08b}" for byte in b"StableDiffusionV1"),
    "Stable Diffusion 2": "".join(f"{byte:08b}" for byte in b"SDV2"),
    "Stable Diffusion XL": "101100111110110010010000011110111011000110011110",
    "FLUX": "1010101111111010000111100111001111010100101110",
}
# An image is said to bear a message where so many bits match that coins would do it once in so many images.
CHANCE = 1e-9
# The fewest matching bits of messages of so many that fair coins reach with at most that probability.
LEAST = {32: 32, 46: 43, 48: 44, 136: 103}
# JPEGs of a lower quality have nearly always lost it.
LEAST_JPEG_QUALITY = 95
# Smaller images are none that the programs write, and of larger ones so many pixels suffice.
LARGEST_UNSEARCHED_SIDE, ENOUGH_PIXELS = 256, 2**19
# The library's: a bit is a quarter or three quarters of a step of 36 in the largest of the coefficients but the first.
STEP, SIDE = 36, 4


def watermark(image: Image.Image, jpeg_quality: int | None) -> str:
    """Return the name of the known message that an RGB image bears, or `none`. The rows in the middle are searched, and
    only where it has probably not been lost."""
    width, height = image.size
    if min(width, height) <= LARGEST_UNSEARCHED_SIDE or (jpeg_quality or 100) < LEAST_JPEG_QUALITY:
        return "none"
    side = 2 * SIDE
    rows = ENOUGH_PIXELS // width // side
    above = max(0, height // side - rows) // 2
    middle = image.crop((0, above * side, width, min(height, (above + rows) * side)))
    return watermarks(middle, above * (width // side))["found"] or "none"


def watermarks(image: Image.Image, above: int = 0) -> dict[str, Any]:
    """Say which of the known messages an RGB image bears: `found`, its name or None, and for each of the `messages` its
    `name`, how many `bits` it has, how many are `matching`, and the `least` that must. Empty where the image has fewer
    blocks than a message has bits. `above`: how many blocks of the picture lie above `image`."""
    ones = _blocks(image)
    messages: list[dict[str, Any]] = []
    for name, text in MESSAGES.items():
        message = np.array([bit == "1" for bit in text])
        if len(ones) >= len(message):
            place = (above + np.arange(len(ones))) % len(message)
            share = np.bincount(place, ones) / np.bincount(place)
            matching = int(((share > 0.5) == message).sum())
            messages.append({"name": name, "bits": len(message), "matching": matching, "least": LEAST[len(message)]})
    found = [one["name"] for one in messages if one["matching"] >= one["least"]]
    return {"found": found[0] if found else None, "messages": messages}


def _blocks(image: Image.Image) -> np.ndarray:
    """Read one bit of each block of 8 x 8 pixels, row by row: bool (blocks,)."""
    width, height = (side // (2 * SIDE) for side in image.size)
    if not width or not height:
        return np.zeros(0, bool)
    # The library computes OpenCV's U of each pixel, then the low band of a Haar transform: twice the mean of each four.
    # The U of their mean colour, a quarter of the work, differs by less than 2 of the 9 that a bit can bear.
    red, green, blue = np.moveaxis(np.asarray(image.reduce(2), dtype=np.float32), 2, 0)
    low = 2 * (128 + 0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue))).clip(0, 255)
    low = low[: height * SIDE, : width * SIDE]
    blocks = low.reshape(height, SIDE, width, SIDE).swapaxes(1, 2).reshape(-1, SIDE * SIDE)
    largest: np.ndarray = blocks[:, 1:].max(axis=1, initial=0)
    return largest % STEP > STEP / 2
