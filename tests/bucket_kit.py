"""What the tests of buckets share: keys that are hard to send, and a stub in the place of the store."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import pytest

UNUSUAL_KEYS = [
    "plain.png",
    "with space+plus%25percent%.png",
    "ünïcødé/日本/🙂.png",
    "../up.png",
    "a/../b.png",
    "a//b.png",
    "./dot.png",
    "q?x=1#f&g.png",
    "x" * 1020 + ".png",
]


@contextmanager
def served(stub: ThreadingHTTPServer, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a stub for boto3, whose credentials and region are made up."""
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)
    patch.setenv("NO_PROXY", "127.0.0.1")
    with stub:
        threading.Thread(target=stub.serve_forever, args=(0.02,), daemon=True).start()
        yield
        stub.shutdown()
