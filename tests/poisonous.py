"""Pictures on which Pillow's decoder dies, in Python processes that see POISONED (poison/sitecustomize.py)."""

import io
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from patchscan.detector import decoders
from patchscan.detector.images import ErrorCode, ImageError, Limits, decoded_bytes

POISON = Path(__file__).with_name("poison") / "sitecustomize.py"
POISONED = {"PYTHONPATH": str(POISON.parent)}
HEIGHT = 61
# What decoding does to its process, by the picture's width.
CRASH, ABORT, SPIN, SLEEP, EAT, EXIT, KILLED, KILLED_ONCE = range(101, 109)
HARMLESS = 110


def bmp(width: int) -> bytes:
    """A picture of this width."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, HEIGHT)).convert("RGB").save(file, "BMP")
    return file.getvalue()


def threads_of_a_product(_: bytes, __: Limits) -> list[int]:
    """The threads of this process once BLAS has multiplied matrices that are worth several."""
    assert (np.ones((4096, 64), np.float32) @ np.ones((64, 64), np.float32)).all()
    return [psutil.Process().num_threads()]


def memory_of_the_child(data: bytes, limits: Limits) -> list[int]:
    """Work for a child: the bytes that it holds."""
    return [decoders._memory_of_process()]


def takes_more_than_is_reckoned(data: bytes, limits: Limits) -> str:
    """Work for a child: half as much again as is reckoned and spared, told of as a decoder does that was refused it."""
    try:
        bytearray(decoded_bytes(data) * 3 // 2 + decoders.SPARE_MEMORY)
    except MemoryError:
        raise ImageError(ErrorCode.TRUNCATED, "the TIFF data is damaged or cut short") from None
    return "decoded"


def takes_more_and_leaves_a_circle(data: bytes, limits: Limits) -> str:
    """The same, of which the most part stays in memory until Python looks for circles."""
    held: list[object] = [bytearray(decoded_bytes(data))]
    held.append(held)
    try:
        bytearray(decoded_bytes(data) // 2 + decoders.SPARE_MEMORY)
    except MemoryError:
        raise ImageError(ErrorCode.TRUNCATED, "the TIFF data is damaged or cut short") from None
    return "decoded"
