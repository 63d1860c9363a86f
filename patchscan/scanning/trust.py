"""Read a list of certificate authorities: it decides which signers of C2PA manifests a scan calls trusted."""

import hashlib
import ssl
from typing import Any

from patchscan.common.errors import UserError
from patchscan.storage import read_url

# The list is part of the plan, which each worker reads. C2PA's own lists take some 100 KB.
MAX_BYTES = 2**22


class TrustError(UserError):
    """A list of trusted authorities that cannot be used."""


def read_trust(url: str, endpoint_url: str | None = None) -> str:
    """Return the PEM text of `--c2pa-trust`, a file or s3:// URL with certificates of authorities.

    Raises TrustError, StoreError.
    """
    data = read_url(url, endpoint_url)
    if data is None:
        raise TrustError(f"there is no file {url}")
    if len(data) > MAX_BYTES:
        raise TrustError(f"{url} has {len(data):,} bytes; a list of authorities may have {MAX_BYTES:,}")
    try:
        pem = data.decode("utf-8")
        if "PRIVATE KEY" in pem:
            raise TrustError(f"{url} holds a private key; give a file with the authorities' certificates alone")
        certificates, authorities = _count(pem)
    except (ValueError, ssl.SSLError) as error:
        raise TrustError(f"{url} is not a list of certificates in PEM: {error}") from error
    if certificates != authorities:
        raise TrustError(
            f"{url}: {certificates - authorities} of {certificates} certificates are no authority's; "
            "give those of the authorities that issue the signers' certificates"
        )
    return pem


def trust_digest(pem: str | None) -> str | None:
    """The SHA-256 of a list, in hexadecimal: that of the file it was read from. None of no list."""
    return hashlib.sha256(pem.encode()).hexdigest() if pem else None


def describe_trust(pem: str) -> dict[str, Any]:
    """What a report says of a list that `read_trust` returned: its `sha256` and the number of `authorities`."""
    return {"sha256": trust_digest(pem), "authorities": _count(pem)[1]}


def _count(pem: str) -> tuple[int, int]:
    """The certificates of a PEM text, and how many of them are authorities'. Raises ssl.SSLError, and ValueError where
    the text is empty."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # used to read certificates only; its store is empty at first
    context.load_verify_locations(cadata=pem.encode("ascii", "replace").decode())  # comments may be in any language
    counts = context.cert_store_stats()
    return counts["x509"], counts["x509_ca"]
