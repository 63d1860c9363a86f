"""Read the tokens that predictions require: the server checks them, its clients send them."""

import json
from pathlib import Path

from patchscan.common.errors import UserError


def read_tokens(path: Path) -> list[bytes]:
    """Return the inference tokens in a file: TorchServe's key_file.json, or plain text with tokens separated by white
    space. Raises UserError where it cannot be read or holds none."""
    try:
        text = path.read_text().strip()
        found = [json.loads(text)["inference"]["key"]] if text.startswith("{") else text.split()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the token file {path} cannot be read ({type(error).__name__})") from error
    if not found:
        raise UserError(f"the token file {path} is empty")
    return [token.encode() for token in found]
