"""One change in a file along its own structure, whatever its format."""

import random
from collections.abc import Callable

from patchscan.detector.signatures import format_of
from tests.fuzz import bmp, gif, iso, jpeg, png, riff, tars, tiff, zips

MUTATORS: dict[str | None, Callable[[bytes, random.Random], bytes]] = {
    "JPEG": jpeg.changed,
    "PNG": png.changed,
    "WEBP": riff.changed,
    "GIF": gif.changed,
    "TIFF": tiff.changed,
    "BMP": bmp.changed,
    "AVIF": iso.changed,
    "HEIF": iso.changed,
}


def changed(data: bytes, draw: random.Random) -> bytes:
    """A whole image, zip or tar with one change in its structure; other bytes as they are."""
    if data.startswith(zips.LOCAL):
        return zips.changed(data, draw)
    mutate = MUTATORS.get(format_of(data))
    if mutate is not None:
        return mutate(data, draw)
    return tars.changed(data, draw) if data[257:262] == b"ustar" else data
