"""GETs composed after boto3's example are boto3's to the letter, and each answer of a store has the same end."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import botocore
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from patchscan.common.retries import TransientError
from patchscan.storage import boto
from patchscan.storage.bucket import Bucket
from patchscan.storage.store import FetchedObject, ObjectError, ObjectInfo, StoreError
from tests.bucket_kit import UNUSUAL_KEYS, served

FIRST = ObjectInfo(key="first.png", etag="e")
KEYS = [
    *UNUSUAL_KEYS,
    "a/./b.png",
    "/leading.png",
    "//leading/two.png",
    "trailing/",
    ".",
    "~!*'();:@&=$,[]{}|\\^`\"<>",
    "\x01\x7f\t\n",
    "first.png",
    "versionId=1",
]


class Seen(NamedTuple):
    """A request as it arrived; `target` is what stands in its first line."""

    method: str
    target: str
    headers: dict[str, str]

    @property
    def region(self) -> str:
        return self.headers["authorization"].split("/")[2]


class Recorder(ThreadingHTTPServer):
    """Keeps the requests for objects, and answers them with `answer`: a whole reply, after which it hangs up."""

    daemon_threads = True

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.answer: Callable[[Seen], bytes] = lambda _: reply()
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            raw_requestline: bytes

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen = Seen(self.command, self.raw_requestline.decode().split(" ")[1], headers)
                recorder.seen.append(seen)
                self.wfile.write(recorder.answer(seen))
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def reply(status: int = 200, body: bytes = b"abc", length: int | None = None, **headers: str) -> bytes:
    headers = {"Content-Length": str(len(body) if length is None else length), "ETag": '"e"', **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value)
    return f"HTTP/1.1 {status} Said\r\nConnection: close\r\n{lines}\r\n".encode() + body


def refusal(status: int, code: str, **fields: str) -> bytes:
    more = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return reply(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    with served(recorder, monkeypatch):
        yield recorder


def bucket_at(url: str, *, requester_pays: bool = False) -> tuple[Bucket, list[str]]:
    """The bucket, and a list that grows with each GetObject that boto3 composes."""
    opened, by_boto3 = Bucket("s3://photos", endpoint_url=url, requester_pays=requester_pays, threads=4), list[str]()
    opened._client.meta.events.register(
        "provide-client-params.s3.GetObject", lambda params, **_: by_boto3.append(params["Key"])
    )
    return opened, by_boto3


def rightly_signed(seen: Seen, credentials: Credentials) -> bool:
    """Whether botocore gives a request that arrived the signature with which it arrived."""
    signed = re.findall("SignedHeaders=([^,]+)", seen.headers["authorization"])[0].split(";")
    headers = {name: seen.headers[name] for name in signed if name != "host"}
    request = AWSRequest(seen.method, f"http://{seen.headers['host']}{seen.target}", headers)
    request.context["timestamp"] = seen.headers["x-amz-date"]
    signer = S3SigV4Auth(credentials, "s3", seen.region)
    signature = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
    return seen.headers["authorization"].endswith(f"Signature={signature}")


def without_time(seen: Seen) -> Seen:
    headers = seen.headers | {"x-amz-date": "", "amz-sdk-invocation-id": ""}
    headers["authorization"] = re.sub("/[0-9]{8}/|Signature=.*", "", headers["authorization"])
    return seen._replace(headers=headers)


@pytest.mark.parametrize("virtual", [False, True], ids=["path", "virtual host, proxy"])
@pytest.mark.parametrize("token", ["", "to+ken/="])
def test_a_composed_request_is_the_one_that_boto3_would_send(
    server: Recorder, virtual: bool, token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if virtual:
        (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        for name in ("HTTP_PROXY", "http_proxy"):  # the second is heeded where both are set
            monkeypatch.setenv(name, server.url)
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    store, by_boto3 = bucket_at("http://S3.example:80" if virtual else server.url, requester_pays=bool(token))
    store.fetch(FIRST, 100)
    server.answer = lambda _: reply(ETag="")
    for key in KEYS:
        for etag, version in (("e", None), (None, "v+/=é~ 1"), ("two  spaces", "1")):
            server.seen.clear()
            by_boto3.clear()
            store.fetch(ObjectInfo(key=key, etag=etag, version_id=version), 100)
            assert by_boto3 == []
            more: Any = ({"IfMatch": f'"{etag}"'} if etag else {}) | ({"VersionId": version} if version else {})
            store._client.get_object(Bucket="photos", Key=key, **more, **store._payer)
            ours, theirs = server.seen
            assert without_time(ours) == without_time(theirs)
            assert ours.headers["amz-sdk-invocation-id"] != theirs.headers["amz-sdk-invocation-id"]
            # A proxy is sent another path than was signed where the key has dots in it, by boto3 as by us.
            assert virtual or rightly_signed(ours, Credentials("k", "s", token or None))


ANSWERS = {
    "as it should be": reply(),
    "of a version": reply(x_amz_version_id="v", Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT"),
    "packed": reply(Content_Encoding="gzip", Last_Modified="once"),
    "without a length": reply(Content_Length=""),
    "in chunks": reply(body=b"3\r\nabc\r\n0\r\n\r\n", Content_Length="", Transfer_Encoding="chunked"),
    "in chunks, cut off": reply(body=b"5\r\nabc", Content_Length="", Transfer_Encoding="chunked"),
    "without an ETag": reply(ETag=""),
    "of another ETag": reply(ETag='"new"'),
    "too large": reply(body=b"a" * 200),
    "cut off": reply(length=7),
    "cut off in its head": reply()[:30],
    "nothing": b"",
    "a part": reply(206),
    "no content": reply(204, b""),
    "no such key": refusal(404, "NoSuchKey"),
    "no such bucket": refusal(404, "NoSuchBucket"),
    "404 alone": reply(404, b""),
    "access denied": refusal(403, "AccessDenied"),
    "cold": refusal(403, "InvalidObjectState"),
    "cold, of another store": refusal(400, "InvalidObjectState"),
    "a wrong signature": refusal(403, "SignatureDoesNotMatch"),
    "403 alone": reply(403, b""),
    "ended": refusal(400, "ExpiredToken"),
    "unknown": refusal(401, "Unauthorized"),
    "not modified": reply(304, b""),
    "a delete marker": refusal(405, "MethodNotAllowed"),
    "conflict": refusal(409, "OperationAborted"),
    "replaced": refusal(412, "PreconditionFailed"),
    "out of range": refusal(416, "InvalidRange"),
    "busy, 429": refusal(429, "TooManyRequestsException"),
    "an error": refusal(500, "InternalError"),
    "an error as a web page": reply(502, b"<html>Bad gateway<br></html>"),
    "unknown to the store": refusal(501, "NotImplemented"),
    "busy": refusal(503, "SlowDown"),
    "moved": refusal(301, "PermanentRedirect"),
    "moved, with a region": refusal(400, "AuthorizationHeaderMalformed", Region="eu-west-3"),
}
# What is asked once more, by boto3.
ASKED_AGAIN = {
    *("a part", "no content", "a wrong signature", "403 alone", "ended", "unknown"),
    *("not modified", "a delete marker", "conflict", "out of range", "moved", "moved, with a region"),
}


def end_of(store: Bucket) -> FetchedObject | tuple[type[Exception], str, object]:
    try:
        return store.fetch(FIRST, 100)
    except (TransientError, ObjectError, StoreError) as error:
        return type(error), str(error), getattr(error, "code", None)


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_has_the_same_end_as_with_boto3(server: Recorder, name: str) -> None:
    def answer(seen: Seen) -> bytes:
        return ANSWERS[name] if seen.method == "GET" else reply(body=b"")

    store, by_boto3 = bucket_at(server.url)
    server.answer = answer
    expected = end_of(store)
    assert by_boto3 == ["first.png"]
    server.answer = lambda _: reply()
    store.fetch(FIRST, 100)  # now there is an example, if there was none
    server.answer = answer
    for known in (by_boto3, server.seen, store.requests):
        known.clear()
    assert end_of(store) == expected
    assert len(by_boto3) == (name in ASKED_AGAIN)
    assert store.requests["GetObject"] == sum(seen.method == "GET" for seen in server.seen)


def test_a_slow_store_is_waited_for_as_long(server: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**settings: Any) -> Config:
        return Config(**settings | {"read_timeout": 0.2})

    monkeypatch.setattr(boto, "Config", config)
    store, by_boto3 = bucket_at(server.url)
    store.fetch(FIRST, 100)
    over = threading.Event()
    server.answer = lambda _: b"late" * over.wait(60)
    with pytest.raises(TransientError, match="ReadTimeoutError"):
        store.fetch(FIRST, 100)
    over.set()
    assert by_boto3 == ["first.png"]


@pytest.mark.parametrize(
    "moved",
    [
        reply(301, b"", x_amz_bucket_region="eu-west-3"),
        reply(307, b"", x_amz_bucket_region="eu-west-3"),
        refusal(400, "AuthorizationHeaderMalformed", Region="eu-west-3"),
    ],
    ids=["301", "307", "400"],
)
def test_a_redirect_to_another_region_is_followed_once(server: Recorder, moved: bytes) -> None:
    store, by_boto3 = bucket_at(server.url)
    store.fetch(FIRST, 100)
    server.answer = lambda seen: reply() if seen.region == "eu-west-3" else moved
    assert store.fetch(ObjectInfo(key="a//b"), 100).data == b"abc"
    assert by_boto3 == ["first.png", "a//b"]
    server.seen.clear()
    assert store.fetch(ObjectInfo(key="c"), 100).data == b"abc"
    (seen,) = server.seen
    assert rightly_signed(seen, Credentials("k", "s"))
    assert len(by_boto3) == 2


def test_renewed_credentials_sign_the_next_request(
    server: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def issue(key: str, secret: str, token: str | None, minutes: int = 12) -> Credentials:
        ends = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()  # so soon that each call asks for new ones
        issued = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "Expiration": ends}
        (tmp_path / "issued").write_text(json.dumps(issued | ({"SessionToken": token} if token else {})))
        return Credentials(key, secret, token)

    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path / 'issued'}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    issue("one", "s1", "t1")
    store, by_boto3 = bucket_at(server.url)
    store.fetch(FIRST, 100)
    for key, token, asked in (("two", "t2", 1), ("three", "t3", 1), ("four", None, 2), ("five", None, 2)):
        issued = issue(key, f"secret of {key}", token)
        store.fetch(FIRST, 100)
        assert f"Credential={key}/" in server.seen[-1].headers["authorization"]
        assert server.seen[-1].headers.get("x-amz-security-token") == token
        assert rightly_signed(server.seen[-1], issued)
        assert len(by_boto3) == asked
    issue("six", "s6", None, minutes=-1)
    with pytest.raises(StoreError, match="credentials"):
        store.fetch(FIRST, 100)


def test_what_is_not_signed_so_stays_with_boto3(server: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boto, "Config", partial(Config, signature_version=botocore.UNSIGNED))
    store, by_boto3 = bucket_at(server.url)
    for _ in range(3):
        assert store.fetch(FIRST, 100).data == b"abc"
    assert len(by_boto3) == 3
    assert "authorization" not in server.seen[-1].headers


def test_many_threads_get_each_its_own_object(server: Recorder) -> None:
    server.answer = lambda seen: reply(body=seen.target.encode())
    store, _ = bucket_at(server.url)
    infos = [ObjectInfo(key=f"{number}/{key}") for number, key in enumerate(KEYS * 4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda info: store.fetch(info, 10_000).data, infos))
    assert [data.split(b"/")[2] for data in found] == [str(number).encode() for number in range(len(infos))]
    assert store.requests["GetObject"] == len(infos)
