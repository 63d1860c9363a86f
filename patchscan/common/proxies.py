"""Requests to this machine itself use no proxy, whatever HTTP_PROXY says."""

import os

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bypass_for_loopback() -> None:
    """Name loopback in no_proxy, for every HTTP client of this process and its children: httpx, boto3, urllib.

    A proxy would be asked for TorchServe or the embedded S3 server on its own loopback, where nothing answers.
    """
    hosts = [host.strip() for host in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",")]
    if "*" not in hosts:  # which means every host, where it stands alone
        named = [host for host in hosts if host]
        # Both spellings: libraries differ in which they read first.
        joined = ",".join([*named, *(host for host in LOOPBACK if host not in named)])
        os.environ.update(no_proxy=joined, NO_PROXY=joined)
