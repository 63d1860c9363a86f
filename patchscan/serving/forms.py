"""Take the one file out of a form (multipart/form-data, RFC 7578), as browsers and `curl -F` send it."""

from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any

from patchscan.serving.requests import RequestError

MAX_PARTS = 100
# Of a part's header, and of the form's own. Python takes a time that grows with the square of a header's length, and
# none that numbers its parameters (RFC 2231) with more than 4,300 digits.
MAX_HEADER = 4096


@dataclass(frozen=True)
class _Part:
    headers: Message
    body: bytes

    @property
    def is_file(self) -> bool:
        return self._file_name is not None

    @property
    def is_left_empty(self) -> bool:
        """Whether it is what a browser sends for an input whose file nobody has chosen."""
        return self._file_name == "" and not self.body

    @property
    def _file_name(self) -> Any:
        """None where there is none. Not decoded, as `get_filename` does: a name may say that it is in any charset, and
        in some Python raises what it likes."""
        of_content = self.headers.get_param("name")
        return self.headers.get_param("filename", of_content, "Content-Disposition")

    def encoding(self, header: str) -> str:
        """The value of a header that names an encoding, in lower case; empty where there is none."""
        return str(self.headers.get(header, "")).strip().lower()


def file_of_form(content_type: str, body: bytes) -> bytes:
    """Return the form's file, or where it has none its only field. An input for a file that was left empty counts as
    none. Raises RequestError."""
    parts = [part for part in _parts(content_type, body) if not part.is_left_empty]
    files = [part for part in parts if part.is_file]
    if len(files or parts) != 1:
        found = f"{len(files)} files" if files else f"{len(parts)} fields and no file"
        raise RequestError(f"the form holds {found}: send one file, or many images as a tar or zip")
    (part,) = files or parts
    encodings = {part.encoding("Content-Encoding"), part.encoding("Content-Transfer-Encoding")}
    if encodings - {"", "identity", "binary", "8bit", "7bit"}:
        raise RequestError("the form's file is encoded: send its bytes as they are")
    return part.body


def _parts(content_type: str, body: bytes) -> list[_Part]:
    if len(content_type) > MAX_HEADER:
        raise RequestError("the form's Content-Type is too long")
    header = Message()
    # Bytes that are not UTF-8 are half characters in it, which Python's parser cannot take beside others.
    header["Content-Type"] = content_type.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    boundary = header.get_param("boundary")
    boundary = boundary.rstrip() if isinstance(boundary, str) else None  # one in a charset of its own is none
    if not boundary:
        raise RequestError("the form's Content-Type has no boundary")
    # The line break before a boundary belongs to it; the first one may begin the body.
    delimiter = b"\r\n--" + boundary.encode("utf-8", "surrogateescape")
    _, *pieces = (b"\r\n" + body).split(delimiter, MAX_PARTS + 1)
    ends = [number for number, piece in enumerate(pieces) if piece.startswith(b"--")]
    if not ends:
        raise RequestError(f"the form is cut short, or has more than {MAX_PARTS} fields")
    return [_part(piece) for piece in pieces[: ends[0]]]


def _part(piece: bytes) -> _Part:
    space, line_break, rest = piece.partition(b"\r\n")
    head, separator, content = (line_break + rest).partition(b"\r\n\r\n")
    if space.strip() or not separator:
        raise RequestError("the form is damaged")
    if len(head) > MAX_HEADER:
        raise RequestError(f"the header of one of the form's fields has more than {MAX_HEADER:,} bytes")
    return _Part(BytesHeaderParser().parsebytes(head.removeprefix(b"\r\n")), content)
