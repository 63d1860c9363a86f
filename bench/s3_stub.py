"""A minimal S3 server to measure scans of more objects than moto can hold: a bucket with generated keys, and buckets
that store what is written to them. Requests are not checked, not even their signatures."""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

SOURCE = "photos"
WHEN = ("2026-01-01T00:00:00.000Z", "Thu, 01 Jan 2026 00:00:00 GMT")


class S3Stub(ThreadingHTTPServer):
    """Bucket `photos` has the keys `000000000.png` up to `count`, with the bytes of `pictures` in turn; an object put
    there replaces the generated one. All other buckets store what is put there."""

    def __init__(self, count: int, pictures: Sequence[bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.count, self.pictures = count, pictures
        self.etags = [hashlib.md5(picture, usedforsecurity=False).hexdigest() for picture in pictures]
        self.stored: dict[str, dict[str, bytes]] = {}
        self.lock = threading.Lock()

    def read(self, bucket: str, key: str) -> bytes | None:
        """Return an object's bytes, or None."""
        found = self.stored.get(bucket, {}).get(key)
        if found is None and bucket == SOURCE:
            return self.pictures[int(key.removesuffix(".png")) % len(self.pictures)]
        return found

    def after(self, bucket: str, prefix: str, last: str, limit: int) -> tuple[list[tuple[str, int, str]], bool]:
        """Return key, size and ETag of up to `limit` objects after the key `last`, and whether there are more."""
        if bucket == SOURCE:
            first = bisect_right(range(self.count), last, key=_key_of)
            numbers = range(first, min(first + limit, self.count))
            found = [(_key_of(number), *self._counted(number)) for number in numbers]
            return found, numbers.stop < self.count
        with self.lock:
            stored = self.stored.get(bucket, {})
            keys = sorted(key for key in stored if key.startswith(prefix) and key > last)
            return [(key, len(stored[key]), "0" * 32) for key in keys[:limit]], len(keys) > limit

    def _counted(self, number: int) -> tuple[int, str]:
        replaced = self.stored.get(SOURCE, {}).get(_key_of(number))
        if replaced is not None:
            return len(replaced), hashlib.md5(replaced, usedforsecurity=False).hexdigest()
        return len(self.pictures[number % len(self.pictures)]), self.etags[number % len(self.pictures)]


def _key_of(number: int) -> str:
    return f"{number:09d}.png"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written one after the other
    server: S3Stub

    def do_GET(self) -> None:
        bucket, key, query = self._address()
        if not key:
            self._list(bucket, query)
            return
        data = self.server.read(bucket, key)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._answer(
                200,
                data,
                {"ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"', "Last-Modified": WHEN[1]},
            )

    def do_PUT(self) -> None:
        bucket, key, _ = self._address()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            objects = self.server.stored.setdefault(bucket, {})
            taken = "If-None-Match" in self.headers and key in objects
            if not taken:
                objects[key] = body
        self._answer(412 if taken else 200, b"<Error><Code>PreconditionFailed</Code></Error>" if taken else b"")

    def do_DELETE(self) -> None:
        bucket, key, _ = self._address()
        with self.server.lock:
            self.server.stored.get(bucket, {}).pop(key, None)
        self._answer(204, b"")

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        last = query.get("continuation-token", query.get("start-after", [""]))[0]
        found, more = self.server.after(bucket, query.get("prefix", [""])[0], last, int(query["max-keys"][0]))
        contents = "".join(
            f"<Contents><Key>{quote(key)}</Key><LastModified>{WHEN[0]}</LastModified><ETag>&quot;{etag}&quot;</ETag>"
            f"<Size>{size}</Size></Contents>"
            for key, size, etag in found
        )
        token = f"<NextContinuationToken>{found[-1][0]}</NextContinuationToken>" if more else ""
        page = f"<IsTruncated>{str(more).lower()}</IsTruncated><EncodingType>url</EncodingType>{token}{contents}"
        self._answer(200, f"<ListBucketResult>{page}</ListBucketResult>".encode())

    def _address(self) -> tuple[str, str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        bucket, _, key = parts.path.lstrip("/").partition("/")
        return bucket, unquote(key), parse_qs(parts.query, keep_blank_values=True)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
