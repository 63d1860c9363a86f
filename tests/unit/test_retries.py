"""Calls that fail for a while are told to the user, once for all threads."""

import pytest

from patchscan.common import retries
from patchscan.common.retries import OutageError, Retries, TransientError, Waits
from patchscan.storage import open_store


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a listener is told, with every wait told that is long enough to be one."""
    monkeypatch.setattr(retries, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr(retries, "waits", Waits())
    words: list[str] = []
    retries.waits.listener = words.append
    return words


def failing(times: int) -> Retries:
    """Retries that have failed so many times, and then succeeded."""
    left = [times]

    def call() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise TransientError("503 SlowDown")
        return "done"

    made = Retries(longest_wait_s=0.01, other_side="s3://photos")
    assert made.call(call) == ("done", times + 1)
    return made


def test_a_wait_is_told_once_in_a_while_with_its_reason(told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    failing(5)
    assert told == ["waiting for s3://photos: 503 SlowDown"]
    assert capsys.readouterr().err == "patchscan: waiting for s3://photos: 503 SlowDown; 0 s so far\n"


def test_calls_that_succeed_and_short_waits_are_not_told(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(0)
    monkeypatch.setattr(retries, "TELL_AFTER_S", 60.0)
    failing(3)
    assert told == []


def test_a_call_may_be_tried_more_often_than_a_wait_can_double() -> None:
    left = iter(range(1_200))

    def call() -> str:
        if next(left, None) is not None:
            raise TransientError("503 SlowDown")
        return "done"

    assert Retries(longest_wait_s=0.0).call(call) == ("done", 1_201)


def test_a_store_out_of_reach_is_named(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_store("s3://photos/2026", endpoint_url="http://127.0.0.1:9")
    monkeypatch.setattr(store, "_retries", Retries(0.5, 0.01, other_side=store._retries.other_side))  # type: ignore[attr-defined]
    with pytest.raises(OutageError):
        store.read("history/1")
    assert told == ["waiting for s3://photos/2026: EndpointConnectionError (are its address and region right?)"]
