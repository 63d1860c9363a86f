"""C2PA manifests as the real library signs them: read, told from altered ones, and shown beside a score that stays."""

import datetime as dt
import io
import time
from collections.abc import Callable
from typing import Any

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchscan.scanning.provenance import provenance
from tests.scan_kit import StubScorer, image

Sign = Callable[[bytes], bytes]


def certificate(subject: str, of: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate in PEM, issued by the authority `by`; of its own key it is the authority's."""
    authority, now = of == by.public_key(), dt.datetime.now(dt.UTC)
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"], False
    )
    usage |= {"decipher_only": False, "crl_sign": authority, "key_cert_sign": authority}
    named = [
        x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        for name in (subject, "authority")
    ]
    made = (
        x509.CertificateBuilder(issuer_name=named[1], subject_name=named[0], public_key=of)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(of), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        .add_extension(x509.KeyUsage(digital_signature=not authority, **usage), critical=True)
    )
    if not authority:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def sign() -> Sign:
    """Puts a signed manifest into a JPEG: made by a generator, named `Picture Maker`."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = certificate("signer", key.public_key(), authority)
    chain += certificate("authority", authority.public_key(), authority)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(alg=b"es256", sign_cert=chain, private_key=private, ta_url=None))
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    created = {"label": "c2pa.actions", "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": source}]}}
    manifest = {"claim_generator_info": [{"name": "Picture Maker", "version": "1"}], "assertions": [created]}

    def signed(jpeg: bytes) -> bytes:
        out = io.BytesIO()
        c2pa.Builder(manifest).sign(signer, "image/jpeg", io.BytesIO(jpeg), out)
        return out.getvalue()

    return signed


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


def test_pixels_altered_after_signing_make_it_invalid(sign: Sign, jpeg: bytes) -> None:
    data = bytearray(sign(jpeg))
    data[-30] ^= 1
    found = provenance(bytes(data), "JPEG")
    assert found is not None
    assert found["c2pa"] == "Invalid"


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


def claimed(data: bytes, kind: str, field: str) -> str | None:
    found = provenance(data, kind)
    return found[field] if found else None


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
    "TIFF": lambda: (saved("TIFF", tiffinfo={0x010E: PARAMETERS.replace("ü", "u")}), "TIFF"),
}


@pytest.mark.parametrize("place", IN_EVERY_PLACE)
def test_parameters_are_found_in_every_place_and_encoding(place: str) -> None:
    found = claimed(*IN_EVERY_PLACE[place](), "generator")
    assert found
    assert found.replace("fur", "für") == FOUND


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (with_xmp(XMP.encode()), "JPEG"),
        (with_xmp(XMP.encode("utf-16-le")), "JPEG"),
        (with_xmp(XMP.encode("utf-16-be")), "JPEG"),
        (with_xmp(XMP.replace(f'="{TERM}"', f"><b>{TERM}").replace("<b>", "").encode()), "JPEG"),
        (with_xmp(XMP.replace('Type="', "Type rdf:resource='").encode()), "JPEG"),
        (saved("WEBP", xmp=XMP.encode()), "WEBP"),
        (png_texts({"XML:com.adobe.xmp": XMP}, packed=True), "PNG"),
        (png_texts({"XML:com.adobe.xmp": XMP}, packed=True, late=True), "PNG"),
    ],
)
def test_a_source_type_is_found_however_xmp_is_stored(data: bytes, kind: str) -> None:
    assert claimed(data, kind, "digital_source_type") == "trainedAlgorithmicMedia"


CAPTIONS = [
    "Imagen de la playa",
    "Gemini and Orion over the lake",
    "Painted after Midjourney and DALL-E had left; Sampler: my sister, Steps: many",
    "A flux.1 capacitor, stable diffusion of gases, openai office, leonardo.ai",
    f"see {TERM}",
    "negative prompt: none",
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
    ("texts", "generator"),
    [
        ({"prompt": '{"3": {"class_type": "KSampler"}}'}, "ComfyUI"),
        ({"workflow": '{"last_node_id": 9, "nodes": []}'}, "ComfyUI"),
        ({"invokeai_metadata": '{"positive_prompt": "a cat"}'}, "InvokeAI"),
        ({"Dream": '"a cat" -s 50 -S 42 -W 512 -H 512 -C 7.5 -A k_lms'}, "InvokeAI"),
        ({"Description": "a cat --v 6 Job ID: 01234567-89ab-cdef-0123-456789abcdef"}, "Midjourney"),
        ({"Software": "NovelAI", "Description": "a cat"}, "Software"),
        ({"parameters": '{"prompt": "a cat", "metadata_scheme": "fooocus"}'}, "Fooocus"),
    ],
)
def test_the_forms_that_generators_write(texts: dict[str, str], generator: str) -> None:
    assert (claimed(png_texts(texts), "PNG", "generator") or "").partition(":")[0] == generator


def test_of_an_altered_manifest_nothing_is_believed(sign: Sign, jpeg: bytes) -> None:
    data = bytearray(sign(jpeg))
    data[-30] ^= 1
    found = provenance(bytes(data), "JPEG")
    assert found is not None
    assert {name for name, value in found.items() if value} == {"c2pa"}


@pytest.mark.parametrize(
    ("keyword", "text"),
    [("parameters", "Negative prompt: "), ("Comment", '{"sampler": "'), ("Dream", " -s 1"), ("prompt", '{"class')],
)
def test_a_text_that_only_begins_like_a_mark_takes_no_time(keyword: str, text: str) -> None:
    """A scan's threads all wait while a pattern is searched."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(keyword, text * (2**20 // len(text)), zip=True)
    Image.new("RGB", (9, 9)).save(buffer, "PNG", pnginfo=info)
    started = time.thread_time()
    assert provenance(buffer.getvalue(), "PNG") is None
    assert time.thread_time() - started < 2
