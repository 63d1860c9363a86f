"""Which objects the events of a bucket name, in every form in which they come; scans of named objects alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from patchscan.scanning.bucket_events import EventError, EventReader, named_objects
from patchscan.scanning.plan import ScanSource
from patchscan.storage.queue import Queue

KEY = "2026/with space+plus%25/日本.png"
ENCODED = "2026/with+space%2Bplus%2525/%E6%97%A5%E6%9C%AC.png"
RECORD = {
    "eventSource": "aws:s3",
    "eventName": "ObjectCreated:Put",
    "s3": {"bucket": {"name": "photos"}, "object": {"key": ENCODED, "size": 1, "eTag": "e", "sequencer": "00"}},
}
NOTIFICATION = {"Records": [RECORD]}
EVENT_BRIDGE = {
    "source": "aws.s3",
    "detail-type": "Object Created",
    "detail": {"bucket": {"name": "photos"}, "object": {"key": KEY, "size": 1}, "reason": "PutObject"},
}


def sns(message: object) -> dict[str, Any]:
    return {"Type": "Notification", "MessageId": "1", "Message": json.dumps(message), "Signature": "none"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (KEY, [(None, KEY)]),
        ("a.png\r\n\n b .png\n", [(None, "a.png"), (None, " b .png")]),
        ("line\u2028separator\x0b.png", [(None, "line\u2028separator\x0b.png")]),
        (json.dumps({"key": "{a\nb}.png"}), [(None, "{a\nb}.png")]),
        (json.dumps(NOTIFICATION), [("photos", KEY)]),
        (json.dumps(NOTIFICATION, indent=1), [("photos", KEY)]),
        (json.dumps({"Records": [RECORD, RECORD]}), [("photos", KEY)] * 2),
        (json.dumps(sns(NOTIFICATION)), [("photos", KEY)]),
        (json.dumps(EVENT_BRIDGE), [("photos", KEY)]),
        (json.dumps(sns(EVENT_BRIDGE)), [("photos", KEY)]),
        (json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "photos"}), []),
        (json.dumps(sns({"Service": "Amazon S3", "Event": "s3:TestEvent"})), []),
    ],
)
def test_an_event_names_its_objects_whatever_its_form(body: str, named: list[tuple[str | None, str]]) -> None:
    assert list(named_objects(body)) == named


@pytest.mark.parametrize(
    "body",
    [
        '{"Records": [',
        '{"a": ' * 100_000,
        "{}",
        '{"Records": [{"Sns": {}}]}',
        '{"Records": [{"s3": {"bucket": {"name": "photos"}, "object": {}}}]}',
        '{"key": ""}',
        r'{"key": "\ud800"}',
        json.dumps({"Type": "Notification", "Message": "no JSON"}),
    ],
)
def test_what_names_no_object_says_so(body: str) -> None:
    with pytest.raises(EventError):
        list(named_objects(body))


def test_a_line_that_cannot_be_read_is_told_with_its_number_and_costs_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {"Records": [RECORD | {"s3": {"bucket": {"name": "films"}, "object": {"key": "a"}}}]}
    lines = [
        b"2026/first.png",
        b"{broken",
        b"",
        json.dumps(NOTIFICATION).encode(),
        b"2026/\xff.png",
        json.dumps(other).encode(),
        b"2025/outside.png",
        b"2026/first.png",
        b"2026/last.png",
    ]
    reader = EventReader(ScanSource(url="s3://photos/2026/"))
    reader.read_lines(io.BytesIO(b"\n".join(lines)))
    assert list(reader.keys) == ["2026/first.png", KEY, "2026/last.png"]
    assert (reader.unreadable, reader.outside) == (3, 1)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2].partition(":")[0].strip() for line in told] == ["line 2", "line 5", "line 6"]
    assert "about bucket films" in told[2]


@pytest.mark.parametrize("line", ["2026/a.png", json.dumps({"key": "2026/a.png"})])
def test_lines_may_begin_with_a_byte_order_mark(line: str) -> None:
    reader = EventReader(ScanSource(url="s3://photos/2026/"))
    reader.read_lines(io.BytesIO(f"\ufeff{line}\r\n2026/\ufeff.png\r\n".encode()))
    assert (list(reader.keys), reader.outside) == (["2026/a.png", "2026/\ufeff.png"], 0)


def test_an_event_of_a_bucket_says_nothing_about_a_folder(tmp_path: Path) -> None:
    reader = EventReader(ScanSource(url=str(tmp_path)))
    reader.read_lines(io.BytesIO(json.dumps(NOTIFICATION).encode() + b"\na.png\n"))
    assert (list(reader.keys), reader.unreadable) == (["a.png"], 1)


@pytest.mark.parametrize(
    ("url", "region", "endpoint"),
    [
        ("https://sqs.eu-west-1.amazonaws.com/1/q", "eu-west-1", "https://sqs.eu-west-1.amazonaws.com"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", "cn-north-1", "https://sqs.cn-north-1.amazonaws.com.cn"),
        ("http://127.0.0.1:9324/1/q", "us-east-2", "http://127.0.0.1:9324"),
    ],
)
def test_a_queue_is_asked_at_its_own_address(
    url: str, region: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-2")
    meta = Queue(url)._client.meta
    assert (meta.region_name, meta.endpoint_url) == (region, endpoint)
