"""Draw pictures of scanned images: thumbnails with the patch outlined and enlarged beside it, and images to judge by
eye."""

import io
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from patchscan.common.retries import Retries, TransientError
from patchscan.dataset.content_encoding import unpacked
from patchscan.detector.images import ImageError, Limits, decode, encode
from patchscan.reporting.plots import data_uri
from patchscan.storage.store import ObjectError, ObjectInfo, Store

LIMITS = Limits()
PATIENCE_S = 30.0
THUMBNAIL = 176
# Of an image that a person shall judge: fine detail shows, and two hundred of them still make a page of some 15 MB.
LARGE = 640
OUTLINE = "#D55E00"
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureReader:
    """Reads the images of a scan's rows again. Once `source` has not given one for PATIENCE_S seconds, it is asked for
    the others only once each: a page with pictures missing is better than none."""

    def __init__(self, source: Store):
        self._source, self._patience_s = source, PATIENCE_S

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a row's thumbnail as a data URI; None where the object can no longer be read as it was scored."""
        found = self.read(row)
        return jpeg_uri(draw(found[0], row["patch"])) if found else None

    def read(self, row: dict[str, Any]) -> tuple[Image.Image, Image.Transpose | None] | None:
        """Return a row's image as RGB, with its pixels as stored, and how to turn it upright as its EXIF says (None: it
        is); None where the object can no longer be read as it was scored."""
        info = ObjectInfo(key=row["key"], etag=row["etag"], version_id=row["version_id"])
        retries = Retries(self._patience_s, other_side="the scanned images")
        try:
            fetched, _ = retries.call(lambda: self._source.fetch(info, LIMITS.max_bytes))
            with unpacked(fetched, LIMITS.max_bytes) as data:
                return decode(data, LIMITS).pillow, _turn(data)
        except TransientError:
            self._patience_s = 0.0
            return None
        except (ObjectError, ImageError):
            return None


def _turn(data: bytes) -> Image.Transpose | None:
    try:
        return TURNS.get(Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  damaged metadata raise whatever they like, and the pixels have been read
        return None


def jpeg_uri(image: Image.Image) -> str:
    """Return an image as a JPEG in a data URI."""
    return data_uri(encode(image, "JPEG", quality=82), "image/jpeg")


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Return the image, reduced to fit a square of `side` pixels if it is larger."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


def draw(image: Image.Image, patch: dict[str, int]) -> Image.Image:
    """Draw the image within a square of THUMBNAIL pixels with its patch outlined, and to the right the patch, enlarged
    to such a square and stretched to full contrast: the simplest patch often has almost one colour.

    A patch outside the image is left out: small images are enlarged before their patch is cut.
    """
    x, y, size = patch["x"], patch["y"], patch["size"]
    inside = x + size <= image.width and y + size <= image.height
    sheet = Image.new("RGB", (2 * THUMBNAIL + 4 if inside else THUMBNAIL, THUMBNAIL), "white")
    small = reduced(image, THUMBNAIL)
    sheet.paste(small, (0, 0))
    if inside:
        scale = small.width / image.width
        # A white rim, so that the outline also shows on an image of its own colour.
        for colour, width, out in (("white", 4, 2), (OUTLINE, 2, 1)):
            box = [x * scale - out, y * scale - out, (x + size) * scale + out, (y + size) * scale + out]
            ImageDraw.Draw(sheet).rectangle(box, outline=colour, width=width)
        cut = ImageOps.autocontrast(image.crop((x, y, x + size, y + size)), cutoff=1)
        cut = cut.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST)
        sheet.paste(cut, (THUMBNAIL + 4, 0))
    return sheet
