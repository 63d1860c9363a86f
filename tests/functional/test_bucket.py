"""Listings of S3 stores that leave things out, contradict themselves, or are no stores at all."""

import errno
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import urllib3
from botocore import exceptions as boto_errors
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders

from patchscan.common.errors import UserError
from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.scanning.history import honours_conditional_writes
from patchscan.scanning.listing import Filters, ListingJoin
from patchscan.storage import key_ranges
from patchscan.storage.bucket import Bucket
from patchscan.storage.folder import Folder
from patchscan.storage.key_ranges import Page
from patchscan.storage.store import (
    FailureCode,
    ObjectError,
    ObjectInfo,
    Store,
    StoreError,
    UnusableNameError,
    read_listing,
)
from tests.bucket_kit import served

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
MODIFIED = "<LastModified>2026-01-02T03:04:05.000Z</LastModified>"
ENTRY = f'<Size>3</Size><ETag>"e"</ETag>{MODIFIED}'


def listing(*entries: str, truncated: str = "false", after: str | None = None) -> bytes:
    following = "" if after is None else f"<NextContinuationToken>{after}</NextContinuationToken>"
    contents = "".join(f"<Contents>{entry}</Contents>" for entry in entries)
    head = f"<IsTruncated>{truncated}</IsTruncated>" if truncated else "<Name>b</Name>"
    return f"<?xml version='1.0'?><ListBucketResult {NAMESPACE}>{head}{following}{contents}</ListBucketResult>".encode()


class StubStore(ThreadingHTTPServer):
    """Answers a listing by its token with `pages`, the first under "", and each object with `headers` and `body`."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.body = b"abc"
        self.status = 200
        self.refused: set[str] = set()  # headers that it does not know
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                if any(name in self.headers for name in store.refused):
                    self.reply(b"<Error><Code>NotImplemented</Code></Error>", {}, 501)
                elif store.status != 200 or "list-type" not in query:
                    self.reply(store.body, store.headers)
                elif "start-after" in query:
                    self.reply(listing(), {})
                else:
                    self.reply(store.pages[query.get("continuation-token", [""])[0]], {})

            do_HEAD = do_PUT = do_DELETE = do_GET

            def reply(self, data: bytes, headers: dict[str, str], status: int | None = None) -> None:
                self.send_response(status or store.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubStore]:
    server = StubStore()
    with served(server, monkeypatch):
        yield server


@pytest.fixture
def store(stub: StubStore) -> Store:
    opened = Bucket("s3://b/p", endpoint_url=f"http://127.0.0.1:{stub.server_port}", requester_pays=False, threads=2)
    opened._retries = Retries(deadline_s=0.2)
    return opened


def entries(*keys: str) -> list[str]:
    return [f"<Key>{key}</Key>{ENTRY}" for key in keys]


def test_a_store_that_refuses_what_is_optional_is_listed_without(stub: StubStore, store: Store) -> None:
    stub.refused = {"x-amz-optional-object-attributes"}
    stub.pages = {"": listing(*entries("pa", "pb"))}
    assert [info.key for info in store.objects()] == ["pa", "pb"]


def said(*fields: str, root: str = "ListBucketResult") -> bytes:
    """A reply of an entry and these fields."""
    entry = f"<Contents><Key>p/1</Key>{ENTRY}</Contents>"
    return f"<?xml version='1.0'?><{root} {NAMESPACE}>{''.join(fields)}{entry}</{root}>".encode()


def test_a_bucket_that_is_listed_folder_by_folder_is_listed_again_by_one_thread(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{folder:02d}/{number}" for folder in range(60) for number in range(20)]
    keys += ["59.json", "59-old/1"]
    keys.sort(key=lambda key: key.split("/"))
    places = [key.split("/") for key in keys]
    threads: set[int] = set()

    def page(*, after: str = "", token: str | None = None, limit: int) -> Page:
        threads.add(threading.get_ident())
        time.sleep(0.001)
        start = bisect_right(places, (token or after).split("/")) if token or after else 0
        found = [ObjectInfo(key=key) for key in keys[start : start + min(limit, 20)]]
        return Page(found, found[-1].key if start + len(found) < len(keys) else None)

    assert isinstance(store, Bucket)
    monkeypatch.setattr(store, "_page", page)
    assert sorted(info.key for info in read_listing(store, list)) == sorted(keys)
    assert store._listing_threads == 1, "on a busy machine one thread may have listed all before others came"
    threads.clear()
    assert [info.key for info in store.objects()] == keys
    assert len(threads) == 1


class FreshTokens(dict[str, bytes]):
    """The same pages over and over, each time with another token."""

    def __init__(self, *pages: list[str]):
        self._pages = pages
        self._asked = 0

    def __getitem__(self, token: str) -> bytes:
        page = self._pages[self._asked % len(self._pages)]
        self._asked += 1
        return listing(*entries(*page), truncated="true", after=str(self._asked))


NO_LISTINGS: dict[str, dict[str, bytes]] = {
    "truncated without a token": {"": listing(*entries("p/1"), truncated="true")},
    "truncated with an empty token": {"": listing(*entries("p/1"), truncated="true", after="")},
    "truncated without a token on the second page": {
        "": listing(*entries("p/1"), truncated="true", after="2"),
        "2": listing(*entries("p/2"), truncated="true"),
    },
    "the same token for ever": {
        "": listing(*entries("p/1"), truncated="true", after="2"),
        "2": listing(*entries("p/2"), truncated="true", after="2"),
    },
    "the same token for ever, on empty pages": {
        "": listing(truncated="true", after="2"),
        "2": listing(truncated="true", after="2"),
    },
    "tokens in a circle": {
        "": listing(truncated="true", after="2"),
        "2": listing(*entries("p/2"), truncated="true", after="3"),
        "3": listing(truncated="true", after="4"),
        "4": listing(truncated="true", after="2"),
    },
    **{
        f"truncated: {text}, without a token": {"": listing(*entries("p/1"), truncated=text)}
        for text in ("True", "TRUE", " true ", "1", "yes")
    },
    "the next marker of version 1": {"": said("<Name>b</Name><NextMarker>p/1</NextMarker>")},
    "the next marker of version 1, and nothing said": {"": said("<IsTruncated/><NextMarker>p/1</NextMarker>")},
    "more keys told than there are": {"": said("<KeyCount>1000</KeyCount><IsTruncated>false</IsTruncated>")},
    "keys told and none there": {
        "": listing().replace(b"<IsTruncated>", b"<KeyCount>5</KeyCount><IsTruncated>"),
    },
    "the same page for ever": FreshTokens(["p/1", "p/2"]),
    "the same key for ever": FreshTokens(["p/1"]),
    "the same pages for ever": FreshTokens(["p/1", "p/2"], ["p/3"], [], ["p/4"]),
    "the same keys for ever, in other pages": FreshTokens(["p/1", "p/2"], ["p/3", "p/1"], ["p/2", "p/3"]),
    "the same page and an empty one for ever": FreshTokens(["p/1", "p/2"], []),
    "the page before, and its end": {
        "": listing(*entries("p/1", "p/2"), truncated="true", after="2"),
        "2": listing(*entries("p/1", "p/2")),
    },
    "keys outside the prefix": {"": listing(*entries("p/1", "q/1"))},
    "groups of keys": {"": said("<Name>b</Name><CommonPrefixes><Prefix>p/sub/</Prefix></CommonPrefixes>")},
    "versions": {"": said("<Name>b</Name><IsTruncated>false</IsTruncated>", root="ListVersionsResult")},
    **{
        f"an XML of {root}": {"": said("<Name>b</Name><IsTruncated>false</IsTruncated>", root=root)}
        for root in ("html", "rss", "Error", "ListBuckets", "ListMultipartUploadsResult")
    },
    "a listing's name in a comment": {"": b"<!-- <ListBucketResult> --><html><Name>b</Name><!-- --></html>"},
    "buckets": {"": said("<Name>b</Name>", root="ListAllMyBucketsResult")},
    "a web page with a name": {"": b"<html><Name>b</Name></html>"},
    "a web page": {"": b"<html><body>Please log in</body></html>"},
    "a web page that is no XML": {"": b"<!doctype html><p>Please log in<br>"},
    "JSON": {"": b'{"keys": []}'},
    "nothing": {"": b""},
    "an entry without a key": {"": listing("<Size>3</Size>")},
    "a size that is no number": {"": listing("<Key>p/1</Key><Size>big</Size>")},
}


@pytest.mark.parametrize("name", NO_LISTINGS)
def test_a_listing_that_contradicts_itself_or_is_none_is_an_error(stub: StubStore, store: Store, name: str) -> None:
    stub.pages = NO_LISTINGS[name]
    with pytest.raises(UserError, match=r"list|does not answer \(500"):  # boto3 calls some of them a 500
        list(store.objects())
    with pytest.raises(UserError, match=r"list|does not answer \(500"):  # boto3 calls some of them a 500
        list(store.names(""))


@pytest.mark.parametrize(
    "fields",
    [
        "<IsTruncated>False</IsTruncated><KeyCount>1</KeyCount><Name>b</Name>",
        "<IsTruncated>0</IsTruncated><NextMarker></NextMarker><NextContinuationToken/>",
        "<IsTruncated/><NextMarker/><Name/><CommonPrefixes/>",
        "<KeyCount>0</KeyCount>",  # what is there counts
        "<MaxKeys>1000</MaxKeys>",
        "<IsTruncated>false</IsTruncated><NextMarker>p/1</NextMarker>",  # the last key, of version 1
        "<IsTruncated>false</IsTruncated><Name>mapped</Name>",  # by a proxy; the prefix tells that it is the right one
    ],
)
def test_a_listing_that_says_little_is_a_listing(stub: StubStore, store: Store, fields: str) -> None:
    stub.pages = {"": said(fields)}
    assert [info.key for info in store.objects()] == ["p/1"]
    assert list(store.names("")) == ["1"]


@pytest.mark.parametrize("root", ["ListBucketResultV2", "ListBucketV2Result", "s3:ListBucketResult"])
def test_a_listing_may_be_called_otherwise(stub: StubStore, store: Store, root: str) -> None:
    stub.pages = {"": said("<Name>b</Name>", root=root).replace(b"xmlns=", b"xmlns:s3=")}
    assert [info.key for info in store.objects()] == ["p/1"]


@pytest.mark.parametrize("before", ["<!-- by <gateway> -->", "<?style <x> ?>\n<!-- -->", "<!DOCTYPE ListBucketResult>"])
def test_what_comes_before_a_listing_is_not_taken_for_it(stub: StubStore, store: Store, before: str) -> None:
    stub.pages = {"": said("<Name>b</Name>").replace(b"?>", b"?>" + before.encode(), 1)}
    assert [info.key for info in store.objects()] == ["p/1"]


@pytest.mark.parametrize("name", ["photos", "Photos", "t1/photos", "t1:photos", "photos-123", ""])
def test_a_listing_may_name_its_bucket_otherwise(stub: StubStore, name: str) -> None:
    url = f"http://127.0.0.1:{stub.server_port}"
    store = Bucket("s3://photos", endpoint_url=url, requester_pays=False, threads=2)
    stub.pages = {"": said(f"<Name>{name}</Name><IsTruncated>false</IsTruncated>")}
    assert [info.key for info in store.objects()] == ["p/1"]


def test_a_listing_of_another_bucket_is_an_error(stub: StubStore) -> None:
    url = f"http://127.0.0.1:{stub.server_port}"
    store = Bucket("s3://photos", endpoint_url=url, requester_pays=False, threads=2)
    stub.pages = {"": said("<Name>other</Name><IsTruncated>false</IsTruncated>")}
    for listed in (store.objects(), store.names("")):
        with pytest.raises(StoreError, match="of another bucket"):
            list(listed)


def test_an_access_points_listing_may_name_its_bucket(stub: StubStore) -> None:
    url = f"http://127.0.0.1:{stub.server_port}"
    store = Bucket("s3://point-abcde-s3alias", endpoint_url=url, requester_pays=False, threads=2)
    stub.pages = {"": said("<Name>photos</Name><IsTruncated>false</IsTruncated>")}
    assert [info.key for info in store.objects()] == ["p/1"]


@pytest.mark.parametrize("truncated", ["true", "false", ""])
def test_a_token_is_followed_whatever_is_said_beside_it(stub: StubStore, store: Store, truncated: str) -> None:
    stub.pages = {
        "": listing(*entries("p/1"), truncated=truncated, after="2"),
        "2": listing(truncated=truncated, after="3"),
        "3": listing(*entries("p/2"), truncated="" if truncated == "" else "false"),
    }
    assert sorted(info.key for info in store.objects()) == ["p/1", "p/2"]
    assert sorted(store.names("")) == ["1", "2"]


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "<Size>3</Size>",
        '<ETag>"e"</ETag>',
        MODIFIED,
        "<ETag/>",
        "<LastModified/>",
        "<LastModified>?</LastModified>",
    ],
)
@pytest.mark.parametrize("headers", [{}, {"ETag": '"e"'}, {"Content-Length": "3"}, {"Last-Modified": "yesterday"}])
def test_what_is_optional_in_s3_is_optional_here(
    stub: StubStore, store: Store, entry: str, headers: dict[str, str]
) -> None:
    stub.pages, stub.headers = {"": listing(f"<Key>p/1</Key>{entry}")}, headers
    (info,) = store.objects()
    assert info.key == "p/1"
    assert info.etag == ("e" if '"e"' in entry else None)
    assert (info.last_modified is None) == (entry != MODIFIED)
    fetched = store.fetch(info, 100)
    assert (fetched.data, fetched.size) == (b"abc", 3)
    assert fetched.etag == ("e" if '"e"' in entry or "ETag" in headers else None)


@pytest.mark.parametrize(
    ("status", "restored"),
    [
        ("", None),
        ("<IsRestoreInProgress>true</IsRestoreInProgress>", False),
        (
            "<IsRestoreInProgress>false</IsRestoreInProgress><RestoreExpiryDate>2026-12-21T00:00:00Z</RestoreExpiryDate>",
            True,
        ),
    ],
)
def test_a_listing_tells_what_is_archived_and_what_was_restored(
    stub: StubStore, store: Store, status: str, restored: bool | None
) -> None:
    told = f"<RestoreStatus>{status}</RestoreStatus>" if status else ""
    stub.pages = {"": listing(f"<Key>p/1</Key>{ENTRY}<StorageClass>GLACIER</StorageClass>{told}")}
    (info,) = store.objects()
    assert (info.storage_class, info.restored) == ("GLACIER", restored)


def test_empty_pages_without_end_are_an_error(stub: StubStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ranges, "MOST_EMPTY_PAGES", 20)
    stub.pages = FreshTokens([])
    for listed in (store.objects(), store.names("")):
        with pytest.raises(StoreError, match="20 pages without a key"):
            list(listed)
    stub.pages = FreshTokens(["p/1"], *[[] for _ in range(15)])
    with pytest.raises(StoreError, match="the same"):
        list(store.names(""))


@pytest.mark.parametrize("size", ["-1", "9223372036854775808", "99999999999999999999"])
def test_a_size_that_no_object_has_is_unknown(stub: StubStore, store: Store, size: str, tmp_path: Path) -> None:
    stub.pages = {"": listing(f"<Key>p/1</Key><Size>{size}</Size>", f"<Key>p/2</Key>{ENTRY}")}
    join = ListingJoin(tmp_path, Filters(min_size=1))
    read_listing(store, join.add_listing)
    assert [(row["key"], row["size"]) for row in join.to_score()] == [("p/1", None), ("p/2", 3)]


@pytest.mark.parametrize(
    ("told", "time"),
    [
        ("2026-01-02T03:04:05.000Z", "2026-01-02T03:04:05+00:00"),
        ("2026-01-02T05:04:05+02:00", "2026-01-02T03:04:05+00:00"),
        ("Fri, 02 Jan 2026 03:04:05 GMT", "2026-01-02T03:04:05+00:00"),
        ("2026-01-02T03:04:05", "2026-01-02T03:04:05+00:00"),
        ("2026-01-02", "2026-01-02T00:00:00+00:00"),
        ("1767323045", "2026-01-02T03:04:05+00:00"),
        *((text, None) for text in ("1e300", "inf", "nan", "9" * 40, "2026-13-01T00:00:00Z", "0000-00-00T00:00:00Z")),
        ("0001-01-01T00:00:00+14:00", None),
    ],
)
def test_a_date_in_another_form_is_read_or_unknown(
    stub: StubStore, store: Store, told: str, time: str | None, tmp_path: Path
) -> None:
    stub.pages = {"": listing(f"<Key>p/1</Key><LastModified>{told}</LastModified>")}
    stub.headers = {"Last-Modified": told}
    join = ListingJoin(tmp_path, Filters(since="2025-01-01T00:00:00+00:00"))
    read_listing(store, join.add_listing)
    (row,) = join.to_score()
    found = [row["last_modified"], store.fetch(ANY, 100).last_modified]
    assert [one and one.isoformat() for one in found] == [time, time]


@pytest.mark.parametrize("listed", ['"e"', "e", 'W/"e"', '\n   "e"\n', "&quot;e&quot;"])
@pytest.mark.parametrize("fetched", ['"e"', 'W/"e"', "e"])
def test_an_etag_is_the_same_in_all_its_forms(stub: StubStore, store: Store, listed: str, fetched: str) -> None:
    stub.pages, stub.headers = {"": listing(f"<Key>p/1</Key><ETag>{listed}</ETag>")}, {"ETag": fetched}
    (info,) = store.objects()
    assert info.etag == store.fetch(info, 100).etag == "e"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Length": "6"}, b"<html>"),  # of a proxy
        ({"Content-Length": "2", "ETag": '"e"'}, b"ab"),
    ],
)
def test_what_has_not_the_listed_size_is_no_image_that_was_read(
    stub: StubStore, store: Store, headers: dict[str, str], body: bytes
) -> None:
    stub.headers, stub.body = headers, body
    with pytest.raises(ObjectError, match=r"gives \d bytes of what it lists with 3") as failure:
        store.fetch(ObjectInfo(key="p/1", etag="e", size=3), 100)
    assert failure.value.code == FailureCode.STORE_ERROR
    assert store.fetch(ObjectInfo(key="p/1", size=3), 100).data == body, "without an ETag it may be a newer one"
    stub.headers = headers | {"Content-Encoding": "gzip"}
    assert store.fetch(ObjectInfo(key="p/1", etag="e", size=3), 100).data == body, "packed on its way"
    stub.headers, url = headers, f"http://127.0.0.1:{stub.server_port}"
    point = Bucket("s3://point-abcde--ol-s3", endpoint_url=url, requester_pays=False, threads=2)
    assert point.fetch(ObjectInfo(key="p/1", etag="e", size=3), 100).data == body, "made by a function"


def test_a_body_of_no_told_length_that_ends_early_is_tried_again(stub: StubStore, store: Store) -> None:
    stub.body = b"ab"
    with pytest.raises(TransientError, match="ended early"):
        store.fetch(ObjectInfo(key="p/1", etag="e", size=3), 100)


def test_an_object_of_another_etag_than_listed_has_changed(stub: StubStore, store: Store) -> None:
    stub.headers = {"ETag": '"new"'}
    with pytest.raises(ObjectError, match="replaced"):
        store.fetch(ObjectInfo(key="p/1", etag="old"), 100)


def error_reply(code: str, message: str = "no", **fields: str) -> bytes:
    more = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>".encode()


ANY = ObjectInfo(key="p/1")
CALLS: dict[str, Callable[[Store], object]] = {
    "fetch": lambda store: store.fetch(ANY, 100),
    "list": lambda store: list(store.objects()),
    "read": lambda store: store.read("1"),
    "write": lambda store: store.write("1", b"x"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        *((400, code, "no") for code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired")),
        *((403, code, "no") for code in ("ExpiredTokenException", "InvalidAccessKeyId", "RequestTimeTooSkewed")),
        (403, "InvalidClientTokenId", "no"),
        (401, "Unauthorized", "no"),
        (403, "AccessDenied", "The provided token has expired."),
    ],
)
def test_credentials_that_end_are_one_error_and_no_objects_fault(
    stub: StubStore, store: Store, call: str, status: int, code: str, message: str
) -> None:
    stub.status, stub.body = status, error_reply(code, message)
    with pytest.raises(StoreError, match=f"refuses the credentials .{code}.; renew them") as ended:
        CALLS[call](store)
    assert ended.value.exit_code == 2
    assert ("clock" in str(ended.value)) == (code == "RequestTimeTooSkewed")


def client_error(operation: str, status: int, code: str) -> boto_errors.ClientError:
    reply: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto_errors.ClientError(reply, operation)


STILL_EXPIRED = "Credentials were refreshed, but the refreshed credentials are still expired."


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error",
    [
        boto_errors.NoCredentialsError(),
        boto_errors.PartialCredentialsError(provider="env", cred_var="x"),
        boto_errors.CredentialRetrievalError(provider="custom-process", error_msg="x"),
        boto_errors.MetadataRetrievalError(error_msg="x"),
        boto_errors.TokenRetrievalError(provider="sso", error_msg="x"),
        boto_errors.UnauthorizedSSOTokenError(),
        boto_errors.SSOTokenLoadError(error_msg="x"),
        boto_errors.RefreshWithMFAUnsupportedError(),
        client_error("AssumeRole", 403, "AccessDenied"),
        client_error("AssumeRoleWithWebIdentity", 400, "InvalidIdentityToken"),
        client_error("GetRoleCredentials", 404, "ResourceNotFoundException"),
        RuntimeError(STILL_EXPIRED),
        FileNotFoundError(2, "no such file", "/var/run/secrets/token"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_credentials_that_cannot_be_renewed_are_one_error(
    store: Store, call: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    assert isinstance(store, Bucket)
    for name in ("get_object", "list_objects_v2", "put_object"):
        monkeypatch.setattr(store._client, name, fail)
    with pytest.raises(StoreError, match="credentials") as ended:
        CALLS[call](store)
    assert ended.value.exit_code == 2
    assert "/var/run" not in str(ended.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        urllib3.exceptions.SSLError("x"),
        client_error("AssumeRole", 503, "ServiceUnavailable"),
        client_error("GetObject", 408, "408"),
        client_error("GetObject", 400, "RequestTimeout"),
        client_error("GetObject", 400, "PriorRequestNotComplete"),
        boto_errors.SSLError(endpoint_url="x", error=OSError("[SSL: UNEXPECTED_EOF_WHILE_READING]")),
        client_error("AssumeRoleWithWebIdentity", 400, "IDPCommunicationError"),
    ],
)
def test_what_may_pass_is_tried_again(store: Store, error: Exception) -> None:
    assert isinstance(store, Bucket)
    assert isinstance(store._translate(error), TransientError)


@pytest.mark.parametrize(
    ("bucket", "address", "why"),
    [
        ("photos", "localhost:9000", "write --endpoint-url .* as http://HOST:PORT"),
        ("photos", "http://ho st", "write --endpoint-url"),
        ("photos", "http://minio_server:9000", "no underscore"),
        ("photos", "http://127.0.0.1:99999", "write --endpoint-url"),
        ("photos", "ftp://127.0.0.1", "write --endpoint-url"),
        ("ph otos", "http://127.0.0.1:9", "no bucket can have the name ph otos"),
        ("photos", "http://127.0.0.1:9", "does not answer .*are its address and region right"),
        ("photos", "https://127.0.0.1:{port}", "no TLS at the store's address; write it with http://"),
    ],
)
def test_a_misspelt_address_or_bucket_is_told_as_that(stub: StubStore, bucket: str, address: str, why: str) -> None:
    def list_it() -> None:
        url = address.format(port=stub.server_port)
        opened = Bucket(f"s3://{bucket}", endpoint_url=url, requester_pays=False, threads=2)
        opened._retries = Retries(deadline_s=0.1)
        list(opened.objects())

    with pytest.raises(UserError, match=why):
        list_it()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"])
def test_credentials_with_a_line_break_are_told_at_once(
    name: str, stub: StubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `echo KEY | base64` puts them into a Secret."""
    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for variable, value in (given | {name: given.get(name, "token") + "\n"}).items():
        monkeypatch.setenv(variable, value)
    address = f"http://127.0.0.1:{stub.server_port}"
    opened = Bucket("s3://photos", endpoint_url=address, requester_pays=False, threads=2)
    with pytest.raises(StoreError, match="ends in a line break") as caught:
        list(opened.objects())
    assert "Credential=" not in str(caught.value)


def test_a_certificate_that_is_not_trusted_is_no_outage(store: Store) -> None:
    failed = OSError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)")
    assert isinstance(store, Bucket)
    told = store._translate(boto_errors.SSLError(endpoint_url="https://secret", error=failed))
    assert isinstance(told, StoreError)
    assert "AWS_CA_BUNDLE" in str(told)
    assert "secret" not in str(told)


@pytest.mark.parametrize("call", ["fetch", "list", "write"])
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (301, {"x-amz-bucket-region": "eu-west-3"}, error_reply("PermanentRedirect")),
        (400, {}, error_reply("AuthorizationHeaderMalformed", Region="eu-west-3")),
        (400, {}, error_reply("AuthorizationHeaderMalformed", "the region 'x' is wrong; expecting 'eu-west-3'")),
        (
            400,
            {},
            error_reply("IllegalLocationConstraintException", "The eu-west-3 location constraint is incompatible"),
        ),
    ],
)
def test_a_store_of_another_region_is_named(
    stub: StubStore, store: Store, call: str, status: int, headers: dict[str, str], body: bytes
) -> None:
    stub.status, stub.headers, stub.body = status, headers, body
    with pytest.raises(StoreError, match="in region eu-west-3, not us-east-1; set AWS_DEFAULT_REGION=eu-west-3"):
        CALLS[call](store)


@pytest.mark.parametrize("endpoint", ["b.s3.eu-west-3.amazonaws.com", "b.s3-eu-west-3.amazonaws.com"])
def test_a_region_is_read_off_the_address_that_is_told(store: Store, endpoint: str) -> None:
    assert isinstance(store, Bucket)
    moved = client_error("GetObject", 301, "PermanentRedirect")
    moved.response["Error"]["Endpoint"] = endpoint  # type: ignore[typeddict-unknown-key]
    assert "in region eu-west-3" in str(store._translate(moved))


def test_a_store_of_an_unknown_region_says_so(stub: StubStore, store: Store) -> None:
    stub.status, stub.body = 301, error_reply("PermanentRedirect", "\x1b[2J")
    with pytest.raises(StoreError, match="is not in region us-east-1; set AWS_DEFAULT_REGION to its region"):
        store.fetch(ANY, 100)


@pytest.mark.parametrize(("status", "code"), [(403, "InvalidObjectState"), (400, "InvalidObjectState")])
def test_an_object_in_cold_storage_is_told_from_others(stub: StubStore, store: Store, status: int, code: str) -> None:
    stub.status, stub.body = status, error_reply(code)
    with pytest.raises(ObjectError) as failure:
        store.fetch(ANY, 100)
    assert failure.value.code == FailureCode.ARCHIVED
    with pytest.raises(UnusableNameError, match="cold storage"):  # a copy leaves it out
        store.download("1", BytesIO())


def test_the_encoding_of_an_object_is_told(stub: StubStore, store: Store) -> None:
    assert store.fetch(ANY, 100).encoding is None
    stub.headers = {"Content-Encoding": "gzip"}
    fetched = store.fetch(ANY, 100)
    assert (fetched.data, fetched.encoding) == (b"abc", "gzip")


@pytest.mark.parametrize(("there", "lost", "ours"), [(b"claim", 1, True), (b"another", 1, False), (b"claim", 0, False)])
def test_a_new_object_is_ours_also_where_the_reply_was_lost(
    stub: StubStore, store: Store, there: bytes, lost: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store, Bucket)
    replies = [ConnectionResetError()] * lost + [client_error("PutObject", 412, "PreconditionFailed")]

    def put(**_: Any) -> None:
        raise replies.pop(0)

    monkeypatch.setattr(store._client, "put_object", put)
    stub.body = there
    assert store.write_new("history/000001.json", b"claim") is ours


def test_a_store_that_refuses_conditions_is_written_to_without(stub: StubStore, store: Store) -> None:
    stub.refused, stub.body = {"If-None-Match"}, b""
    assert store.write_new("history/000001.json", b"claim")
    assert not honours_conditional_writes(store)


class NoBody(BytesIO):
    """The body of a reply, as botocore reads it."""

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield b""


@pytest.mark.parametrize(
    ("host", "is_aws"),
    [
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://s3.us-west-004.backblazeb2.com", False),
        ("https://storage.googleapis.com", False),
        ("https://amazonaws.com.example.org", False),
        ("http://127.0.0.1:9000", False),
    ],
)
def test_only_aws_is_sent_checksums_that_others_refuse_or_store(stub: StubStore, host: str, is_aws: bool) -> None:
    bucket = Bucket("s3://b/p", endpoint_url=host, requester_pays=False, threads=2)
    sent: list[str] = []

    def answer(request: Any, **_: Any) -> AWSResponse:
        sent.extend(name.lower() for name in request.headers)
        return AWSResponse(request.url, 200, HTTPHeaders(), NoBody())

    events: Any = bucket._client.meta.events
    events.register("before-send.s3.PutObject", answer)
    bucket.write("a.json", b"{}")
    bucket.upload("b.mar", BytesIO(b"archive"), {})
    assert any("checksum" in name or "trailer" in name for name in sent) is is_aws


class FullDisk(BytesIO):
    """A file on a disk without space."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_as_that_and_the_command_can_be_run_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "archive.mar").write_bytes(b"abc")
    for origin in (store, Folder(str(tmp_path))):
        with pytest.raises(OutageError, match="disk of temporary files is full"):
            origin.download("archive.mar", FullDisk())
