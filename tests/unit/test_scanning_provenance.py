"""C2PA manifests as the real library signs them: read, told from altered ones, and shown beside a score that stays."""

import datetime as dt
import io
from collections.abc import Callable

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

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
