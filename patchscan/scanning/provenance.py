"""Read what a file says about its own origin: C2PA manifest, IPTC digital source type, text written by generators.

It never changes a score: such marks are easily removed, and easily forged where they are not signed.
"""

import re
from dataclasses import dataclass

import pyarrow as pa

from patchscan.scanning.c2pa_manifest import TERM, manifest
from patchscan.scanning.file_texts import texts_and_xmp
from patchscan.scanning.xmp import XmpProperty

TYPE = pa.struct(
    [
        ("c2pa", pa.string()),
        ("c2pa_generator", pa.string()),
        ("c2pa_signer", pa.string()),
        ("c2pa_time", pa.string()),
        ("digital_source_type", pa.string()),
        ("generator", pa.string()),
    ]
)
Provenance = dict[str, str | None]

XMP_TERM = XmpProperty("igitalSourceType", TERM)
MAX_TEXT = 120
# A program's name that begins a field that names programs, unless what follows makes it a product of another kind.
OTHER_PRODUCTS = (
    "album browser cam camera checker converter detector dictionary display downloader drone exporter font gallery "
    "inspector keyboard laptop lens monitor office organizer phone photos player printer reader recorder remover "
    "scanner screenshot slideshow smartphone tablet tagger uploader viewer wallpaper watch"
)
PROGRAMS = (
    r"^(?i:adobe firefly|bing image creator|chatgpt|comfyui|dall\W?e|draw things|flux\.1|fooocus|google gemini"
    r"|google imagen|ideogram|invokeai|leonardo\.ai|midjourney|mochi diffusion|novelai|openai|stable diffusion)"
    r"(?![^\W_])"
    rf"(?!.{{0,{MAX_TEXT}}}(?<![^\W_])(?i:{'|'.join(OTHER_PRODUCTS.split())})s?(?![^\W_]))"
)


@dataclass(frozen=True)
class Mark:
    """What one generator writes: into fields of these names (None: any), in these forms, one after the other.
    `generator` None: the field's name stands for it, since the text itself names the program. `beside`: a field that
    the file must have too."""

    generator: str | None
    fields: frozenset[str] | None
    forms: tuple[re.Pattern[str], ...]
    beside: str | None = None

    def is_in(self, name: str, text: str) -> bool:
        """Whether a field has this mark. Each form is searched once: in one pattern, joined by `.*`, they would take a
        time that grows with the square of the text's length, and hold every thread meanwhile."""
        if self.fields is not None and name not in self.fields:
            return False
        place = 0
        for form in self.forms:
            found = form.search(text, place)
            if found is None:
                return False
            place = found.end()
        return True


def _mark(generator: str | None, fields: str, *forms: str, beside: str | None = None) -> Mark:
    patterns = tuple(re.compile(form, re.DOTALL) for form in forms)
    return Mark(generator, frozenset(fields.split()) or None, patterns, beside)


SEED = r"\b(?:Seed|(?i:(?:CFG|guidance) scale)): \d"
JOB = r"\bJob ID: [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
COMFY = '"(?:class_type|last_node_id|lastNodeId)"'  # other programs' workflows have nodes too
# A caption may name a generator, or speak of steps: only the fields and forms of the programs themselves count.
MARKS = (
    _mark("Stable Diffusion web UI", "", r"\bSteps: \d+, ", r"\bSampler: \S", SEED),
    _mark("Stable Diffusion web UI", "", r"\bNegative prompt: ", r"\bSteps: \d+, ", SEED),
    _mark("Stable Diffusion web UI", "parameters", r"\bSteps: \d+, ", r"\b(?:Sampler|Model|Model hash|Size): \S"),
    _mark("Stable Diffusion web UI", "parameters", r"\bSteps: \d+, ", SEED),
    _mark("ComfyUI", "prompt workflow", r"^\{", COMFY),
    _mark("ComfyUI", "Make Model ImageDescription", r"^(?i:prompt|workflow): ?\{", COMFY),
    _mark("SwarmUI", "parameters UserComment", r"^\{", '"sui_image_params"'),
    _mark("InvokeAI", "sd-metadata invokeai_metadata invokeai_graph", r"^\{"),
    _mark("InvokeAI", "Dream", r"\s-s ?\d+\b", r"\s-S ?\d+"),
    _mark("Fooocus", "fooocus_scheme", r"^(?:fooocus|a1111)$"),
    _mark("Fooocus", "parameters UserComment", r"^\{", '"metadata_scheme": ?"fooocus"'),
    _mark("NovelAI", "Comment", r"^\{", r'"sampler": ?"', r'"uc": ?"'),
    _mark("Midjourney", "Description ImageDescription", r"\s(?:--|\u2014)[a-z]", JOB),
    _mark("Midjourney", "Description", JOB, beside="Author"),
    _mark("Grok", "ImageDescription UserComment", r"^Signature: [A-Za-z0-9+/=]{40,}$"),
    _mark(None, "Software CreatorTool", PROGRAMS),
    _mark(None, "Credit", r"^Made with Google AI$"),
)


def provenance(data: bytes, image_format: str, trust: str | None = None) -> Provenance | None:
    """Return what an encoded image of this format (as named by detector.images) claims; None where it claims nothing.

    `trust` is the PEM text of the authorities that are trusted (trust.read_trust), of signers and of time stamps; None:
    no signer is.

    `c2pa`: the state of its manifest: `Trusted` (unaltered, the signer's certificate was issued by a listed authority),
    `Valid` (unaltered, signed by somebody), `Invalid` (altered, or the certificate has expired and no listed authority
    says that it was valid at the time of signing) or `unreadable`. Only of the first two, `c2pa_generator` is the tool
    that the manifest names, `c2pa_signer` the name in the signer's certificate and `c2pa_time` when a time stamp says
    that it was signed; of a `Trusted` one only where the time stamp's authority is listed too.
    `digital_source_type`: the IPTC term in such a manifest, or in that of the picture it was made from, else in XMP;
    `generator`: a generator's own text.
    """
    texts, xmp = texts_and_xmp(data, image_format)
    found: Provenance = dict.fromkeys(field.name for field in TYPE)
    found.update(manifest(data, image_format, trust))
    if found["digital_source_type"] is None:
        found["digital_source_type"] = XMP_TERM.find(xmp)
    found["generator"] = _generator(texts)
    return found if any(found.values()) else None


def _generator(texts: list[tuple[str, str]]) -> str | None:
    """Find a generator's mark among names and texts; the text is cut to MAX_TEXT characters."""
    names = {None, *(name for name, _ in texts)}
    for mark in MARKS:
        for name, text in texts:
            if mark.beside in names and mark.is_in(name, text):
                return f"{mark.generator or name}: {text[:MAX_TEXT]}"
    return None
