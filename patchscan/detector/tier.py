"""Estimate from an image's pixels which delivery tier it went through.

The file's header would tell more, but a lossless copy of the same pixels must get the same verdict. Compression leaves
blocks of 8 x 8 pixels whose cosine coefficients are zero or multiples of a step; enlarging leaves empty high
frequencies and a periodic pattern in the second differences (Gallagher, "Detection of Linear and Cubic Interpolation in
JPEG Compressed Images", 2005).

WEIGHTS were fitted, and their accuracy is measured, by `python -m patchscan.evaluation.tier_accuracy`.
"""

import numpy as np
from PIL import Image

from patchscan.detector.answer import TIERS, Tier
from patchscan.detector.jpeg import libjpeg_tables
from patchscan.detector.patches import below_each_other
from patchscan.detector.tier_weights import BIAS, WEIGHTS

# At most four windows are examined, so that a large photograph takes no longer than a small one. Sides in pixels.
WINDOW = 128
# A smaller image has too few pixels for an estimate and counts as native.
LEAST_SIDE = 24

# libjpeg qualities whose quantisation steps are searched for, and how many sizes of coefficients are counted.
_QUALITIES = np.arange(35, 99, 3)
_SIZES = 128
_SPECTRUM_BANDS = 10


def estimate_tier(image: Image.Image) -> Tier:
    """Return the tier that an RGB image most likely went through, from its pixels alone."""
    if min(image.size) < LEAST_SIDE:
        return "native"
    return TIERS[int((traces(image) @ WEIGHTS + BIAS).argmax())]


def traces(image: Image.Image) -> np.ndarray:
    """Return what compression and resizing left in an RGB image of at least LEAST_SIDE: float (35,)."""
    grey = _windows(image)
    light = grey.astype(np.float32)
    # Two windows are enough for the blocks off the grid, which serve as a comparison only.
    on_grid, off_grid = _coefficients(grey), _coefficients(np.ascontiguousarray(grey[::2, 4:-4, 4:-4]))
    equal = grey[:, :, 1:] == grey[:, :, :-1]
    flat = np.log(np.count_nonzero(equal) / equal.size + 1e-3)
    return np.concatenate(
        [_spectrum(light), _block_traces(on_grid, off_grid), _step_traces(on_grid), [flat], _resampling_traces(grey)]
    )


def _windows(image: Image.Image) -> np.ndarray:
    """The windows in grey, uint8 (n, height, width); corners and sides are multiples of 8, on the grid of a JPEG."""
    width, height = (min(WINDOW, side // 8 * 8) for side in image.size)
    boxes = [(x, y, x + width, y + height) for y in _corners(image.height) for x in _corners(image.width)]
    return np.asarray(below_each_other(image, boxes).convert("L")).reshape(-1, height, width)


def _corners(side: int) -> list[int]:
    if side <= WINDOW:
        return [0]
    if side <= 2 * WINDOW:
        return [0, (side - WINDOW) // 8 * 8]
    return [side // 4 // 8 * 8, (3 * side // 4 - WINDOW) // 8 * 8]


def _cosine_transform() -> np.ndarray:
    """The 8 x 8 cosine transform of ITU-T T.81 as one matrix, pixels by coefficients, both in row order."""
    place = np.arange(8)
    line = np.sqrt(2 / 8) * np.cos(np.pi * (2 * place[None] + 1) * place[:, None] / 16)
    line[0] /= np.sqrt(2)
    return np.kron(line, line).T.astype(np.float32)


_TRANSFORM = _cosine_transform()
_ROW, _COLUMN = (part.ravel() for part in np.mgrid[:8, :8])
_RING = np.maximum(_ROW, _COLUMN)
# Averages over coefficients of one ring (distance from the mean), and over bands of rings: (64, rings), (64, bands).
_BY_RING = np.stack([(ring == _RING) / (ring == _RING).sum() for ring in range(1, 8)], 1).astype(np.float32)
_BANDS = [(first <= _RING) & (last >= _RING) for first, last in ((1, 2), (3, 4), (5, 6), (7, 7))]
_BY_BAND = np.stack([band / band.sum() for band in _BANDS], 1).astype(np.float32)
# The nine lowest coefficients but the mean are large enough to show their steps.
_LOW = np.flatnonzero(_ROW + _COLUMN <= 3)[1:]


def _coefficients(grey: np.ndarray) -> np.ndarray:
    """Absolute cosine coefficients of all 8 x 8 blocks, float (blocks, 64)."""
    count, height, width = grey.shape
    # A block's line of eight bytes is moved as one number.
    lines = grey.view(np.uint64).reshape(count, height // 8, 8, width // 8).swapaxes(2, 3)
    blocks = np.ascontiguousarray(lines).view(np.uint8).reshape(-1, 64).astype(np.float32)
    coefficients: np.ndarray = np.abs(blocks @ _TRANSFORM)
    return coefficients


def _spectrum(light: np.ndarray) -> np.ndarray:
    """How the energy of rows and columns falls with frequency: steps between ten bands, and the level of the last."""
    logs = np.zeros(_SPECTRUM_BANDS)
    for lines in (light[:, ::4], np.ascontiguousarray(light.transpose(0, 2, 1)[:, ::4])):
        window = np.hanning(lines.shape[-1]).astype(np.float32)
        power = (np.abs(np.fft.rfft((lines - lines.mean(-1, keepdims=True)) * window)) ** 2).mean((0, 1))
        edges = np.linspace(0, len(power), _SPECTRUM_BANDS + 1).astype(int)
        logs += np.log(np.add.reduceat(power, edges[:-1]) / np.diff(edges) + 0.01) / 2
    return np.concatenate([np.diff(logs), [logs[-1], logs[-1] - logs[3], logs[5] - logs[2]]])


def _block_traces(on_grid: np.ndarray, off_grid: np.ndarray) -> np.ndarray:
    """How blocks on a JPEG's grid differ from others: their energy, and their share of coefficients that are zero."""
    energy = [np.log((part * part).mean(0) @ _BY_RING + 0.01) for part in (on_grid, off_grid)]
    zero, zero_off = ((part < 1).sum(0, dtype=np.uint16) / len(part) @ _BY_BAND for part in (on_grid, off_grid))
    odds, ratio = np.log((zero + 0.01) / (1.01 - zero)), np.log((zero + 0.01) / (zero_off + 0.01))
    return np.concatenate([energy[0] - energy[1], odds, ratio])


def _step_responses() -> np.ndarray:
    """For each quality, coefficient and size the cosine that is 1 at multiples of the step: (qualities, 9 * sizes)."""
    steps = libjpeg_tables(_QUALITIES)[:, _LOW, None]
    sizes = np.arange(_SIZES)
    return np.where(sizes >= 2, np.cos(2 * np.pi * sizes / steps), 0).reshape(len(_QUALITIES), -1).astype(np.float32)


_STEP_RESPONSES = _step_responses()


def _step_traces(on_grid: np.ndarray) -> np.ndarray:
    """How well the coefficients fit the steps of a libjpeg quality: the best fit, weighed by its quality, by range."""
    sizes = np.minimum(np.rint(on_grid[:, _LOW]).astype(np.int64), _SIZES - 1)
    counts = np.bincount((sizes + np.arange(len(_LOW)) * _SIZES).ravel(), minlength=_SIZES * len(_LOW))
    fits = _STEP_RESPONSES @ counts.astype(np.float32) / (counts.reshape(-1, _SIZES)[:, 2:].sum() + 20)
    best = int(fits.argmax())
    middle = (_QUALITIES >= 66) & (_QUALITIES < 86)
    ranges = [fits[_QUALITIES >= 86].max(), fits[middle].max(), fits[_QUALITIES < 66].max()]
    return np.array([fits[best], _QUALITIES[best] / 100 * max(fits[best], 0), *ranges])


def _resampling_traces(grey: np.ndarray) -> np.ndarray:
    """The strongest period of the second differences beyond the JPEG grid's, against the median: both directions."""
    found = []
    pixels = grey.astype(np.int16)
    for along, over in ((2, 1), (1, 2)):
        differences = np.abs(np.diff(pixels, 2, axis=along)).view(np.uint16)
        # At most 128 differences of at most 510.
        profile = differences.sum(over, dtype=np.uint16).astype(np.float32) / grey.shape[over]
        length = profile.shape[1] // 8 * 8
        part = profile[:, :length]
        power = (np.abs(np.fft.rfft(part / (part.mean(1, keepdims=True) + 0.1) - 1)) ** 2).mean(0)
        place = np.arange(len(power))
        free = place % (length // 8) != 0
        high, any_ = free & (place > 0.3 * length), free & (place > 0.05 * length)
        peak = power[high].max() if high.any() else 0.0
        floor = np.median(power[any_]) if any_.any() else 0.0
        found.append(np.log((peak + 1e-3) / (floor + 1e-3)))
    return np.array([max(found), min(found)])
