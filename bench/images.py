"""The bench's images: cut from the photographs that scikit-image and scikit-learn ship, or the user's own."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from demo.sample import load_photo
from patchscan.common.errors import UserError
from patchscan.detector.images import encode

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "china.jpg", "coffee.png")
SIDES = (500, 375)
QUALITY = 90


def photograph(number: int, width: int, height: int) -> np.ndarray:
    """A view of one photograph at native resolution, uint8 (height, width, 3); a larger one is mirrored at its edges,
    so that its detail, which is what decoding costs, stays a photograph's."""
    photo = load_photo(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
    beyond = [(0, max(0, side - have)) for side, have in zip((height, width), photo.shape, strict=False)]
    large = np.pad(photo, [*beyond, (0, 0)], mode="symmetric")
    random = np.random.default_rng(number)
    y, x = (random.integers(0, have - side + 1) for have, side in zip(large.shape, (height, width), strict=False))
    return large[y : y + height, x : x + width]


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """JPEG of quality 90, or PNG."""
    return encode(Image.fromarray(pixels), kind, **({"quality": QUALITY} if kind == "JPEG" else {}))


def scored_images(data: Path | None, count: int) -> tuple[list[bytes], str]:
    """`count` encoded images to score, and a line that says what they are. Raises UserError where `data` has none."""
    if data is None:
        made = [encoded(photograph(number, *SIDES), "JPEG") for number in range(count)]
        return made, f"JPEGs of {SIDES[0]} x {SIDES[1]}, quality {QUALITY}, cut from packaged photographs"
    files = files_of(data, "val") or files_of(data, "")
    if not files:
        raise UserError(f"--data {data} holds no .jpg, .jpeg or .png")
    chosen = spread(files, count)
    return list(islice(cycle([file.read_bytes() for file in chosen]), count)), f"{len(chosen)} of --data"


def files_of(data: Path, split: str) -> list[Path]:
    """The images below `data`, those of one split (a folder of that name) only where it is given."""
    files = (file for file in data.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return sorted(file for file in files if not split or split in file.parts)


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the files, evenly spread."""
    return [files[place] for place in np.unique(np.linspace(0, len(files) - 1, count).astype(int))]


def write_tree(root: Path, per_class: int) -> None:
    """A data set in GenImage's layout: `per_class` train and an eighth as many val JPEGs of 256 x 256 of either class.
    All are photographs; for the speed of training it does not matter what they show."""
    number = 0
    for split, count in (("train", per_class), ("val", max(2, per_class // 8))):
        for kind in ("ai", "nature"):
            folder = root / "made" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                (folder / f"{number:06d}.jpg").write_bytes(encoded(photograph(number, 256, 256), "JPEG"))
                number += 1
