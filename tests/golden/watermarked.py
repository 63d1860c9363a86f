"""Write images that bear the watermarks of reference programs, for tests/unit/test_watermark.py.

`python -m tests.golden.watermarked` needs `invisible-watermark` 0.2.0 with PyTorch and OpenCV, which are not among the
dependencies.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchscan.scanning.watermark import MESSAGES

DATA = Path(__file__).parent / "data"


def file_name(message: str) -> str:
    """The file of the picture that bears a message."""
    return f"watermark-{message.lower().replace(' ', '-')}.png"


def gradient() -> np.ndarray:
    """A picture of slow changes of colour, uint8 (280, 312, 3)."""
    down, right = np.mgrid[0:280, 0:312]
    return np.stack([right // 3 + 60, down // 3 + 60, (right + down) // 6 + 60], axis=2).astype(np.uint8)


def main() -> None:
    """Write one PNG for each message."""
    library: Any = importlib.import_module("imwatermark")
    for name, message in MESSAGES.items():
        encoder = library.WatermarkEncoder()
        encoder.set_watermark("bits", [int(bit) for bit in message])
        marked = encoder.encode(np.ascontiguousarray(gradient()[..., ::-1]), "dwtDct")[..., ::-1]
        Image.fromarray(np.ascontiguousarray(marked)).save(DATA / file_name(name), optimize=True)


if __name__ == "__main__":
    main()
