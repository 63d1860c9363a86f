"""JPEGs that Pillow does not write."""

import io
import struct

import numpy as np
from PIL import Image


def segment(marker: int, data: bytes) -> bytes:
    """A marker segment with its length."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def three_scans(pixels: np.ndarray, repeats: int = 1) -> bytes:
    """A baseline JPEG of pixels uint8 (height, width, 3) with a scan for each component, not one for all; the first of
    them `repeats` times."""
    height, width, _ = pixels.shape
    scans = b""
    for number, plane in enumerate(Image.fromarray(pixels).convert("YCbCr").split(), 1):
        file = io.BytesIO()
        plane.save(file, "JPEG", quality=90)
        grey = file.getvalue()
        first = grey.index(b"\xff\xdb")
        tables = grey[first : grey.index(b"\xff\xc0")]
        huffman = grey[grey.index(b"\xff\xc4") : grey.index(b"\xff\xda")]
        coded = grey[grey.index(b"\xff\xda") + 10 : -2]
        header = segment(0xDA, bytes([1, number, 0, 0, 63, 0]))
        scans += (tables + huffman + header + coded) * (repeats if number == 1 else 1)
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    frame = segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + components)
    start = scans.index(b"\xff\xc4")
    return b"\xff\xd8" + scans[:start] + frame + scans[start:] + b"\xff\xd9"
