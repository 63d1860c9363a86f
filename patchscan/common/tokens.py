"""Read the tokens that predictions require: the server checks them, its clients send them."""

import json
from pathlib import Path

from patchscan.common.errors import UserError

# What JSON begins with, and its words. A token like them would be a mistake too; one of digits alone need not be.
JSON_STARTS = ("{", "[", '"')
JSON_WORDS = ("null", "true", "false")
# UTF-8, with the mark before it that editors on Windows write or without.
ENCODING = "utf-8-sig"


def read_tokens(path: Path) -> list[bytes]:
    """Return the inference tokens in a file: TorchServe's key_file.json, or plain text with a token in each line.
    Raises UserError where it cannot be read or holds none, or a line holds several words, of which each would be one:
    a comment, for instance."""
    try:
        text = path.read_text(ENCODING).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"the token file {path} cannot be read ({type(error).__name__})") from error
    if text.startswith(JSON_STARTS) or text in JSON_WORDS:
        try:
            return [read_key(path, "inference").encode()]
        except UserError as error:
            raise UserError(f"the token file {path} is neither text nor TorchServe's key_file.json") from error
    if not text:
        raise UserError(f"the token file {path} is empty")
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if any(len(token.split()) > 1 for token in tokens):
        raise UserError(
            f"the token file {path} has a line with white space in it: it takes one token a line, no comments"
        )
    return [token.encode() for token in tokens]


def read_key(path: Path, kind: str) -> str:
    """Return the key of an API, `inference` or `management`, in TorchServe's key_file.json. Raises UserError where it
    cannot be read or holds none."""
    try:
        key = json.loads(path.read_text(ENCODING))[kind]["key"]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__})") from error
    except (LookupError, TypeError):
        key = None
    if not isinstance(key, str) or not key:
        raise UserError(f"cannot read {path}: it holds no {kind} key")
    return key
