"""C2PA manifests as the real library signs them: read, told from altered ones, and shown beside a score that stays."""

import datetime as dt
import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import c2pa
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image, TiffImagePlugin, TiffTags
from PIL.PngImagePlugin import PngInfo

from patchscan.scanning import c2pa_manifest
from patchscan.scanning.provenance import Provenance, provenance
from tests import c2pa_kit
from tests.c2pa_kit import DAY, NOW, Identity, identity, time_stamps
from tests.scan_kit import StubScorer, image

Sign = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def sign() -> Sign:
    """Puts a signed manifest into a JPEG: made by a generator, named `Picture Maker`."""
    signer = c2pa_kit.identity("signer", c2pa_kit.identity("authority", authority=True))
    return lambda jpeg: c2pa_kit.sign(jpeg, signer)


@pytest.fixture
def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(1, side=64))).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_signed_manifest_is_valid_and_says_who_made_the_image(sign: Sign, jpeg: bytes) -> None:
    assert provenance(sign(jpeg), "JPEG") == {
        "c2pa": "Valid",
        "c2pa_generator": "Picture Maker",
        "c2pa_signer": "signer, tests",
        "c2pa_time": None,
        "digital_source_type": "trainedAlgorithmicMedia",
        "generator": None,
    }


@pytest.fixture(scope="module")
def authorities() -> dict[str, Identity]:
    """An authority of signers, one of time stamps, and another with the first one's name."""
    names = {"cameras": "authority", "times": "time authority", "stranger": "authority"}
    return {
        kind: identity(name, authority=True, first=NOW - 99 * DAY, last=NOW + 99 * DAY) for kind, name in names.items()
    }


def judged(data: bytes, *trusted: Identity) -> Provenance:
    found = provenance(data, "JPEG", "".join(one.pem for one in trusted) or None)
    assert found is not None
    return found


def test_a_signer_is_trusted_if_a_listed_authority_issued_its_certificate(
    jpeg: bytes, authorities: dict[str, Identity]
) -> None:
    cameras, stranger = authorities["cameras"], authorities["stranger"]
    by_a_camera, by_itself = identity("Camera", cameras), identity("Camera")
    of_the_same_names = identity("Camera", stranger)
    data = c2pa_kit.sign(jpeg, by_a_camera)
    assert judged(data, cameras) == judged(data) | {"c2pa": "Trusted"}
    assert judged(data, stranger, cameras)["c2pa"] == "Trusted"
    assert judged(data)["c2pa"] == judged(data, stranger)["c2pa"] == "Valid"
    for pretender in (by_itself, of_the_same_names):
        found = judged(c2pa_kit.sign(jpeg, pretender), cameras)
        assert found["c2pa"] == "Valid"
        assert found["c2pa_signer"] == "Camera, tests"


def test_an_authority_between_signer_and_list_is_followed(jpeg: bytes, authorities: dict[str, Identity]) -> None:
    factory = identity("factory", authorities["cameras"], authority=True)
    assert judged(c2pa_kit.sign(jpeg, identity("Camera", factory)), authorities["cameras"])["c2pa"] == "Trusted"


def test_what_a_trusted_signer_signed_is_invalid_once_altered(jpeg: bytes, authorities: dict[str, Identity]) -> None:
    data = bytearray(c2pa_kit.sign(jpeg, identity("Camera", authorities["cameras"])))
    data[-30] ^= 1
    found = judged(bytes(data), authorities["cameras"])
    assert {name: value for name, value in found.items() if value} == {"c2pa": "Invalid"}


def test_a_time_stamp_counts_beside_a_trusted_signer_if_its_authority_is_listed(
    jpeg: bytes, authorities: dict[str, Identity]
) -> None:
    cameras, times = authorities["cameras"], authorities["times"]
    stamps = identity("stamps", times, usage=ExtendedKeyUsageOID.TIME_STAMPING)
    now = dt.datetime.now(dt.UTC)
    with time_stamps(stamps, now) as address:
        data = c2pa_kit.sign(jpeg, identity("Camera", cameras), stamps=address)
    assert judged(data)["c2pa_time"] == f"{now:%Y-%m-%dT%H:%M:%S+00:00}"
    assert judged(data, cameras)["c2pa"] == judged(data, cameras, times)["c2pa"] == "Trusted"
    assert judged(data, cameras)["c2pa_time"] is None
    assert judged(data, cameras, times)["c2pa_time"] == judged(data)["c2pa_time"]


def test_an_expired_certificate_needs_a_time_stamp_of_a_listed_authority(
    jpeg: bytes, authorities: dict[str, Identity]
) -> None:
    cameras, times = authorities["cameras"], authorities["times"]
    plain, stamped, expires = signed_just_before_expiry(jpeg, cameras, times)
    time.sleep(max(0.0, (expires - dt.datetime.now(dt.UTC)).total_seconds()) + 1.1)
    assert judged(plain, cameras, times)["c2pa"] == "Invalid"
    assert judged(stamped, cameras, times)["c2pa"] == "Trusted"
    assert judged(stamped, times)["c2pa"] == "Valid"
    # Nobody on the list says when it was signed.
    assert judged(stamped, cameras)["c2pa"] == judged(stamped)["c2pa"] == "Invalid"


def signed_just_before_expiry(jpeg: bytes, cameras: Identity, times: Identity) -> tuple[bytes, bytes, dt.datetime]:
    """The picture signed without and with a time stamp, and when the certificate expires: the library signs with none
    that has expired. On a busy machine signing takes longer than the first times tried."""
    stamps = identity("stamps", times, usage=ExtendedKeyUsageOID.TIME_STAMPING)
    for seconds in (2, 8, 32, 128):
        now = dt.datetime.now(dt.UTC)
        expires = now + dt.timedelta(seconds=seconds)
        signer = identity("Camera", cameras, last=expires)
        with time_stamps(stamps, now) as address:
            try:
                plain, stamped = c2pa_kit.sign(jpeg, signer), c2pa_kit.sign(jpeg, signer, stamps=address)
            except c2pa.C2paError:
                continue
        if dt.datetime.now(dt.UTC) < expires - dt.timedelta(seconds=1):
            return plain, stamped, expires
    raise AssertionError("signing took two minutes")


def test_pixels_altered_after_signing_make_it_invalid(sign: Sign, jpeg: bytes) -> None:
    data = bytearray(sign(jpeg))
    data[-30] ^= 1
    found = provenance(bytes(data), "JPEG")
    assert found is not None
    assert found["c2pa"] == "Invalid"


def test_a_picture_that_was_only_edited_is_of_its_parents_source_type(jpeg: bytes) -> None:
    signer = c2pa_kit.identity("signer", c2pa_kit.identity("authority", authority=True))
    made = c2pa_kit.sign(jpeg, signer)
    for data in (made, c2pa_kit.sign(made, signer, "Resizer", None)):
        found = judged(c2pa_kit.sign(data, signer, "Converter", None))
        assert (found["c2pa"], found["c2pa_generator"]) == ("Valid", "Converter")
        assert found["digital_source_type"] == "trainedAlgorithmicMedia"
    captured = c2pa_kit.sign(made, signer, source=c2pa_kit.CAPTURED)
    assert judged(c2pa_kit.sign(captured, signer, source=None))["digital_source_type"] == "digitalCapture"
    altered = bytearray(made)
    altered[-30] ^= 1
    found = judged(c2pa_kit.sign(bytes(altered), signer, source=None))
    assert (found["c2pa"], found["digital_source_type"]) == ("Valid", None)


def test_words_of_a_caption_are_no_manifest() -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = saved(kind) + b" of jumbf boxes in c2pa manifests"
        assert provenance(data, kind) is None, kind


def test_a_manifest_that_takes_too_long_costs_its_own_row_only(
    jpeg: bytes, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's time grows with the square of the assertions: to hours, for the longest file that is read."""
    signer = c2pa_kit.identity("signer", c2pa_kit.identity("authority", authority=True))
    assert judged(sign(jpeg))["c2pa"] == "Valid"  # the library is loaded
    data = c2pa_kit.sign(jpeg, signer, more=1000)
    assert judged(data)["c2pa"] == "Valid"
    monkeypatch.setattr(c2pa_manifest, "TIME_S", 0.02)
    assert {name: value for name, value in judged(data).items() if value} == {"c2pa": "unreadable"}
    monkeypatch.undo()
    assert judged(sign(jpeg))["c2pa"] == "Valid"


def test_a_cut_manifest_is_unreadable_or_invalid_and_raises_nothing(sign: Sign, jpeg: bytes) -> None:
    data = sign(jpeg)
    start = data.index(b"jumb")
    for cut in range(start, start + 400, 23):
        found = provenance(data[:cut] + bytes(8) + data[cut + 8 :], "JPEG")
        assert found is None or found["c2pa"] in (None, "unreadable", "Invalid")


def test_a_manifest_does_not_change_the_verdict(sign: Sign, jpeg: bytes) -> None:
    plain, claimed = StubScorer().answer(jpeg), StubScorer().answer(sign(jpeg))
    # The patch follows from the bytes, so another one may be looked at; nothing else may differ.
    assert claimed.verdict == plain.verdict
    assert claimed.image == plain.image


PARAMETERS = "a cat, für Elise\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
FOUND = f"Stable Diffusion web UI: {' '.join(PARAMETERS.split())}"[: 120 + len("Stable Diffusion web UI: ")]
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{TERM}"/></rdf:RDF></x:xmpmeta>'
)


def saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(1, side=64))).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(tag: int, value: bytes | str, *, inner: bool = False) -> Image.Exif:
    exif = Image.Exif()
    if inner:
        exif[0x0112] = 1  # Pillow leaves out what seems empty
        exif.get_ifd(0x8769)[tag] = value
    else:
        exif[tag] = value
    return exif


def png_texts(texts: dict[str, str], *, packed: bool = False, late: bool = False) -> bytes:
    """A PNG with texts before its pixels, or after them where `late`."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text, zip=packed) if packed else info.add_text(name, text)
    data = saved("PNG", pnginfo=info)
    if not late:
        return data
    first, pixels, end = data.index(b"IHDR") + 21, data.index(b"IDAT") - 4, len(data) - 12
    return data[:first] + data[pixels:end] + data[first:pixels] + data[end:]


def with_xmp(xmp: bytes) -> bytes:
    return saved("JPEG", xmp=xmp)


def described(text: str, name: str = "dc:description") -> bytes:
    """A JPEG whose XMP describes it, as Photoshop and exiftool write it."""
    element = f'<{name}><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></{name}>'
    return with_xmp(f"<x:xmpmeta><rdf:RDF><rdf:Description>{element}</rdf:Description></rdf:RDF></x:xmpmeta>".encode())


def segments(*contents: tuple[int, bytes], late: bool = False) -> bytes:
    """A JPEG with these segments after its start, or before its end where `late`."""
    added = b"".join(bytes((0xFF, kind)) + (len(content) + 2).to_bytes(2) + content for kind, content in contents)
    data = saved("JPEG")
    return data[:-2] + added + data[-2:] if late else data[:2] + added + data[2:]


def with_exif_in_segments(block: bytes) -> bytes:
    """A JPEG whose EXIF is longer than a segment, as some cameras' and programs' is."""
    parts = [block[start : start + 60_000] for start in range(6, len(block), 60_000)]
    data = segments(*((0xE1, b"Exif\0\0" + part) for part in parts))
    return data[:2] + b"\0\xff\xff" + data[2:]


def iptc(number: int, text: bytes) -> bytes:
    """Photoshop's image resources: one without text, and IPTC-IIM with this data set."""
    block = b"\x1c\x02\x00\x00\x02\x00\x04\x1c\x02" + bytes([number]) + len(text).to_bytes(2) + text
    return resource(0x03ED, b"\0" * 3) + resource(0x0404, block)


def resource(kind: int, data: bytes) -> bytes:
    """One of Photoshop's image resources."""
    return b"8BIM" + kind.to_bytes(2) + b"\0\0" + len(data).to_bytes(4) + data + b"\0" * (len(data) % 2)


def gif_with_xmp(xmp: bytes) -> bytes:
    """As the XMP specification, part 3, puts it into a GIF: not in blocks, with bytes after it that lead to an end
    wherever one begins to count."""
    data, trailer = saved("GIF"), b"\1" + bytes(range(255, -1, -1)) + b"\0"
    return data[:-1] + b"!\xff\x0bXMP DataXMP" + xmp + trailer + data[-1:]


def profile(kind: str, content: bytes) -> dict[str, str]:
    """A text chunk as ImageMagick writes it."""
    digits = content.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    return {f"Raw profile type {kind}": "\n".join(["", kind.lower(), f"{len(content):8}", *lines, ""])}


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG with this chunk after its pixels."""
    data, body = saved("PNG"), kind + content
    return data[:-12] + len(content).to_bytes(4) + body + zlib.crc32(body).to_bytes(4) + data[-12:]


def utf8_tag(jpeg: bytes) -> bytes:
    """The JPEG with its ImageDescription in the type for UTF-8."""
    return jpeg.replace(b"\x01\x0e\0\2", b"\x01\x0e\0\x81").replace(b"\x0e\x01\2\0", b"\x0e\x01\x81\0")


def with_brand(heic: bytes) -> bytes:
    """As some cameras name it."""
    return heic[:8] + b"MiHE" + heic[12:]


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def iso_metadata(exif: bytes, iloc: bytes, types: bytes = b"Exif") -> bytes:
    """The metadata of an AVIF with items of these types; the last, number 7, is kept in `idat`, as `iloc` says."""
    kinds = [types[at : at + 4] for at in range(0, len(types), 4)]
    numbers = [number % 65536 for number in range(8 - len(kinds), 8)]
    items = b"".join(
        box(b"infe", struct.pack(">IHH4s", 2 << 24, number, 0, kind))
        for number, kind in zip(numbers, kinds, strict=True)
    )
    inside = box(b"iinf", struct.pack(">IH", 0, len(kinds) % 65536) + items) + box(b"iloc", iloc) + box(b"idat", exif)
    return box(b"ftyp", b"avif\0\0\0\0avif") + box(b"meta", bytes(4) + inside)


def places(spans: list[tuple[int, int]]) -> bytes:
    """An `iloc` of version 1 with one item of these places in `idat`."""
    return struct.pack(">IBBHHHHH", 1 << 24, 0x44, 0, 1, 7, 1, 0, len(spans)) + b"".join(
        struct.pack(">II", *span) for span in spans
    )


def tiff_bytes(tag: int, value: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """A tag of bytes, for Pillow to write."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory.tagtype[tag] = TiffTags.UNDEFINED
    directory[tag] = value
    return directory


def extended(xmp: bytes, at: int) -> bytes:
    """A JPEG whose XMP goes on from one segment to the next, which come in the other order."""
    head = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + len(xmp).to_bytes(4)
    return segments(*((0xE1, head + start.to_bytes(4) + xmp[start:end]) for start, end in ((at, len(xmp)), (0, at))))


def claimed(data: bytes, kind: str, field: str) -> str | None:
    found = provenance(data, kind)
    return found[field] if found else None


EXIF_BLOCK = exif_of(0x010E, PARAMETERS.replace("ü", "u")).tobytes()
IN_EVERY_PLACE: dict[str, Callable[[], tuple[bytes, str]]] = {
    "text chunk": lambda: (png_texts({"parameters": PARAMETERS.replace("ü", "u")}), "PNG"),
    "packed text chunk": lambda: (png_texts({"parameters": PARAMETERS}, packed=True), "PNG"),
    "text chunk after the pixels": lambda: (png_texts({"parameters": PARAMETERS}, packed=True, late=True), "PNG"),
    "PNG comment": lambda: (png_texts({"Comment": PARAMETERS}, packed=True), "PNG"),
    "JPEG comment": lambda: (saved("JPEG", comment=PARAMETERS.encode()), "JPEG"),
    "JPEG comment in UTF-16": lambda: (saved("JPEG", comment=PARAMETERS.encode("utf-16")), "JPEG"),
    "GIF comment": lambda: (saved("GIF", comment=PARAMETERS.encode()), "GIF"),
    "UTF-16LE": lambda: (
        saved("JPEG", exif=exif_of(0x9286, b"UNICODE\0" + PARAMETERS.encode("utf-16-le"), inner=True)),
        "JPEG",
    ),
    "UTF-16BE": lambda: (
        saved("WEBP", exif=exif_of(0x9286, b"UNICODE\0" + PARAMETERS.encode("utf-16-be"), inner=True)),
        "WEBP",
    ),
    "ASCII": lambda: (saved("PNG", exif=exif_of(0x9286, b"ASCII\0\0\0" + PARAMETERS.encode(), inner=True)), "PNG"),
    "ImageMagick's profile": lambda: (
        png_texts(
            {
                "Raw profile type exif": "\nexif\n      99\n"
                + exif_of(0x010E, PARAMETERS.replace("ü", "u")).tobytes().hex()
                + "\n"
            }
        ),
        "PNG",
    ),
    "AVIF": lambda: (saved("AVIF", exif=exif_of(0x010E, PARAMETERS.replace("ü", "u"))), "AVIF"),
    "HEIC": lambda: (saved("HEIF", exif=exif_of(0x010E, PARAMETERS.replace("ü", "u")).tobytes()), "HEIF"),
    "Windows' comment": lambda: (saved("JPEG", exif=exif_of(0x9C9C, PARAMETERS.encode("utf-16-le"))), "JPEG"),
    "XMP's description": lambda: (described(PARAMETERS), "JPEG"),
    "XMP's comment": lambda: (described(PARAMETERS, "exif:UserComment"), "JPEG"),
    "XMP's attribute": lambda: (
        with_xmp(XMP.replace("Iptc", f"dc:description = '{PARAMETERS.replace(chr(10), '&#xA;')}' Iptc").encode()),
        "JPEG",
    ),
    "IPTC's caption": lambda: (
        segments((0xED, b"Photoshop 3.0\0" + iptc(120, PARAMETERS.encode()))),
        "JPEG",
    ),
    "copyright": lambda: (saved("JPEG", exif=exif_of(0x8298, PARAMETERS.replace("ü", "u"))), "JPEG"),
    "Windows' keywords": lambda: (saved("JPEG", exif=exif_of(0x9C9E, PARAMETERS.encode("utf-16-le"))), "JPEG"),
    "Windows' subject": lambda: (saved("JPEG", exif=exif_of(0x9C9F, PARAMETERS.encode("utf-16-le"))), "JPEG"),
    "document's name": lambda: (saved("JPEG", exif=exif_of(0x010D, PARAMETERS.replace("ü", "u"))), "JPEG"),
    "UTF-8 called Unicode": lambda: (
        saved("JPEG", exif=exif_of(0x9286, b"UNICODE\0" + PARAMETERS.encode() + b"\0\0", inner=True)),
        "JPEG",
    ),
    "JPEG comment after the pixels": lambda: (segments((0xFE, PARAMETERS.encode()), late=True), "JPEG"),
    "JPEG comment in two segments": lambda: (
        segments((0xFE, PARAMETERS.encode()[:50]), (0xFE, PARAMETERS.encode()[50:])),
        "JPEG",
    ),
    "a second EXIF": lambda: (
        segments(*((0xE1, exif_of(0x010E, text).tobytes()) for text in ("a", PARAMETERS.replace("ü", "u")))),
        "JPEG",
    ),
    "EXIF in many segments, behind stray bytes": lambda: (
        with_exif_in_segments(exif_of(0x010E, PARAMETERS.replace("ü", "u") + " " * 200_000).tobytes()),
        "JPEG",
    ),
    "ImageMagick's other profile": lambda: (
        png_texts(profile("APP1", exif_of(0x010E, PARAMETERS.replace("ü", "u")).tobytes())),
        "PNG",
    ),
    "ImageMagick's IPTC": lambda: (png_texts(profile("iptc", iptc(120, PARAMETERS.encode()))), "PNG"),
    "ComfyUI's chunk": lambda: (with_chunk(b"comf", b"parameters\0" + PARAMETERS.encode()), "PNG"),
    "XMP's description of a TIFF": lambda: (described(PARAMETERS, "tiff:ImageDescription"), "JPEG"),
    "JIS": lambda: (
        saved("JPEG", exif=exif_of(0x9286, b"JIS\0\0\0\0\0" + PARAMETERS.encode(), inner=True)),
        "JPEG",
    ),
    "UTF-8 of Exif 3.0": lambda: (utf8_tag(saved("JPEG", exif=exif_of(0x010E, PARAMETERS.replace("ü", "u")))), "JPEG"),
    "GIF comment behind stray bytes": lambda: (
        saved("GIF", comment=PARAMETERS.encode()).replace(b"\x21\xfe", b"\0\0\x21\xfe", 1),
        "GIF",
    ),
    "WebP of a wrong length": lambda: (
        b"RIFF\0\0\0\0" + saved("WEBP", exif=exif_of(0x010E, PARAMETERS.replace("ü", "u")))[8:],
        "WEBP",
    ),
    "HEIC of an unknown first brand": lambda: (
        with_brand(saved("HEIF", exif=exif_of(0x010E, PARAMETERS.replace("ü", "u")).tobytes())),
        "HEIF",
    ),
    "AVIF's EXIF in two places of its data box": lambda: (
        iso_metadata(bytes(4) + EXIF_BLOCK, places([(0, 50), (50, len(EXIF_BLOCK) - 46)])),
        "AVIF",
    ),
    "TIFF's IPTC": lambda: (saved("TIFF", tiffinfo=tiff_bytes(33723, iptc(120, PARAMETERS.encode())[28:])), "TIFF"),
    "TIFF's Photoshop": lambda: (saved("TIFF", tiffinfo=tiff_bytes(34377, iptc(120, PARAMETERS.encode()))), "TIFF"),
    "TIFF": lambda: (saved("TIFF", tiffinfo={0x010E: PARAMETERS.replace("ü", "u")}), "TIFF"),
}


@pytest.mark.parametrize("place", IN_EVERY_PLACE)
def test_parameters_are_found_in_every_place_and_encoding(place: str) -> None:
    found = claimed(*IN_EVERY_PLACE[place](), "generator")
    assert found
    assert found.replace("fur", "für") == FOUND


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", [b"", b"UNICODE\0"])
def test_a_mostly_chinese_prompt_is_read_in_either_order_of_its_bytes(order: str, mark: bytes) -> None:
    text = "一只猫在屋顶上" * 30 + "\n" + PARAMETERS[PARAMETERS.index("Steps") :]
    found = claimed(segments((0xFE, mark + text.encode(order))), "JPEG", "generator")
    assert found
    assert found.startswith("Stable Diffusion web UI: 一只猫在屋顶上一只猫")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (with_xmp(XMP.encode("utf-32-le")), "JPEG"),
        (with_xmp(XMP.encode("utf-32-be")), "JPEG"),
        (png_texts(profile("xmp", XMP.encode())), "PNG"),
        (png_texts(profile("APP1", XMP_HEAD + XMP.encode())), "PNG"),
        (with_xmp(XMP.replace("DigitalS", "digitalS").encode()), "JPEG"),
        (
            with_xmp(
                XMP.replace(f'="{TERM}"', f' rdf:parseType="Resource"> <rdf:value>{TERM}</rdf:value><').encode(),
            ),
            "JPEG",
        ),
        (with_xmp(XMP.encode()), "JPEG"),
        (extended(XMP.encode(), XMP.index("newscodes")), "JPEG"),
        (with_xmp(XMP.encode("utf-16-le")), "JPEG"),
        (with_xmp(XMP.encode("utf-16-be")), "JPEG"),
        (with_xmp(XMP.replace(f'="{TERM}"', f"><b>{TERM}").replace("<b>", "").encode()), "JPEG"),
        (with_xmp(XMP.replace('Type="', "Type rdf:resource='").encode()), "JPEG"),
        (saved("WEBP", xmp=XMP.encode()), "WEBP"),
        (png_texts({"XML:com.adobe.xmp": XMP}), "PNG"),
        (png_texts({"XML:com.adobe.xmp": XMP}, packed=True), "PNG"),
        (png_texts({"XML:com.adobe.xmp": XMP}, packed=True, late=True), "PNG"),
        (segments((0xE1, XMP_HEAD + XMP.encode()), late=True), "JPEG"),
        (extended(XMP.encode(), 0), "JPEG"),
        (segments((0xED, b"Photoshop 3.0\0" + resource(0x0424, XMP.encode()))), "JPEG"),
        (saved("TIFF", tiffinfo=tiff_bytes(700, XMP.encode())), "TIFF"),
        (saved("TIFF", big_tiff=True, tiffinfo=tiff_bytes(700, XMP.encode())), "TIFF"),
        (gif_with_xmp(XMP.encode()), "GIF"),
        (saved("AVIF", xmp=XMP.encode()), "AVIF"),
        (saved("HEIF", xmp=XMP.encode()), "HEIF"),
        (iso_metadata(XMP.encode(), places([(0, len(XMP))]), b"mimemime"), "AVIF"),
    ],
)
def test_a_source_type_is_found_however_xmp_is_stored(data: bytes, kind: str) -> None:
    assert claimed(data, kind, "digital_source_type") == "trainedAlgorithmicMedia"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("JPEG") + XMP.encode(), "JPEG"),
        (saved("JPEG", comment=XMP.encode()), "JPEG"),
        (segments((0xE5, XMP_HEAD + XMP.encode())), "JPEG"),
        (with_exif_in_segments(exif_of(0x927C, XMP, inner=True).tobytes()), "JPEG"),
        (png_texts({"Comment": XMP}), "PNG"),
        (saved("PNG") + XMP.encode(), "PNG"),
        (saved("GIF", comment=XMP.encode()), "GIF"),
        (saved("TIFF", tiffinfo={0x010E: XMP}), "TIFF"),
        (saved("WEBP") + XMP.encode(), "WEBP"),
        (saved("AVIF") + XMP.encode(), "AVIF"),
        (saved("BMP") + XMP.encode(), "BMP"),
    ],
)
def test_what_looks_like_xmp_counts_only_where_the_format_keeps_it(data: bytes, kind: str) -> None:
    """A picture that is kept in another one's file, or a page that a caption quotes, has XMP of its own."""
    assert provenance(data, kind) is None


CAPTIONS = [
    "Imagen de la playa",
    "Gemini and Orion over the lake",
    "Painted after Midjourney and DALL-E had left; Sampler: my sister, Steps: many",
    "A flux.1 capacitor, stable diffusion of gases, openai office, leonardo.ai",
    f"see {TERM}",
    "negative prompt: none",
    "Wedding Meyer, Job ID: 01234567-89ab-cdef-0123-456789abcdef",
    "Bread. Steps: 4, Sampler: rye",
    "Negative prompt: none. Steps: 4, done",
    "Steps: 39, Sampler: Hitchcock",
]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_words_of_a_caption_are_no_mark(caption: str) -> None:
    for data, kind in (
        (saved("JPEG", comment=caption.encode()), "JPEG"),
        (saved("JPEG", exif=exif_of(0x010E, caption)), "JPEG"),
        (saved("JPEG", exif=exif_of(0x013B, caption)), "JPEG"),
        (saved("JPEG", exif=exif_of(0x9286, b"ASCII\0\0\0" + caption.encode(), inner=True)), "JPEG"),
        (png_texts(dict.fromkeys(("Description", "Title", "Comment", "prompt", "workflow"), caption)), "PNG"),
        (saved("GIF", comment=caption.encode()), "GIF"),
        (with_xmp(XMP.replace(f'Iptc4xmpExt:DigitalSourceType="{TERM}"', f'dc:title="{caption}"').encode()), "JPEG"),
    ):
        assert provenance(data, kind) is None, kind


@pytest.mark.parametrize(
    "texts",
    [
        {"parameters": "a simulation; Steps: 5000"},
        {"parameters": "Steps: 5000, dt: 0.01, Temperature: 300"},
        {"workflow": '{"name": "orders", "nodes": [{"type": "n8n-nodes-base.start"}], "connections": {}}'},
        {"prompt": '{"role": "user", "content": "nodes"}'},
        {"Comment": '{"sampler": "Philips", "rate": 44100}'},
        {"Dream": "of the sea -s"},
        {"comf": "ortable"},
    ],
)
def test_other_programs_fields_of_the_same_names_are_no_mark(texts: dict[str, str]) -> None:
    assert provenance(png_texts(texts), "PNG") is None


@pytest.mark.parametrize(
    ("texts", "generator"),
    [
        ({"workflow": '{"version": 1, "state": {"lastNodeId": 9}, "nodes": []}'}, "ComfyUI"),
        (
            {"parameters": "a cat\nSteps: 20, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: sd.cpp"},
            "Stable Diffusion web UI",
        ),
        ({"parameters": "a cat\nSteps: 20, Size: 512x512"}, "Stable Diffusion web UI"),
        ({"prompt": '{"3": {"class_type": "KSampler"}}'}, "ComfyUI"),
        ({"workflow": '{"last_node_id": 9, "nodes": []}'}, "ComfyUI"),
        ({"invokeai_metadata": '{"positive_prompt": "a cat"}'}, "InvokeAI"),
        ({"Dream": '"a cat" -s 50 -S 42 -W 512 -H 512 -C 7.5 -A k_lms'}, "InvokeAI"),
        ({"Description": "a cat --v 6 Job ID: 01234567-89ab-cdef-0123-456789abcdef"}, "Midjourney"),
        ({"Description": "a cat Job ID: 01234567-89ab-cdef-0123-456789abcdef", "Author": "somebody"}, "Midjourney"),
        ({"any": "a cat\nSteps: 25, CFG scale: 5, Sampler: Euler a, Seed: 7, Size: 9x9"}, "Stable Diffusion web UI"),
        ({"any": "a cat\nSteps: 8, Size: 9x9, Sampler: UniPC, Guidance Scale: 1.0"}, "Stable Diffusion web UI"),
        ({"any": "a cat\nNegative prompt: dog\nSteps: 20, Size: 9x9, Seed: 7"}, "Stable Diffusion web UI"),
        ({"Software": "NovelAI", "Description": "a cat"}, "Software"),
        ({"parameters": '{"prompt": "a cat", "metadata_scheme": "fooocus"}'}, "Fooocus"),
    ],
)
def test_the_forms_that_generators_write(texts: dict[str, str], generator: str) -> None:
    assert (claimed(png_texts(texts), "PNG", "generator") or "").partition(":")[0] == generator


@pytest.mark.parametrize(
    ("software", "is_known"),
    [
        ("Adobe Firefly", True),
        ("Adobe Firefly 3.0 (Macintosh)", True),
        ("ComfyUI/0.3.10", True),
        ("InvokeAI - v5.4.2", True),
        ("DALL-E 3", True),
        ("OpenAI DALL-E", True),
        ("FLUX.1 [dev]", True),
        ("FLUX.1-schnell", True),
        ("Stable Diffusion XL 1.0", True),
        ("Stable Diffusion Web UI", True),
        ("ChatGPT-4o", True),
        ("Google Gemini", True),
        ("OpenAI API", True),
        ("OpenAI gpt-image-1", True),
        ("Google Gemini 2.5 Flash Image", True),
        ("Google Imagen 4 Ultra", True),
        ("Adobe Firefly Image 3", True),
        ("Ideogram AI", True),
        ("Midjourney Niji 6", True),
        ("Leonardo.Ai Phoenix 1.0", True),
        ("Stable Diffusion 3.5 Large", True),
        ("Stable Diffusion WebUI Forge", True),
        ("Stable Diffusion web UI - f2.0.1v1.10.1-previous", True),
        ("FLUX.1 Kontext [pro]", True),
        ("Fooocus-MRE v2.0.78.5", True),
        ("ComfyUI via SwarmUI", True),
        ("ComfyUI; v0.3", True),
        ("ComfyUI (https://github.com/comfyanonymous/ComfyUI)", True),
        ("InvokeAI Community Edition", True),
        ("Draw Things for iOS", True),
        ("Mochi Diffusion 5.2", True),
        ("Google Gemini Camera", False),
        ("ideogram viewer", False),
        ("Midjourney downloader 2", False),
        ("OpenAI office", False),
        ("Leonardo.Ai Photos", False),
        ("ChatGPT_Keyboard 1.2", False),
        ("stable diffusion prompt-reader", False),
        ("Ideograms", False),
        ("My ComfyUI", False),
        ("Adobe Photoshop 25.0 (Firefly)", False),
    ],
)
def test_a_programs_name_is_a_whole_name(software: str, is_known: bool) -> None:
    for data in (
        saved("JPEG", exif=exif_of(0x0131, software)),
        with_xmp(f'<a xmp:CreatorTool="{software}"/>'.encode()),
        with_xmp(f"<a><tiff:Software>{software}</tiff:Software></a>".encode()),
    ):
        assert (provenance(data, "JPEG") is not None) == is_known


def test_of_an_altered_manifest_nothing_is_believed(sign: Sign, jpeg: bytes) -> None:
    data = bytearray(sign(jpeg))
    data[-30] ^= 1
    found = provenance(bytes(data), "JPEG")
    assert found is not None
    assert {name for name, value in found.items() if value} == {"c2pa"}


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("parameters", "Negative prompt: "),
        ("Description", " --v 6 Job ID: "),
        ("Software", "flux.1 dev camera "),
        ("Comment", '{"sampler": "'),
        ("Dream", " -s 1"),
        ("prompt", '{"class'),
    ],
)
def test_a_text_that_only_begins_like_a_mark_takes_no_time(keyword: str, text: str) -> None:
    """A scan's threads all wait while a pattern is searched."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(keyword, text * (2**20 // len(text)), zip=True)
    Image.new("RGB", (9, 9)).save(buffer, "PNG", pnginfo=info)
    started = time.thread_time()
    assert provenance(buffer.getvalue(), "PNG") is None
    assert time.thread_time() - started < 2


@pytest.mark.parametrize(
    "xmp",
    [
        "dc:description>",
        "dc:description" + " " * 99,
        "dc:description><rdf:li ",
        'dc:description="',
        "igitalSourceType='",
        (":CreatorTool " * 12 + ">" + ("<rdf:li " + ":CreatorTool " * 12 + ">") * 4 + "<b/>"),
    ],
)
def test_xmp_that_only_begins_like_a_property_takes_no_time(xmp: str) -> None:
    packet = (xmp * (2**20 // len(xmp))).encode()
    content = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    data = b"".join([saved("PNG"), *[len(content).to_bytes(4) + b"iTXt" + content + bytes(4)] * 3])
    started = time.thread_time()
    assert provenance(data, "PNG") is None
    assert time.thread_time() - started < 2


@pytest.mark.parametrize(
    "data",
    [
        iso_metadata(b"", struct.pack(">IBBI", 2 << 24, 0, 0, 2**32 - 1) + bytes(2**22)),
        iso_metadata(bytes(2**22), places([(0, 2**22)] * 65535)),
        iso_metadata(b"", bytes(8), b"none" * 2**18),
        iso_metadata(bytes(3), places([(0, 3), (2**31, 2**31)])),
        iso_metadata(b"", b""),
    ],
    ids=["items without places", "places that overlap", "items", "out of the file", "none"],
)
def test_metadata_of_an_avif_that_lie_about_places_take_no_time(data: bytes) -> None:
    started = time.thread_time()
    assert provenance(data, "AVIF") is None
    assert time.thread_time() - started < 2


def test_damaged_and_many_profiles_take_no_time_and_hide_no_other_text() -> None:
    info, buffer = PngInfo(), io.BytesIO()
    for _ in range(100):
        info.add_text("Raw profile type xmp", "\n\n\n" + "00" * 2**19, zip=True)
    info.add_text("Raw profile type iptc", "\n\n\nno digits")
    info.add_text("Software", "NovelAI")
    Image.new("RGB", (9, 9)).save(buffer, "PNG", pnginfo=info)
    started = time.thread_time()
    provenance(buffer.getvalue(), "PNG")
    assert time.thread_time() - started < 2
    assert claimed(png_texts({"Raw profile type iptc": "\n\n\nno digits", "Software": "NovelAI"}), "PNG", "generator")


def test_a_damaged_profile_hides_no_other() -> None:
    damaged = {"Raw profile type exif": "\n\n\nno digits", "Raw profile type 8bim": "\n\n\n\xff"}
    data = png_texts(damaged | profile("xmp", XMP.encode()))
    assert claimed(data, "PNG", "digital_source_type") == "trainedAlgorithmicMedia"


def test_a_profile_longer_than_a_text_is_read_as_far_as_it_goes() -> None:
    text = "\n\n\n" + XMP.encode().hex() + "00" * 2**20
    data = png_texts({"Raw profile type xmp": text}, packed=True)
    assert claimed(data, "PNG", "digital_source_type") == "trainedAlgorithmicMedia"
