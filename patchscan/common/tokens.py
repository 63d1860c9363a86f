"""The tokens that a prediction needs, as the server checks them and its clients send them."""

import json
from pathlib import Path

from patchscan.common.errors import UserError


def read_tokens(path: Path) -> list[bytes]:
    """The inference tokens that a file holds. Raises UserError where it cannot be read or holds none."""
    try:
        text = path.read_text().strip()
        found = [json.loads(text)["inference"]["key"]] if text.startswith("{") else text.split()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the token file {path} cannot be read ({type(error).__name__})") from error
    if not found:
        raise UserError(f"the token file {path} is empty")
    return [token.encode() for token in found]
