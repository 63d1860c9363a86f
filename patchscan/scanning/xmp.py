"""Find properties in XMP by their names, in any of the forms in which they are written, damaged ones too: without a
reader of XML."""

import html
import re

# A reference to no character. Python would make a number of it, and raises ValueError from 4,301 digits on.
NO_CHARACTER = re.compile(r"&#\d{8,}+;?")


class XmpProperty:
    """A property of XMP, by the end of its name: an attribute, an element, or within elements of RDF in one. `value` is
    the pattern of the beginning of its value, with one group (by default its text)."""

    def __init__(self, name: str, value: str = ""):
        # `+`: what is matched is not given back. So the most XMP that is read, 4 MiB, takes a second at the worst.
        space, inside, longest = r"\s{0,99}+", r"(?:\s[^<>]{0,200}+)?+", "{1,65000}+"
        attribute = rf"(?:\s{{1,99}}+rdf:resource)?{space}={space}"
        element = rf"{inside}>{space}(?:<rdf:\w{{1,20}}+{inside}>{space}){{0,4}}+"
        forms = ((rf'{attribute}"{space}', '"<'), (rf"{attribute}'{space}", "'<"), (element, "<"))
        texts = (start + (value or f"([^{end}]{longest})") for start, end in forms)
        self._pattern = re.compile(f"{name}(?:{'|'.join(texts)})".encode())

    def find(self, packet: bytes) -> str | None:
        """Return its value in UTF-8 bytes that hold XMP, or None."""
        match = self._pattern.search(packet)
        return match[match.lastindex or 0].decode(errors="replace") if match else None


# Properties that generators and programs write into, named as the same texts elsewhere.
TEXTS = {
    "CreatorTool": XmpProperty(":CreatorTool"),
    "Credit": XmpProperty("photoshop:Credit"),
    "Description": XmpProperty("dc:description"),
    "UserComment": XmpProperty("exif:UserComment"),
    "Software": XmpProperty("tiff:Software"),
    "ImageDescription": XmpProperty("tiff:ImageDescription"),
}


def texts(packet: bytes) -> list[tuple[str, str]]:
    """Return names and values of the TEXTS that UTF-8 bytes of XMP hold, references as the characters that they are."""
    found = ((name, one.find(packet)) for name, one in TEXTS.items())
    return [(name, html.unescape(NO_CHARACTER.sub("\ufffd", value))) for name, value in found if value]
