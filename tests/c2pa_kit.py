"""Certificate chains, time stamps and C2PA manifests, made on the spot and signed by the real library."""

import datetime as dt
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.UTC)
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CAPTURED = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"


@dataclass(frozen=True)
class Identity:
    """A certificate with its private key, and the PEM of the chain from it to its authority."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: str

    @property
    def pem(self) -> str:
        """The certificate alone."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests"), x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    )


def identity(
    name: str,
    by: Identity | None = None,
    *,
    authority: bool = False,
    first: dt.datetime = NOW - DAY,
    last: dt.datetime = NOW + DAY,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
) -> Identity:
    """A new key with a certificate, valid from `first` to `last`, that `by` has issued; None: it is self-signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_key = by.key if by else key
    unused = dict.fromkeys(["content_commitment", "key_encipherment", "data_encipherment", "key_agreement"], False)
    unused |= dict.fromkeys(["encipher_only", "decipher_only"], False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    made = (
        x509.CertificateBuilder(
            issuer_name=by.certificate.subject if by else _name(name),
            subject_name=_name(name),
            public_key=key.public_key(),
        )
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(
            x509.KeyUsage(digital_signature=not authority, crl_sign=authority, key_cert_sign=authority, **unused),
            critical=True,
        )
    )
    if not authority:
        made = made.add_extension(x509.ExtendedKeyUsage([usage]), critical=usage == ExtendedKeyUsageOID.TIME_STAMPING)
    certificate = made.sign(issuer_key, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return Identity(certificate, key, pem + (by.chain if by else ""))


def sign(
    jpeg: bytes,
    by: Identity,
    maker: str = "Picture Maker",
    source: str | None = GENERATED,
    stamps: str | None = None,
    more: int = 0,
) -> bytes:
    """Put a manifest into a JPEG: made by `maker`, of the IPTC digital source type `source` (None: only edited), with a
    time stamp of the server `stamps`, if one is named, and so many `more` assertions."""
    private = by.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    info = c2pa.C2paSignerInfo(
        alg=b"es256", sign_cert=by.chain.encode(), private_key=private, ta_url=stamps.encode() if stamps else None
    )
    created = {"label": "c2pa.actions", "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": source}]}}
    assertions = [*([created] if source else []), *({"label": f"tests.{one}", "data": {}} for one in range(more))]
    manifest = {"claim_generator_info": [{"name": maker, "version": "1"}], "assertions": assertions}
    # Certificates that have expired sign too.
    context = c2pa.Context(c2pa.Settings.from_dict({"verify": {"verify_after_sign": False}}))
    out = io.BytesIO()
    builder = c2pa.Builder(manifest, context=context)
    if source is None:
        builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
    builder.sign(c2pa.Signer.from_info(info), "image/jpeg", io.BytesIO(jpeg), out)
    return out.getvalue()


# What DER needs for RFC 3161.
SEQUENCE, SET, INTEGER, OCTETS, OBJECT, TIME = 0x30, 0x31, 0x02, 0x04, 0x06, 0x18
SHA256 = bytes.fromhex("0609608648016503040201")
ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")
SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")
TST_INFO = bytes.fromhex("060b2a864886f70d0109100104")
CONTENT_TYPE = bytes.fromhex("06092a864886f70d010903")
MESSAGE_DIGEST = bytes.fromhex("06092a864886f70d010904")
SIGNING_CERTIFICATE = bytes.fromhex("060b2a864886f70d010910022f")
POLICY = bytes.fromhex("06042a030405")


def der(tag: int, *parts: bytes) -> bytes:
    """One value of DER."""
    content = b"".join(parts)
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([128 + (size.bit_length() + 7) // 8])
    return bytes([tag]) + length + (size.to_bytes(length[0] - 128, "big") if size >= 128 else b"") + content


def values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The values that follow each other, each as its tag and its whole DER."""
    while data:
        size, start = data[1], 2
        if size >= 128:
            start += size - 128
            size = int.from_bytes(data[2:start], "big")
        yield data[0], data[: start + size]
        data = data[start + size :]


def content(value: bytes) -> bytes:
    """The content of one value of DER."""
    return value[2 if value[1] < 128 else 2 + value[1] - 128 :]


def time_stamp(request: bytes, by: Identity, at: dt.datetime) -> bytes:
    """The answer to a request of RFC 3161, with this time."""
    asked = list(values(content(request)))
    nonce = [value for tag, value in asked[2:] if tag == INTEGER]
    when = der(TIME, f"{at:%Y%m%d%H%M%SZ}".encode())
    version, serial = der(INTEGER, b"\1"), der(INTEGER, b"\7")
    info = der(SEQUENCE, version, POLICY, asked[1][1], serial, when, *nonce)
    certificate = by.certificate.public_bytes(serialization.Encoding.DER)
    digest = der(SEQUENCE, SHA256)
    named = der(SEQUENCE, der(SEQUENCE, der(SEQUENCE, der(OCTETS, hashlib.sha256(certificate).digest()))))
    attributes = sorted(
        [
            der(SEQUENCE, CONTENT_TYPE, der(SET, TST_INFO)),
            der(SEQUENCE, MESSAGE_DIGEST, der(SET, der(OCTETS, hashlib.sha256(info).digest()))),
            der(SEQUENCE, SIGNING_CERTIFICATE, der(SET, named)),
        ]
    )
    signature = by.key.sign(der(SET, *attributes), ec.ECDSA(hashes.SHA256()))
    number = by.certificate.serial_number
    issuer = der(
        SEQUENCE,
        by.certificate.issuer.public_bytes(),
        der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big")),
    )
    signer = der(
        SEQUENCE, version, issuer, digest, der(0xA0, *attributes), der(SEQUENCE, ECDSA_SHA256), der(OCTETS, signature)
    )
    inner = der(SEQUENCE, TST_INFO, der(0xA0, der(OCTETS, info)))
    signed = der(SEQUENCE, der(INTEGER, b"\3"), der(SET, digest), inner, der(0xA0, certificate), der(SET, signer))
    return der(SEQUENCE, der(SEQUENCE, der(INTEGER, b"\0")), der(SEQUENCE, SIGNED_DATA, der(0xA0, signed)))


@contextmanager
def time_stamps(by: Identity, at: dt.datetime) -> Iterator[str]:
    """Run a server of time stamps that says it is always this time; yields its address."""

    class Stamps(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer = time_stamp(self.rfile.read(int(self.headers["Content-Length"])), by, at)
            self.send_response(200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Stamps)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
