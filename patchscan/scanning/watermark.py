"""Look for the watermark that generators' reference programs put into pixels with the library `invisible-watermark`.

Stable Diffusion 1 and 2, Stable Diffusion XL and FLUX each repeat one known message over the image. Its decoder is
written here because that library, last released in 2023, imports PyTorch and OpenCV for these few lines.
`tests/golden/watermarked.py` has it write images that this decoder must read.
"""

from functools import cache
from typing import Any

import numpy as np

# The messages, as bits of 0 and 1, as the programs give them to the library.
MESSAGES = {
    "Stable Diffusion 1": "".join(f"{byte:08b}" for byte in b"StableDiffusionV1"),
    "Stable Diffusion 2": "".join(f"{byte:08b}" for byte in b"SDV2"),
    "Stable Diffusion XL": "101100111110110010010000011110111011000110011110",
    "FLUX": "1010101111111010000111100111001111010100101110",
}
# An image is said to bear a message where so many bits match that coins would do it once in so many images.
CHANCE = 1e-9
# The library's: a bit is a quarter or three quarters of a step of 36 in the largest of the coefficients but the first.
STEP, SIDE = 36, 4


def watermarks(rgb: np.ndarray) -> dict[str, Any]:
    """Say which of the known messages an image, uint8 (height, width, 3), bears: `found`, its name or None, and for
    each of the `messages` its `name`, how many `bits` it has, how many are `matching`, and the `least` that must. Empty
    where the image has fewer blocks than a message has bits."""
    ones = _blocks(rgb)
    messages: list[dict[str, Any]] = []
    for name, text in MESSAGES.items():
        message = np.array([bit == "1" for bit in text])
        if len(ones) >= len(message):
            place = np.arange(len(ones)) % len(message)
            share = np.bincount(place, ones) / np.bincount(place)
            matching = int(((share > 0.5) == message).sum())
            messages.append({"name": name, "bits": len(message), "matching": matching, "least": least(len(message))})
    found = [one["name"] for one in messages if one["matching"] >= one["least"]]
    return {"found": found[0] if found else None, "messages": messages}


@cache
def least(bits: int) -> int:
    """The fewest matching bits that fair coins reach with at most the probability CHANCE."""
    from scipy.stats import binom

    return int(binom.isf(CHANCE, bits, 0.5)) + 1


def _blocks(rgb: np.ndarray) -> np.ndarray:
    """Read one bit of each block of 8 x 8 pixels, row by row: bool (blocks,)."""
    height, width = (side // (2 * SIDE) for side in rgb.shape[:2])
    pixels = rgb[: height * 2 * SIDE, : width * 2 * SIDE].astype(np.int32)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    # OpenCV's U of 8 bits, then the low band of a Haar transform.
    luma = (4899 * red + 9617 * green + 1868 * blue + 8192) >> 14
    u = (((blue - luma) * 8061 + (128 << 14) + 8192) >> 14).clip(0, 255)
    low = (u[::2, ::2] + u[::2, 1::2] + u[1::2, ::2] + u[1::2, 1::2]) / 2
    blocks = low.reshape(height, SIDE, width, SIDE).swapaxes(1, 2).reshape(-1, SIDE * SIDE)
    largest: np.ndarray = blocks[:, 1:].max(axis=1, initial=0)
    bits: np.ndarray = largest % STEP > STEP / 2
    return bits
