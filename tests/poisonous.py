"""Pictures on which Pillow's decoder dies, in Python processes that see POISONED (poison/sitecustomize.py)."""

import io
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from patchscan.detector.images import Limits

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
