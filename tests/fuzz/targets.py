"""The places that read strangers' bytes: what each is given, and what it may answer."""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchscan.common.errors import UserError
from patchscan.dataset.content_encoding import unpack, unpacked_size
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE, Card
from patchscan.detector.images import ImageError, Limits
from patchscan.detector.prepared import prepare
from patchscan.detector.presets import PatchPreset, Preset, WholeImagePreset
from patchscan.detector.signatures import format_of
from patchscan.scanning.provenance import provenance
from patchscan.serving.requests import RequestError, parse
from tests.fuzz import png, structures, tiff, zips
from tests.fuzz.changes import NUMBERS
from tests.image_tree import picture
from tests.serving_kit import tar_of, zip_of

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    1e308,
    float("nan"),
    2**63,
    10**30,
    "",
    "x",
    "../x",
    "\0",
    [],
    {},
    [[]],
    {"kind": "ensemble"},
)


class Target(Protocol):
    """One place that reads strangers' bytes."""

    # What one case may take: this, and so much more for each megabyte of the file.
    cpu_s: float
    cpu_s_a_megabyte: float

    def case(self, draw: random.Random) -> bytes:
        """One hostile file."""

    def run(self, data: bytes) -> str:
        """What became of it, in a word; raises what is a finding."""


class Decoder:
    """Bytes of every format, to the crops of a patch model and of a whole-image model."""

    cpu_s, cpu_s_a_megabyte = 8.0, 1.0

    def __init__(self, folder: Path):
        cards: dict[str, Preset] = {"ssp": PatchPreset(), "simplecnn": WholeImagePreset()}
        self.cards = [
            Card(name="x", version="1", architecture=name, preset=preset, weights_sha256="")
            for name, preset in cards.items()
        ]
        self.samples = images()

    def case(self, draw: random.Random) -> bytes:
        """One hostile file."""
        return hostile(draw.choice(self.samples), draw, self.samples)

    def run(self, data: bytes) -> str:
        """What became of it: `scored`, or the error's code."""
        for card in self.cards:
            try:
                prepare(data, card.preset)
            except ImageError as error:
                return str(error.code)
        return "scored"


def with_iptc(jpeg: bytes) -> bytes:
    """The JPEG with a caption of IPTC-IIM, and a comment before its end."""
    block = b"\x1c\x02\x78\x00\x0aSteps: 20,"
    resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(block).to_bytes(4) + block + b"\0"
    comment = b"\xff\xfe\0\x06a ca"
    return jpeg[:2] + b"\xff\xed" + (len(resource) + 2).to_bytes(2) + resource + jpeg[2:-2] + comment + jpeg[-2:]


class Provenance:
    """Bytes of every format, with texts, EXIF and XMP, to what they claim of their origin."""

    cpu_s, cpu_s_a_megabyte = 2.0, 2.0

    def __init__(self, folder: Path):
        photo, info = Image.fromarray(picture(7, 64, 48)), PngInfo()
        info.add_text("parameters", "a cat Steps: 20, Sampler: Euler a", zip=True)
        info.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
        exif = b"Exif\0\0" + tiff.exif()
        self.samples = [
            encoded(photo, "PNG", pnginfo=info, exif=exif),
            encoded(photo, "JPEG", comment=b"Steps: 20, ", exif=exif, xmp=XMP),
            with_iptc(encoded(photo, "JPEG")),
            encoded(photo, "GIF", comment=b"Steps: 20, "),
            *(encoded(photo, kind, exif=exif, xmp=XMP) for kind in ("WEBP", "AVIF", "HEIF")),
            encoded(photo, "TIFF", tiffinfo={0x010E: "a house", 0x0131: "camera"}),
            encoded(photo, "TIFF", big_tiff=True, tiffinfo={0x010E: "a house"}),
        ]

    def case(self, draw: random.Random) -> bytes:
        """One hostile file."""
        return hostile(draw.choice(self.samples), draw, [*self.samples, b"c2pa jumb", XMP])

    def run(self, data: bytes) -> str:
        """Whether it claims anything."""
        return "claims" if provenance(data, format_of(data) or "JPEG") else "none"


class Request:
    """Tars, zips and arrays, as clients send them."""

    cpu_s, cpu_s_a_megabyte = 4.0, 2.0

    def __init__(self, folder: Path):
        photo = encoded(Image.fromarray(picture(7, 64, 48)), "JPEG")
        members = {"a.jpg": photo, "folder/b.jpg": photo, "x" * 120: b"text"}
        crops = io.BytesIO()
        np.save(crops, np.zeros((2, 8, 8, 3), np.uint8))
        self.samples = [zip_of(members), tar_of(members), crops.getvalue(), packed(members)]

    def case(self, draw: random.Random) -> bytes:
        """One hostile body."""
        return hostile(draw.choice(self.samples), draw, self.samples)

    def run(self, data: bytes) -> str:
        """The kind of request, or that it is refused."""
        try:
            return type(parse({"body": data}, Limits(max_bytes=32 * 2**20))).__name__
        except RequestError:
            return "refused"


class Encoding:
    """Objects stored with a Content-Encoding."""

    cpu_s, cpu_s_a_megabyte = 2.0, 4.0
    names = ("gzip", "deflate", "br", "zstd")

    def __init__(self, folder: Path):
        contents = (encoded(Image.fromarray(picture(7, 64, 48)), "PNG"), bytes(40 * 2**20), b"")
        self.samples = {name: [encoded_with(name, content) for content in contents] for name in self.names}

    def case(self, draw: random.Random) -> bytes:
        """The encoding's number in one byte, and a hostile object."""
        number = draw.randrange(len(self.names))
        samples = self.samples[self.names[number]]
        data = draw.choice(samples)
        if draw.random() < 0.3:  # members by the thousand
            data = b"".join(draw.choices((samples[0], samples[2]), k=draw.choice((2, 30))))
            data = samples[2] * draw.choice((10, 20_000)) if draw.random() < 0.3 else data
        return bytes((number,)) + (data if draw.random() < 0.3 else mutated(data, draw, samples))

    def run(self, data: bytes) -> str:
        """`unpacked`, or the error's code."""
        limit, name = 32 * 2**20, self.names[data[0]] if data and data[0] < len(self.names) else "gzip"
        try:
            size = unpacked_size(data[1:], name, limit)
            content = unpack(data[1:], name, limit)
        except ImageError as error:
            return str(error.code)
        if len(content) != size or size > limit + 1:
            raise AssertionError(f"{size} bytes were announced, {len(content)} came")
        return "unpacked"


class Verifier:
    """Archives whose members or raw bytes were tampered with, some of them with all digests made to fit again."""

    cpu_s, cpu_s_a_megabyte = 8.0, 1.0

    def __init__(self, folder: Path):
        from patchscan.serving.archive import archive
        from tests.serving_kit import tiny_run

        self.good = archive(tiny_run(folder / "run"), folder / "store").read_bytes()
        with zipfile.ZipFile(io.BytesIO(self.good)) as mar:
            self.members = {name: mar.read(name) for name in mar.namelist()}
        self.file = folder / "case.mar"

    def case(self, draw: random.Random) -> bytes:
        """One hostile archive."""
        return with_weights_named(self._tampered(draw))

    def _tampered(self, draw: random.Random) -> bytes:
        members = dict(self.members)
        if draw.random() < 0.2:
            return zips.changed(self.good, draw)
        if draw.random() < 0.2:
            return mutated(self.good, draw, [b"PK\x01\x02", b"PK\x05\x06" + bytes(18)], tail=draw.random() < 0.5)
        if draw.random() < 0.5:
            members[CARD_FILE] = self._other_card(members[CARD_FILE], draw)
        if draw.random() < 0.3:
            members[WEIGHTS_FILE] = mutated(members[WEIGHTS_FILE], draw, [], head=2000)
        if draw.random() < 0.3:
            name = draw.choice(["MAR-INF/MANIFEST.json", "golden/answers.json", "golden/noise.bmp"])
            members[name] = mutated(members[name], draw, [])
        if draw.random() < 0.1:
            del members[draw.choice(sorted(members))]
        if draw.random() < 0.1:
            members[draw.choice(["../x", "/x", "x.py", "detector/x.py", "é\0", "x/"])] = b"x"
        return packed(members)

    def _other_card(self, text: bytes, draw: random.Random) -> bytes:
        """The card with a value or two replaced anywhere in it."""
        card = json.loads(text)
        for _ in range(draw.randint(1, 2)):
            place = card
            while True:
                key = draw.choice(sorted(place))
                if isinstance(place[key], dict) and place[key] and draw.random() < 0.8:
                    place = place[key]
                else:
                    break
            place[key] = deepcopy(draw.choice(VALUES))
        return json.dumps(card).encode()

    def run(self, data: bytes) -> str:
        """What became of it: `verified`, or the error's first words."""
        from patchscan.serving.verify import verify

        self.file.write_bytes(data)
        try:
            verify(self.file)
        except UserError as error:
            return type(error).__name__
        return "verified"


TARGETS: dict[str, Callable[[Path], Target]] = {
    "decoder": Decoder,
    "verifier": Verifier,
    "provenance": Provenance,
    "request": Request,
    "encoding": Encoding,
}
XMP = (
    b'<x:xmpmeta><rdf:RDF xmp:CreatorTool="x" Iptc4xmpExt:DigitalSourceType='
    b'"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></x:xmpmeta>'
)


def images() -> list[bytes]:
    """One small file of each kind that is read."""
    photo = Image.fromarray(picture(7, 160, 120))
    frames = [photo.rotate(180), photo.rotate(90)]
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    animation: dict[str, Any] = {"save_all": True, "append_images": frames}
    return [
        encoded(photo, "JPEG"),
        encoded(photo, "JPEG", progressive=True),
        encoded(photo, "MPO", **animation),
        encoded(photo.convert("CMYK"), "JPEG"),
        *(encoded(one, "PNG") for one in (photo, deep, photo.quantize(64), photo.convert("RGBA"), photo.convert("1"))),
        encoded(photo, "PNG", **animation),
        *(encoded(photo, "WEBP", lossless=lossless, **animation) for lossless in (False, True)),
        encoded(photo, "WEBP"),
        encoded(photo, "GIF", **animation),
        *(encoded(photo, "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        encoded(deep, "TIFF"),
        encoded(photo, "TIFF", big_tiff=True),
        encoded(photo.copy(), "TIFF", save_all=True, append_images=[photo.rotate(180)]),
        encoded(photo, "BMP"),
        encoded(photo.quantize(16), "BMP"),
        encoded(photo, "AVIF"),
        encoded(photo, "HEIF"),
        encoded(Image.new("RGB", (100_000, 8), "grey"), "PNG"),
    ]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded_with(name: str, content: bytes) -> bytes:
    """The content with this Content-Encoding."""
    if name in ("gzip", "deflate"):
        return gzip.compress(content) if name == "gzip" else zlib.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {"br": "brotli"}.get(name, name)) as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def hostile(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A sample changed along its structure, at random places, or both; checksums mostly fit."""
    kind = draw.random()
    data = structures.changed(data, draw) if kind < 0.7 else data
    if kind < 0.5:
        return data
    data = mutated(data, draw, others)
    return with_checksums(data) if draw.random() < 0.7 else data


def mutated(data: bytes, draw: random.Random, others: list[bytes], head: int = 0, tail: bool = False) -> bytes:
    """The bytes with one to eight changes; within the first `head` bytes or the last 2,000 where that is asked."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        end = min(len(found), head) if head else len(found)
        # Headers are where decisions are made.
        place = draw.randrange(min(end, 64) if draw.random() < 0.3 else end) if end else 0
        place = max(0, len(found) - 1 - draw.randrange(2000)) if tail else place
        span = draw.choice((1, 2, 4, 16, 256, 4096))
        kind = draw.randrange(7)
        if kind == 0 and found:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            code = draw.choice(("B", "<H", ">H", "<I", ">I"))
            value = draw.choice(NUMBERS) & (256 ** struct.calcsize(code) - 1)
            found[place : place + struct.calcsize(code)] = struct.pack(code, value)
        elif kind == 2:
            del found[place : place + span]
        elif kind == 3:
            found[place:place] = found[place : place + span] * draw.choice((1, 2, 50))
        elif kind == 4:
            found[place:place] = draw.randbytes(span)
        elif kind == 5 and draw.random() < 0.3:
            del found[place:]
        elif kind == 6 and others:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            found[place : place + span] = other[start : start + span]
    return bytes(found)


def with_checksums(data: bytes) -> bytes:
    """A PNG's chunks with sums that fit, so that what was changed in them is read; other bytes as they are."""
    if not data.startswith(png.SIGNATURE):
        return data
    found, place = bytearray(data), len(png.SIGNATURE)
    while place + 12 <= len(found):
        (length,) = struct.unpack_from(">I", found, place)
        end = place + 8 + length
        if end + 4 > len(found):
            break
        struct.pack_into(">I", found, end, zlib.crc32(found[place + 4 : end]))
        place = end + 4
    return bytes(found)


def packed(members: dict[str, bytes]) -> bytes:
    """The members as an archive that is laid out as ours are."""
    from patchscan.serving.archive import write_zip

    file = io.BytesIO()
    write_zip(file, members)
    return file.getvalue()


def with_weights_named(data: bytes) -> bytes:
    """The archive with the digest of its weights on its card, as whoever tampers with them would do; other bytes, and
    one archive in two, as they are."""
    if zlib.crc32(data) % 2:
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as mar:
            members = {name: mar.read(name) for name in mar.namelist()}
        card = json.loads(members[CARD_FILE])
        card["weights_sha256"] = sha256(members[WEIGHTS_FILE]).hexdigest()
        members[CARD_FILE] = json.dumps(card).encode()
    except Exception:  # noqa: BLE001  it no longer is such an archive
        return data
    return packed(members)
