"""Loopback is reached without the proxy that the environment names."""

import os
from urllib.request import getproxies, proxy_bypass

import pytest

from patchscan.common.proxies import bypass_for_loopback


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Behind a proxy, with no exception; put back afterwards."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    return monkeypatch


def test_loopback_is_added_and_nothing_else(environment: pytest.MonkeyPatch) -> None:
    bypass_for_loopback()
    assert all(proxy_bypass(host) for host in ("localhost", "127.0.0.1", "::1"))
    assert not proxy_bypass("bucket.example")
    assert getproxies()["http"] == "http://proxy.example:3128"


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_what_was_named_stays_and_nothing_is_named_twice(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.setenv(name, "minio.example, localhost")
    bypass_for_loopback()
    bypass_for_loopback()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "minio.example,localhost,127.0.0.1,::1"


def test_every_host_stays_every_host(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NO_PROXY", "*")
    bypass_for_loopback()
    assert os.environ["NO_PROXY"] == "*"
    assert proxy_bypass("bucket.example")
