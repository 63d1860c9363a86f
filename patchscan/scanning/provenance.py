"""Read what a file says about its own origin: C2PA manifest, IPTC digital source type, text written by generators.

It never changes a score: such marks are easily removed, and easily forged where they are not signed.
"""

import io
import json
import re
from typing import Any

import pyarrow as pa
from PIL import Image

try:
    import c2pa
except ImportError:  # a manifest is then reported as `unreadable`
    c2pa = None

TYPE = pa.struct(
    [
        ("c2pa", pa.string()),
        ("c2pa_generator", pa.string()),
        ("digital_source_type", pa.string()),
        ("generator", pa.string()),
    ]
)
Provenance = dict[str, str | None]

# The vocabulary: https://cv.iptc.org/newscodes/digitalsourcetype
SOURCE_TYPE = re.compile(rb"cv\.iptc\.org/newscodes/digitalsourcetype/([A-Za-z]{3,60})")
CREATOR_TOOL = re.compile(rb'xmp:CreatorTool(?:="|>)([^"<]{1,120})')
# Names of PNG text chunks, and the tools that write them.
TEXT_CHUNKS = {
    "parameters": "Stable Diffusion web UI",
    "prompt": "ComfyUI",
    "workflow": "ComfyUI",
    "sd-metadata": "InvokeAI",
    "invokeai_metadata": "InvokeAI",
    "Dream": "InvokeAI",
}
# Words in FREE_TEXTS that only generators write.
GENERATORS = re.compile(
    r"stable diffusion|midjourney|dall.?e|openai|novelai|firefly|imagen|comfyui|invokeai|flux\.1|ideogram|leonardo\.ai"
    r"|bing image creator|gemini|grok|negative prompt:|Sampler: ",
    re.IGNORECASE,
)
EXIF_TEXTS = {270: "ImageDescription", 305: "Software", 315: "Artist"}
FREE_TEXTS = {*EXIF_TEXTS.values(), "UserComment", "CreatorTool", "Description", "Comment", "Title", "Source"}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
MAX_TEXT = 120
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}


def provenance(data: bytes, image_format: str) -> Provenance | None:
    """Return what an encoded image of this format (as named by detector.images) claims; None where it claims nothing.

    `c2pa`: the state of its manifest (`Valid`, `Trusted`, `Invalid`, `unreadable`), `c2pa_generator`: the tool that
    the manifest names, `digital_source_type`: the IPTC term in manifest or XMP, `generator`: a generator's own text.
    """
    found = _manifest(data, image_format)
    if found["digital_source_type"] is None and (match := SOURCE_TYPE.search(data)):
        found["digital_source_type"] = match[1].decode()
    found["generator"] = _generator(data)
    return found if any(found.values()) else None


def _manifest(data: bytes, image_format: str) -> Provenance:
    nothing: Provenance = dict.fromkeys(("c2pa", "c2pa_generator", "digital_source_type"))
    if b"c2pa" not in data or b"jumb" not in data:
        return nothing
    if c2pa is None:
        return nothing | {"c2pa": "unreadable"}
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(OFFLINE))
        mime = "image/jpeg" if image_format == "MPO" else f"image/{image_format.lower()}"
        with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
            state, store = str(reader.get_validation_state()), json.loads(reader.json())
    except c2pa.C2paError:
        return nothing | {"c2pa": "unreadable"}
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})
    info = active.get("claim_generator_info") or [{}]
    source_type = SOURCE_TYPE.search(json.dumps(active).encode())
    return {
        "c2pa": state,
        "c2pa_generator": info[0].get("name") or active.get("claim_generator"),
        "digital_source_type": source_type[1].decode() if source_type else None,
    }


def _generator(data: bytes) -> str | None:
    """Find a generator's text in text chunks, EXIF or XMP, cut to MAX_TEXT characters."""
    texts: dict[str, Any] = {}
    try:
        with Image.open(io.BytesIO(data)) as image:
            texts = {str(name): value for name, value in image.info.items() if isinstance(value, str | bytes)}
            exif = image.getexif()
            texts |= {name: exif.get(tag) for tag, name in EXIF_TEXTS.items()}
            texts["UserComment"] = exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError):
        pass  # damaged metadata claims nothing
    if match := CREATOR_TOOL.search(data):
        texts["CreatorTool"] = match[1]
    for name, value in texts.items():
        text = _text(value)
        if name in TEXT_CHUNKS and text:
            return f"{TEXT_CHUNKS[name]}: {text[:MAX_TEXT]}"
        if name in FREE_TEXTS and GENERATORS.search(text):
            return f"{name}: {text[:MAX_TEXT]}"
    return None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        encoding = "utf-16-be" if value.startswith(b"UNICODE\0") else "utf-8"
        value = value.removeprefix(b"UNICODE\0").removeprefix(b"ASCII\0\0\0").decode(encoding, "replace")
    return " ".join(str(value or "").replace("\0", " ").split())
