"""Write images that bear the watermarks of reference programs, for tests/unit/test_watermark.py, or count how often
such watermarks are read in one's own photographs.

    python -m tests.golden.watermarked                  write the images
    python -m tests.golden.watermarked FOLDER...        count, on all images in these folders

Needs `invisible-watermark` 0.2.0 with PyTorch and OpenCV, which are not among the dependencies.
"""

import importlib
import io
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchscan.detector.images import ImageError, decode
from patchscan.detector.watermark import MESSAGES, watermark, watermarks

DATA = Path(__file__).parent / "data"
# Every fifth image that is large enough gets a watermark, up to so many, one message after the other.
MARKED, LEAST_SIDE, LARGEST_SIDE = 100, 512, 1200


def file_name(message: str) -> str:
    """The file of the picture that bears a message."""
    return f"watermark-{message.lower().replace(' ', '-')}.png"


def gradient() -> Image.Image:
    """A picture of slow changes of colour, 312 x 280."""
    down, right = np.mgrid[0:280, 0:312]
    pixels = np.stack([right // 3 + 60, down // 3 + 60, (right + down) // 6 + 60], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def mark(image: Image.Image, name: str) -> Image.Image:
    """Have the library write a message into an image."""
    encoder = library().WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in MESSAGES[name]])
    return _turned(encoder.encode(np.asarray(_turned(np.asarray(image))), "dwtDct"))


def library_reads(image: Image.Image, name: str) -> bool:
    """Whether the library's own decoder reads every bit of a message."""
    bits = (
        library().WatermarkDecoder("bits", len(MESSAGES[name])).decode(np.asarray(_turned(np.asarray(image))), "dwtDct")
    )
    return "".join(str(int(bit)) for bit in bits) == MESSAGES[name]


def library() -> Any:
    """The library."""
    return importlib.import_module("imwatermark")


def _turned(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))


def deliveries(image: Image.Image) -> dict[str, Image.Image]:
    """An image as it is, and as others would pass it on."""
    found = {"PNG": image, "half size": image.reduce(2), "cut by 8": image.crop((8, 8, *image.size))}
    for kind, quality in (("JPEG", 98), ("JPEG", 95), ("JPEG", 94), ("JPEG", 90), ("WebP", 90)):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality)
        found[f"{kind} {quality}"] = Image.open(buffer).convert("RGB")
    return found


def count(folders: list[str]) -> None:
    """Print how often a message is read where there is none, and in how many deliveries of MARKED images."""
    read, most, searched, names = Counter[str](), Counter[int](), Counter[str](), itertools.cycle(MESSAGES)
    for file in sorted(file for folder in folders for file in Path(folder).rglob("*") if file.is_file()):
        try:
            image = decode(file.read_bytes()).pillow
        except ImageError:
            continue
        found = watermarks(image)
        searched["unmarked"] += 1
        read["unmarked"] += found["found"] is not None or watermark(image, None) != "none"
        most |= Counter({one["bits"]: one["matching"] for one in found["messages"]})
        searched["large"] += min(image.size) >= LEAST_SIDE
        if min(image.size) >= LEAST_SIDE and searched["marked"] < MARKED and searched["large"] % 5 == 0:
            searched["marked"] += 1
            name = next(names)
            marked = mark(image.crop((0, 0, min(image.width, LARGEST_SIDE), min(image.height, LARGEST_SIDE))), name)
            read["PNG, by the library"] += library_reads(marked, name)
            read.update(kind for kind, copy in deliveries(marked).items() if watermark(copy, None) == name)
    print("images:", dict(searched), "read:", dict(read), "most matching bits without one:", dict(most))


def main() -> None:
    """Write one PNG for each message, or count."""
    if folders := sys.argv[1:]:
        count(folders)
        return
    for name in MESSAGES:
        mark(gradient(), name).save(DATA / file_name(name), optimize=True)


if __name__ == "__main__":
    main()
