"""Read the C2PA manifest of an image in a child process: the library's time grows with the square of a manifest's
assertions, and hostile files are none of the scan's own process's business."""

import io
import json
import re
from functools import partial
from typing import Any

import c2pa

from patchscan.detector.decoders import decoder_pool
from patchscan.detector.images import ImageError, Limits

# A term of https://cv.iptc.org/newscodes/digitalsourcetype, in a manifest's JSON and as a property in XMP.
TERM = r"https?://cv\.iptc\.org/newscodes/digitalsourcetype/([A-Za-z]{3,60})"
MANIFEST_TERM = re.compile(rf'"digitalSourceType": "{TERM}"')
MAX_NAME = 300  # of a tool or a signer: a file may hold megabytes, and all rows of a shard are in memory
# Most manifests take milliseconds.
TIME_S = 20.0
# The library holds a file several times.
MEMORY_PER_BYTE = 8
MAX_PARENTS = 16
# All that decides about a manifest, whatever the library's defaults are. Nothing is fetched: no manifest that is kept
# elsewhere, no revocation, no identity of a CAWG assertion.
VERIFY = {
    "verify": {
        "verify_after_reading": True,
        "verify_trust": True,
        "verify_timestamp_trust": True,
        "remote_manifest_fetch": False,
        "ocsp_fetch": False,
    },
    "core": {"decode_identity_assertions": False, "allowed_network_hosts": []},
}
LISTED_TIME, UNLISTED_SIGNER = "timeStamp.trusted", "signingCredential.untrusted"
Manifest = dict[str, str | None]


def manifest(data: bytes, image_format: str, trust: str | None) -> Manifest:
    """Return what `provenance` says of an image's manifest; nothing where it has none, as where a caption speaks of
    one."""
    if b"c2pa" not in data or b"jumb" not in data:
        return {}
    work = partial(_read, image_format, trust)
    try:
        found: Manifest = decoder_pool().run(work, data, time_s=TIME_S, memory=MEMORY_PER_BYTE * len(data))
    except ImageError:  # the child died
        return {"c2pa": "unreadable"}
    return found


def _read(image_format: str, trust: str | None, data: bytes, limits: Limits) -> Manifest:
    try:
        listed = {"trust": {"trust_anchors": trust}} if trust else {}
        context = c2pa.Context(c2pa.Settings.from_dict(VERIFY | listed))
        mime = "image/jpeg" if image_format == "MPO" else f"image/{image_format.lower()}"
        with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
            state, store = str(reader.get_validation_state()), json.loads(reader.json())
    except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
        return {}
    except c2pa.C2paError:
        return {"c2pa": "unreadable"}
    if state not in ("Valid", "Trusted"):  # anybody may have written it
        return {"c2pa": state}
    manifests = store.get("manifests", {})
    active = manifests.get(store.get("active_manifest"), {})
    info = active.get("claim_generator_info") or [{}]
    signature = active.get("signature_info") or {}
    # Anybody can make a time stamp: beside a signer of the list it stands only where its authority is of the list too.
    passed = store.get("validation_results", {}).get("activeManifest", {}).get("success", [])
    is_known = state == "Valid" or any(check.get("code") == LISTED_TIME for check in passed)
    generator = info[0].get("name") or active.get("claim_generator") or ""
    signer = ", ".join(filter(None, (signature.get("common_name"), signature.get("issuer"))))
    return {
        "c2pa": state,
        "c2pa_generator": generator[:MAX_NAME] or None,
        "c2pa_signer": signer[:MAX_NAME] or None,
        "c2pa_time": signature.get("time") if is_known else None,
        "digital_source_type": _source_type(manifests, active),
    }


def _source_type(manifests: dict[str, Any], active: dict[str, Any]) -> str | None:
    """The first term in a manifest, else in that of the picture that its picture was made from, and so on: a program
    that only converts a picture leaves it to the first one."""
    for _ in range(MAX_PARENTS):
        term = MANIFEST_TERM.search(json.dumps(active.get("assertions", [])))
        if term:
            return term[1]
        parents = [one for one in active.get("ingredients") or [] if one.get("relationship") == "parentOf"]
        if len(parents) != 1 or not _is_intact(parents[0]):
            return None
        active = manifests.get(parents[0].get("active_manifest"), {})
    return None


def _is_intact(ingredient: dict[str, Any]) -> bool:
    """Whether the signer found nothing wrong with an ingredient but that its own signer is unknown."""
    results = ingredient.get("validation_results", {}).get("activeManifest", {})
    checks = [*(ingredient.get("validation_status") or []), *(results.get("failure") or [])]
    return all(check.get("code") == UNLISTED_SIGNER for check in checks)
