"""An HTTP proxy that misbehaves on purpose: it answers some requests with 503, cuts others off, and drops headers."""

import http.client
import itertools
import socket
import struct
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class FaultyProxy:
    """Forwards to `target`; of every `every` requests one meets a fault, in turn: 503, a reset, half a body; 0: none.

    `drops` names headers that never arrive. `seen` holds method, path and headers of each request.
    """

    def __init__(self, target: str, every: int = 5, drops: Sequence[str] = ()):
        host, port = urlsplit(target).hostname, urlsplit(target).port
        assert host
        counter = itertools.count()
        self.faults = 0
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                number = next(counter)
                fault = number // every % 3 if every and number % every == every - 1 else None
                proxy.seen.append(
                    (self.command, self.path, {name.lower(): self.headers[name] for name in self.headers})
                )
                if self.headers.get("Expect") == "100-continue":
                    # botocore waits a second for this before it sends the body of a PUT.
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                passed = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", *drops)}
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fault is not None:
                    proxy.faults += 1
                if fault == 0:
                    self.send_error(503, "Slow Down")
                    return
                if fault == 1:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
                    return
                assert host
                upstream = http.client.HTTPConnection(host, port, timeout=60)
                upstream.request(self.command, self.path, body, passed)
                reply = upstream.getresponse()
                data = reply.read()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault == 2 else data)
                upstream.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *_: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
