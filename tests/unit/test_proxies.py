"""Loopback is reached without the proxy that the environment names."""

import os
from urllib.request import getproxies, proxy_bypass

import pytest

from patchscan.common.proxies import bypass_for_loopback, is_loopback


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


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8081", True),
        ("http://[::1]:8081/x", True),
        ("http://LOCALHOST", True),
        ("http://127.0.0.1.example:1", False),
        ("http://user:127.0.0.1@b.example", False),
        ("http://[::1", False),
        ("127.0.0.1:8081", False),
    ],
)
def test_what_is_on_this_machine(url: str, here: bool) -> None:
    assert is_loopback(url) is here


def test_a_star_among_others_does_not_hide_loopback(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NO_PROXY", "*,minio.example")
    bypass_for_loopback()
    assert proxy_bypass("127.0.0.1")


def test_every_host_stays_every_host(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NO_PROXY", "*")
    bypass_for_loopback()
    assert os.environ["NO_PROXY"] == "*"
    assert proxy_bypass("bucket.example")
