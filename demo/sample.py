"""The demo's images: photographs from scikit-image and scikit-learn, copies of them by two small generators, and some
hostile files."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from demo.family import Family
from patchscan.detector.images import encode

CROP = 128
GRID = 16
QUALITY = 92
GENERATOR_STEPS = 220
# Crops of each photograph.
TRAIN_CROPS, VAL_CROPS = 60, 40

# No photograph is in both splits; the generators learn from the training photographs only.
TRAIN_PHOTOS = ("astronaut.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "china.jpg", "ihc.png")
VAL_PHOTOS = ("coffee.png", "flower.jpg", "retina.jpg")

SEEN = Family(name="demo_transposed", factor=4, up="transposed", latent=24)
UNSEEN = Family(name="demo_nearest", factor=4, up="nearest", latent=24)


@dataclass(frozen=True)
class HostileFile:
    """A file that a bucket may contain; `expected` is the error code of its rejection, None if it must be scored."""

    name: str
    data: bytes
    expected: str | None


def load_photo(name: str) -> np.ndarray:
    """Load a packaged photograph, uint8 (H, W, 3). Raises FileNotFoundError."""
    # The packages are found, not imported, which takes seconds.
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        found = find_spec(package)
        for place in found.submodule_search_locations or [] if found else []:
            if (file := Path(place, folder, name)).exists():
                return np.asarray(Image.open(file).convert("RGB"))
    raise FileNotFoundError(name)


def crops(photo: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield `count` evenly spread crops of 128 x 128 at native resolution, corners on the 16-pixel JPEG grid."""
    corners = [
        (y, x) for y in range(0, photo.shape[0] - CROP + 1, GRID) for x in range(0, photo.shape[1] - CROP + 1, GRID)
    ]
    for number in np.linspace(0, len(corners) - 1, count).astype(int):
        y, x = corners[number]
        yield photo[y : y + CROP, x : x + CROP]


def write_sample(data: Path) -> None:
    """Write the sample in GenImage's layout, unless it is already complete."""
    complete = data / ".complete"
    if complete.exists():
        return
    from demo.generator import redraw, train_generator  # a second run trains nothing, and so needs no torch

    photos = {name: load_photo(name) for name in TRAIN_PHOTOS + VAL_PHOTOS}
    learned = [photos[name] for name in TRAIN_PHOTOS]
    for family in (SEEN, UNSEEN):
        generator = train_generator(family, learned, GENERATOR_STEPS)
        splits = (("train", TRAIN_PHOTOS, TRAIN_CROPS), ("val", VAL_PHOTOS, VAL_CROPS))
        for split, names, count in splits if family is SEEN else splits[1:]:
            for name in names:
                for number, crop in enumerate(crops(photos[name], count)):
                    file = f"{Path(name).stem}_{number:03d}.jpg"
                    # Every second crop is redrawn and the others kept as photographs, so no crop is in both classes.
                    kind, pixels = ("nature", crop) if number % 2 else ("ai", redraw(generator, crop))
                    write_jpeg(pixels, data / family.name / split / kind / file)
    complete.touch()


def write_jpeg(pixels: np.ndarray, path: Path) -> None:
    """Write a JPEG of quality 92 without chroma subsampling, the same for both classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=QUALITY, subsampling=0)


@cache
def hostile_files() -> list[HostileFile]:
    """Make files such as real buckets contain besides well-formed images, with the expected result of each."""
    photo = Image.fromarray(load_photo("coffee.png")[:256, :256])
    jpeg = encode(photo, "JPEG", quality=QUALITY)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    deep = Image.fromarray((np.asarray(photo.convert("L")).astype(np.uint16) << 8) + 17)
    frames = [photo.transpose(Image.Transpose.ROTATE_90), photo]
    return [
        HostileFile("empty.jpg", b"", "empty"),
        HostileFile("truncated.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        HostileFile("text.jpg", b"This is not an image.\n" * 20, "not_an_image"),
        HostileFile("one_pixel.png", encode(photo.resize((1, 1)), "PNG"), "too_small"),
        HostileFile("bomb.png", bomb(20_000), "too_large"),
        HostileFile("layers.psd", b"8BPS\x00\x01" + bytes(64), "unsupported_format"),
        HostileFile("cmyk.jpg", encode(photo.convert("CMYK"), "JPEG"), None),
        HostileFile("deep_16_bit.png", encode(deep, "PNG"), None),
        HostileFile("animated.gif", encode(photo, "GIF", save_all=True, append_images=frames), None),
        HostileFile("rotated.jpg", encode(photo, "JPEG", exif=exif), None),
    ]


def bomb(side: int) -> bytes:
    """Make a valid white PNG of `side` x `side` pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00".ljust(side // 8 + 1, b"\xff") * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
