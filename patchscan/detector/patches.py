"""Choose patches of an image: the least complex ones, as SSP does, or by one of three rules for comparison.

SSP (Chen et al., "A Single Simple Patch is All You Need for AI-generated Image Detection", arXiv 2402.01123): a
generator's trace is hard to find in detailed areas, so score the patch with the least detail.
"""

import math
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Rule = Literal["simplest", "random", "most_complex", "grid"]

# If the shorter side is below the patch size, the official code first resizes the image to this width and height.
SMALL_IMAGE_SIDE = 256
# How many rows of an image the seed is computed from.
SEED_ROWS = 32

# A decoded RGB image: an array uint8 (height, width, 3), or a Pillow image of mode RGB (cheaper: only the patches are
# copied into an array).
Pixels = np.ndarray | Image.Image
# Left, top, right and bottom, in pixels.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Patches:
    """Chosen patches: `pixels` uint8 (count, size, size, 3); `corners` int (count, 2) as x, y in pixels of the image
    they were cut from; `upscaled` is True if that image had to be enlarged or continued first."""

    pixels: np.ndarray
    corners: np.ndarray
    upscaled: bool


def seed_from_pixels(rgb: Pixels) -> int:
    """Derive a 32-bit seed from the pixels, so that format and metadata change no patch.

    The seed is the CRC-32 of the size and of SEED_ROWS evenly spread rows. Hashing every row would be no better and
    take half as long as decoding a photograph, because Pillow returns all pixels only as a copy.
    """
    height, width = height_and_width(rgb)
    count = min(SEED_ROWS, height)
    rows = [(2 * number + 1) * height // (2 * count) for number in range(count)]
    size = zlib.crc32(f"{width} x {height}".encode())
    if isinstance(rgb, np.ndarray):
        return zlib.crc32(rgb[rows].tobytes(), size)
    return zlib.crc32(below_each_other(rgb, [(0, row, width, row + 1) for row in rows]).tobytes(), size)


def complexity(patches: np.ndarray) -> np.ndarray:
    """Return each patch's complexity: the sum of absolute differences of neighbouring pixels, horizontal, vertical and
    along both diagonals, over all channels.

    patches: uint8 (n, height, width, 3). Returns int64 (n,). Source: SSP, section 3.2 and the official code.
    """
    n, height, width, channels = patches.shape
    # All patches are laid side by side, because numpy's vector instructions pay off on long rows.
    rows = np.ascontiguousarray(patches.transpose(1, 0, 2, 3)).reshape(height, -1)
    here, right = rows[:, :-channels], rows[:, channels:]
    sums = np.zeros(rows.shape[1], np.min_scalar_type(4 * 255 * height))  # one sum per column and channel
    across = sums[:-channels]
    across += _difference_sums(here, right, sums.dtype)
    across += _difference_sums(here[:-1], right[1:], sums.dtype)
    across += _difference_sums(here[1:], right[:-1], sums.dtype)
    sums.reshape(n, width, channels)[:, -1] = 0  # the last column's right neighbour belongs to another patch
    sums += _difference_sums(rows[:-1], rows[1:], sums.dtype)
    result: np.ndarray = sums.reshape(n, -1).sum(axis=1, dtype=np.int64)
    return result


def _difference_sums(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # max - min is |a - b| without leaving uint8.
    difference = np.maximum(a, b)
    difference -= np.minimum(a, b)
    result: np.ndarray = difference.sum(axis=0, dtype=dtype)
    return result


def simplest_patch(rgb: Pixels, size: int = 32, candidates: int = 30, seed: int = 0) -> Patches:
    """Return the least complex of `candidates` uniformly drawn `size` x `size` patches; of equal ones the first."""
    return choose_patches(rgb, rule="simplest", size=size, candidates=candidates, count=1, seed=seed)


def choose_patches(
    rgb: Pixels, *, rule: Rule = "simplest", size: int = 32, candidates: int = 30, count: int = 1, seed: int = 0
) -> Patches:
    """Choose `count` patches of `rgb`, in the order of the rule.

    `simplest` and `most_complex` rank `candidates` uniform draws by `complexity` (ties: the first drawn wins); `random`
    takes the first `count` draws; `grid` spreads `count` patches evenly, without randomness. An image whose shorter
    side is below `size` is first resized to 256 x 256, as the official code does; for `grid` it is continued by its
    mirror image instead, which leaves its pixels as they are.
    """
    height, width = height_and_width(rgb)
    upscaled = min(height, width) < size
    if upscaled and rule == "grid":
        missing = [(0, max(0, size - side)) for side in (height, width)]
        rgb = np.pad(np.asarray(rgb), (*missing, (0, 0)), mode="symmetric")
        height, width = height_and_width(rgb)
    elif upscaled:
        height = width = SMALL_IMAGE_SIDE
        rgb = as_pillow(rgb).resize((width, height), Image.Resampling.BILINEAR)
    if rule == "grid":
        corners = grid_corners(height, width, size, count)
    else:
        drawn = count if rule == "random" else max(candidates, count)
        corners = random_corners(height, width, size, drawn, seed)
    pixels = cut_patches(rgb, corners, size)
    if rule in ("simplest", "most_complex"):
        scores = complexity(pixels)
        order = np.argsort(scores if rule == "simplest" else -scores, kind="stable")[:count]
        pixels, corners = pixels[order], corners[order]
    return Patches(pixels, corners, upscaled)


def height_and_width(rgb: Pixels) -> tuple[int, int]:
    """Return height and width in pixels."""
    return (rgb.height, rgb.width) if isinstance(rgb, Image.Image) else (rgb.shape[0], rgb.shape[1])


def as_pillow(rgb: Pixels) -> Image.Image:
    """Return the pixels as a Pillow image of mode RGB."""
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)


def cut_patches(rgb: Pixels, corners: np.ndarray, size: int) -> np.ndarray:
    """Cut the `size` x `size` patches at `corners`, int (n, 2) as x, y. Returns uint8 (n, size, size, 3)."""
    if isinstance(rgb, np.ndarray):
        return np.stack([rgb[y : y + size, x : x + size] for x, y in corners.tolist()])
    strip = Image.new("RGB", (size * len(corners), size))
    # Copying a whole photograph into an array would cost half as much as decoding it, so only the patches are copied.
    # Image.crop and Image.paste end in these two calls; their argument checks take longer than the copying.
    source, target = rgb.im, strip.im
    for left, (x, y) in zip(range(0, strip.width, size), corners.tolist(), strict=True):
        target.paste(source.crop((x, y, x + size, y + size)), (left, 0, left + size, size))
    return np.asarray(strip).reshape(size, len(corners), size, 3).transpose(1, 0, 2, 3)


def below_each_other(rgb: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Copy boxes of one size out of an RGB image, each below the one before. To look at parts of an image in one array
    takes a fraction of the time that an array of each does."""
    left, top, right, bottom = boxes[0]
    width, height = right - left, bottom - top
    strip = Image.new("RGB", (width, height * len(boxes)))
    source, target = rgb.im, strip.im  # see cut_patches
    for number, box in enumerate(boxes):
        target.paste(source.crop(box), (0, number * height, width, (number + 1) * height))
    return strip


def random_corners(height: int, width: int, size: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` top-left corners (x, y), uniform over all positions of the patch. Returns int64 (count, 2)."""
    # NumPy promises that RandomState's stream never changes (NEP 19), so a verdict can be reproduced years later.
    _thread_local.random.seed(seed)
    draws = _thread_local.random.random_sample((count, 2))
    return (draws * (width - size + 1, height - size + 1)).astype(np.int64)


class _ThreadLocal(threading.local):
    """One random generator per thread, seeded anew for every image: seeding takes 2 us, creating one 100 us."""

    def __init__(self) -> None:
        self.random = np.random.RandomState()


_thread_local = _ThreadLocal()


def grid_corners(height: int, width: int, size: int, count: int) -> np.ndarray:
    """Spread `count` corners (x, y) evenly over the image, by its size alone. Returns int64 (count, 2).

    The image is divided into `count` cells, in sqrt(count) lines along its longer side, and each patch lies in the
    middle of its cell; one that would stick out of the image is moved inside, so patches overlap in small images.
    """
    longer, shorter = max(height, width), min(height, width)
    lines = math.isqrt(count)
    places = []
    for line in range(lines):
        cells = count // lines + (line < count % lines)
        across = _middle_of_cell(line, lines, shorter, size)
        places += [(_middle_of_cell(cell, cells, longer, size), across) for cell in range(cells)]
    corners = np.array(places, np.int64)
    return corners if width >= height else corners[:, ::-1]


def _middle_of_cell(cell: int, cells: int, side: int, size: int) -> int:
    return min(max(0, (2 * cell + 1) * side // (2 * cells) - size // 2), side - size)
