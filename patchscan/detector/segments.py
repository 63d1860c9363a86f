"""Read a JPEG's segments: reduce it to those that its pixels need, name what the decoder lacks, and tell whether all
pixels are there where the end marker is missing. Markers are explained in ITU-T T.81, annex B.
"""

import hashlib
import random
import re
from collections.abc import Callable, Container, Iterator
from itertools import islice

from PIL import Image

MAX_SEGMENTS = 65_536
# libjpeg's own progressive files have 10 scans, mozjpeg's up to about 20.
MAX_SCANS = 100
END = b"\xff\xd9"
_NUMBER_OF_LINES = b"\xff\xdc\0\4"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_READABLE_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))
_PROGRESSIVE = frozenset((0xC2, 0xCA))
_SCAN, _COMMENT, _APPLICATIONS = 0xDA, 0xFE, frozenset(range(0xE0, 0xF0))
_ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
# Of a segment, within or after the coded pixels too.
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
# JFIF and Adobe say what the colours are, MPF that more pictures follow: all other application data is metadata. What
# is shorter than this, libjpeg does not take for the one or the other.
_KEPT = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12), 0xE2: (b"MPF\0", 4)}
# So many zeros at the end of a file are no pixels: file systems fill with them what was lost. Before an end marker they
# may be pixels, where one colour goes on to the end.
_FILLING = 16
# Bits that differ from the first on, without 0xFF: what an unfinished picture is completed with.
_NOISE = bytes(random.Random(0).choices(range(128, 255), k=4096))
# A file may have been cut between two restart intervals, where the decoder waits for one of these markers.
_NOISE_IN_INTERVALS = _NOISE + b"".join(bytes((0xFF, 0xD0 + number)) + _NOISE[:512] for number in range(8))


def pixels_only(data: bytes) -> bytes | None:
    """Return the JPEG without metadata (EXIF, profiles, comments) and without stray bytes between its segments, which
    decoders skip; None where more than MAX_SEGMENTS others remain.

    What cannot be followed is kept as it is.
    """
    kept: list[bytes | memoryview] = [data[:2]]
    start = 2
    for marker, at, end in _segments(data):
        if not _is_metadata(marker, data[at + 4 : end]):
            kept.append(data[at:end])
            if len(kept) > MAX_SEGMENTS + 1:
                return None
        start = end
    kept.append(memoryview(data)[start:])
    return b"".join(kept)


def _is_metadata(marker: int, content: bytes) -> bool:
    if marker in _KEPT:
        start, size = _KEPT[marker]
        return len(content) < size or not content.startswith(start)
    return marker == _COMMENT or marker in _APPLICATIONS


def unsupported(data: bytes) -> str | None:
    """Name the variant that the decoder lacks ("12-bit JPEG images are"); None for the usual ones."""
    if data[:4] == b"\xff\xd8\xff\xf7" or any(marker == 0xF7 for marker, _, _ in _segments(data)):
        return "JPEG-LS images are"
    frame = _first(data, _FRAMES)
    if len(frame) < 10:
        return None
    marker, precision, components = frame[1], frame[4], frame[9]
    height, factors = frame[5:7], [(byte >> 4, byte & 15) for byte in frame[11::3]]
    if marker in (0xC3, 0xC7, 0xCB, 0xCF):
        return "lossless JPEG images are"
    if marker not in _READABLE_FRAMES:
        return "hierarchical JPEG images are"
    if precision != 8:
        return f"{precision}-bit JPEG images are"
    if height == b"\0\0" and _NUMBER_OF_LINES in data:
        return "JPEG images whose height follows their pixels (DNL) are"
    if _are_fractions(factors):
        return "JPEG images whose sampling factors are no multiples of each other are"
    return None if components in (1, 3, 4) else f"JPEG images of {components} components are"


def _are_fractions(factors: list[tuple[int, int]]) -> bool:
    """Whether a component has, say, two samples where another has three. All factors are 1 to 4."""
    return any(
        set(side) <= {1, 2, 3, 4} and any(max(side) % factor for factor in side) for side in zip(*factors, strict=True)
    )


def has_too_many_scans(data: bytes) -> bool:
    """Whether the picture has more than MAX_SCANS scans: each takes a pass over all pixels, however few its bytes."""
    return len(_scans(data)) > MAX_SCANS


def has_several_scans(data: bytes) -> bool:
    """Whether libjpeg expects more than one scan: the file is progressive, or the first lacks a component."""
    frame, scan = _first(data, _FRAMES), _first(data, {_SCAN})
    return len(frame) > 9 and len(scan) > 4 and (frame[1] in _PROGRESSIVE or scan[4] < frame[9])


def lacks_end(data: bytes) -> bool:
    """Whether no end marker follows the last scan."""
    # Most often the last marker of the file is the end. What follows a picture, such as a film, may hold any bytes.
    if data.rfind(END) > data.rfind(b"\xff\xda"):
        return False
    return end_of_picture(data) is None


def end_of_picture(data: bytes) -> int | None:
    """Where the end marker after the last scan stands; None where there is none."""
    return next((start for marker, start, _ in _later_segments(data) if marker == END[1]), None)


def without_filling(data: bytes) -> bytes:
    """Return a JPEG without end marker without the zeros that a file system put in place of what it lost."""
    pixels = data.rstrip(b"\0")
    return pixels if len(data) - len(pixels) >= _FILLING else data


def completed(data: bytes, decode_with: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """Decode a JPEG whose end marker is missing with the given function; None if pixels are missing as well.

    The decoder replaces what is missing without a word. So the file is decoded with several endings: where they change
    a pixel, the file was cut within its pixels. A progressive file may also have been cut between two scans.
    """
    if not has_all_scans(data):
        return None
    data = data.rstrip(b"\xff")  # half an end marker would make a marker of what is appended
    # After the last pixel, bytes are skipped up to the end marker. One picture is in memory at a time: two of the
    # largest are more than a decoder's process may take.
    filled = {_digest(decode_with(data + filler + END)) for filler in (bytes(4096), _NOISE_IN_INTERVALS)}
    if len(filled) > 1:
        return None
    image = decode_with(data + END)
    return image if _digest(image) in filled else None


def _digest(image: Image.Image) -> bytes:
    """Of the pixels, in bands: the bytes of a whole image would take as much memory again."""
    digest = hashlib.blake2b()
    for top in range(0, image.height, 64):
        digest.update(image.crop((0, top, image.width, min(top + 64, image.height))).tobytes())
    return digest.digest()


def _first(data: bytes, markers: Container[int]) -> bytes:
    """The first segment before the coded pixels with one of these markers; empty where there is none."""
    return next((data[at:end] for marker, at, end in _segments(data) if marker in markers), b"")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment from the start of the file to the first scan's header."""
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            return
        while data[at + 1 : at + 2] == b"\xff":  # a marker may be preceded by any number of these
            at += 1
        if at + 4 > len(data) or data[at + 1] == 0xD9:
            return
        marker = data[at + 1]
        if marker in _ALONE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end < at + 4 or end > len(data):
            return
        yield marker, at, end
        if marker == _SCAN:
            return
        at = end


def _later_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment after the first scan's header, the end marker as the last one."""
    at = next((end for marker, _, end in _segments(data) if marker == _SCAN), len(data))
    while found := MARKER.search(data, at):
        start, marker = found.start(), found.group()[1]
        at = max(start + 2 + int.from_bytes(data[start + 2 : start + 4], "big"), start + 4)
        yield marker, start, at
        if marker == END[1]:
            return


def _scans(data: bytes) -> list[bytes]:
    """The headers of the picture's scans, up to one more than MAX_SCANS."""
    later = (data[start:end] for marker, start, end in _later_segments(data) if marker == _SCAN)
    first = _first(data, {_SCAN})
    return [first, *islice(later, MAX_SCANS)] if first else []


def has_all_scans(data: bytes) -> bool:
    """Whether the scans cover every component and, in a progressive file, every coefficient to its last bit."""
    frame = _first(data, _FRAMES)
    if not frame:
        return False
    missing = {(component, index) for component in frame[10::3] for index in range(64)}
    for scan in _scans(data):
        count = scan[4] if len(scan) > 4 else 0
        if len(scan) < 8 + 2 * count:
            return False
        first, last, approximation = scan[5 + 2 * count : 8 + 2 * count]
        if frame[1] not in _PROGRESSIVE:
            first, last, approximation = 0, 63, 0
        if approximation & 15 == 0:
            missing -= {
                (component, index) for component in scan[5 : 5 + 2 * count : 2] for index in range(first, last + 1)
            }
    return not missing
