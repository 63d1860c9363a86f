"""The simplest patch of an image, and the other ways to choose patches that it is measured against.

The idea is SSP's (Chen et al., "A Single Simple Patch is All You Need for AI-generated Image Detection",
arXiv 2402.01123): a generator hides its trace best where there is much to see, so look where there is least.
"""

import hashlib
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Rule = Literal["simplest", "random", "most_complex", "grid"]

# Shorter side under the patch size: the official code resizes the whole image to this before it cuts.
SMALL_IMAGE_SIDE = 256

# An RGB image, decoded: uint8 (height, width, 3), or Pillow's of mode RGB, of which only what is needed is copied.
Pixels = np.ndarray | Image.Image


@dataclass(frozen=True)
class Patches:
    """Chosen patches: `pixels` uint8 (count, size, size, 3); `corners` int (count, 2) as x, y in pixels of the image
    they were cut from; `complexity` int (count,); `upscaled` where that image had to be enlarged first."""

    pixels: np.ndarray
    corners: np.ndarray
    complexity: np.ndarray
    upscaled: bool


def seed_from_bytes(data: bytes) -> int:
    """A 32-bit seed from the encoded file, so that the same file gets the same patches anywhere, in any batch."""
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")


def complexity(patches: np.ndarray) -> np.ndarray:
    """Sum of absolute differences of neighbours: horizontal, vertical and both diagonals, over all channels.

    patches: uint8 (n, height, width, 3). Returns int64 (n,). Source: SSP, section 3.2 and the official code.
    """
    n, height, width, channels = patches.shape
    # All patches side by side make long rows, which keep the differences in vector instructions.
    rows = np.ascontiguousarray(patches.transpose(1, 0, 2, 3)).reshape(height, -1)
    here, right = rows[:, :-channels], rows[:, channels:]
    sums = np.zeros(rows.shape[1], np.min_scalar_type(4 * 255 * height))  # of each column and channel
    across = sums[:-channels]
    across += _difference_sums(here, right, sums.dtype)
    across += _difference_sums(here[:-1], right[1:], sums.dtype)
    across += _difference_sums(here[1:], right[:-1], sums.dtype)
    sums.reshape(n, width, channels)[:, -1] = 0  # there the right neighbour is another patch
    sums += _difference_sums(rows[:-1], rows[1:], sums.dtype)
    result: np.ndarray = sums.reshape(n, -1).sum(axis=1, dtype=np.int64)
    return result


def _difference_sums(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # max - min is |a - b| without leaving uint8.
    apart = np.maximum(a, b)
    apart -= np.minimum(a, b)
    result: np.ndarray = apart.sum(axis=0, dtype=dtype)
    return result


def simplest_patch(rgb: Pixels, size: int = 32, candidates: int = 30, seed: int = 0) -> Patches:
    """The first least complex of `candidates` uniformly drawn `size` x `size` patches of `rgb`."""
    return choose_patches(rgb, rule="simplest", size=size, candidates=candidates, count=1, seed=seed)


def choose_patches(
    rgb: Pixels, *, rule: Rule = "simplest", size: int = 32, candidates: int = 30, count: int = 1, seed: int = 0
) -> Patches:
    """`count` patches of `rgb`, in the order of the rule.

    `simplest` and `most_complex` rank `candidates` uniform draws by `complexity` (ties: the first drawn wins); `random`
    takes the first `count` draws; `grid` spreads `count` patches evenly and draws nothing. An image whose shorter side
    is under `size` is first resized to 256 x 256, as the official code does.
    """
    height, width = sides(rgb)
    upscaled = min(height, width) < size
    if upscaled:
        height = width = SMALL_IMAGE_SIDE
        rgb = as_pillow(rgb).resize((width, height), Image.Resampling.BILINEAR)
    if rule == "grid":
        corners = grid_corners(height, width, size, count)
    else:
        drawn = count if rule == "random" else max(candidates, count)
        corners = random_corners(height, width, size, drawn, seed)
    pixels = cut(rgb, corners, size)
    scores = complexity(pixels)
    if rule in ("simplest", "most_complex"):
        order = np.argsort(scores if rule == "simplest" else -scores, kind="stable")[:count]
        pixels, corners, scores = pixels[order], corners[order], scores[order]
    return Patches(pixels, corners, scores, upscaled)


def sides(rgb: Pixels) -> tuple[int, int]:
    """Height and width in pixels."""
    return (rgb.height, rgb.width) if isinstance(rgb, Image.Image) else (rgb.shape[0], rgb.shape[1])


def as_pillow(rgb: Pixels) -> Image.Image:
    """The same pixels as a Pillow image of mode RGB."""
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)


def cut(rgb: Pixels, corners: np.ndarray, size: int) -> np.ndarray:
    """The `size` x `size` patches at `corners`, int (n, 2) as x, y. Returns uint8 (n, size, size, 3)."""
    places = corners.tolist()
    if isinstance(rgb, np.ndarray):
        return np.stack([rgb[y : y + size, x : x + size] for x, y in places])
    strip = Image.new("RGB", (size * len(places), size))
    # Pillow gives numpy whole images only, as a copy: of a photograph that costs as much as half its decoding.
    # Image.crop and Image.paste end in these two calls; their checks would take longer than the pixels.
    source, target = rgb.im, strip.im
    for left, (x, y) in zip(range(0, strip.width, size), places, strict=True):
        target.paste(source.crop((x, y, x + size, y + size)), (left, 0, left + size, size))
    return np.asarray(strip).reshape(size, len(places), size, 3).transpose(1, 0, 2, 3)


def random_corners(height: int, width: int, size: int, count: int, seed: int) -> np.ndarray:
    """`count` top-left corners (x, y), uniform over every place where the patch fits. Returns int64 (count, 2)."""
    # NumPy promises RandomState's stream never changes (NEP 19), so a verdict can be reproduced years later.
    _streams.random.seed(seed)
    draws = _streams.random.random_sample((count, 2))
    return (draws * (width - size + 1, height - size + 1)).astype(np.int64)


class _Streams(threading.local):
    """A generator a thread: seeding one takes 2 us, making one 100."""

    def __init__(self) -> None:
        self.random = np.random.RandomState()


_streams = _Streams()


def grid_corners(height: int, width: int, size: int, count: int) -> np.ndarray:
    """`count` corners (x, y) spread evenly over the image, row by row. Returns int64 (count, 2)."""
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    x = np.linspace(0, width - size, columns + 2)[1:-1]
    y = np.linspace(0, height - size, rows + 2)[1:-1]
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    return grid[:count].astype(np.int64)
