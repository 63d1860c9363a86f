"""Keep requests to this machine itself from going through a proxy, whatever HTTP_PROXY says."""

import os
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bypass_for_loopback() -> None:
    """Name loopback in no_proxy, for every HTTP client of this process and its children: httpx, boto3, urllib.

    A proxy would be asked for TorchServe or the embedded S3 server on its own loopback, where nothing answers.
    """
    hosts = [host.strip() for host in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",")]
    named = [host for host in hosts if host]
    if named != ["*"]:  # which means every host, but for urllib only where it stands alone
        # Both spellings: libraries differ in which they read first.
        joined = ",".join([*named, *(host for host in LOOPBACK if host not in named)])
        os.environ.update(no_proxy=joined, NO_PROXY=joined)


def is_loopback(url: str) -> bool:
    """Whether a URL is on this machine. Its client needs no proxy: one of a kind that the client does not know, as
    ALL_PROXY=socks://..., would end it before its first request."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False
