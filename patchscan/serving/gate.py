"""An HTTP gate in front of TorchServe, which itself listens on loopback only: tokens, limits, health, clean shutdown.

TorchServe 0.12 gets no more fixes, generates its own keys, reports Healthy while no worker is ready, and drops requests
in progress when it stops. The gate has the interface of TorchServe's inference API, but passes on predictions only. It
also answers the Open Inference Protocol (/v2) and version 1 of KServe's (/v1).
"""

import asyncio
import hmac
import json
import math
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import aiohttp
from aiohttp import HttpVersion11, web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from patchscan.common.errors import UserError
from patchscan.common.tokens import read_tokens
from patchscan.detector.answer import JSON_LENGTH
from patchscan.detector.card import NOT_FINITE
from patchscan.serving.forms import file_of_form
from patchscan.serving.inference_protocol import INPUTS, OUTPUTS, infer_reply, parse_infer, parse_predict, tar_of
from patchscan.serving.refusals import PROTOCOLS, Handler, Runner, errors_in_json, in_protocol, refusal
from patchscan.serving.requests import RequestError, read_json
from patchscan.serving.server import MAX_REQUEST_BYTES, TorchServe

# Like an archive's name and version, neither part begins with a dot: the HTTP client would resolve `..` in the path.
PREDICTION = re.compile(r"/predictions/\w[\w.-]{0,127}(/\w[\w.-]{0,63})?", re.ASCII)
MODEL = r"{name:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}}"
VERSION = r"{version:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}}"
# Limit for all request bodies in memory at once; TorchServe's heap of 1 GiB holds two more copies of each.
MAX_PENDING_BYTES = 256 * 2**20
BODY_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 30.0
# TorchServe sometimes never answers a request whose worker was killed. This is a little more than the responseTimeout
# of an archive, within which it answers all others.
ANSWER_TIMEOUT_S = 125.0
DRAIN_TIMEOUT_S = 60.0
READY_CACHE_S = 1.0
# What TorchServe has not said by then is left out: Prometheus gives up after 10 s.
SCRAPE_TIMEOUT_S = 8.0
OCTETS, JSON, FORM = "application/octet-stream", "application/json", "multipart/form-data"
NPY = "application/x-npy"
Result = TypeVar("Result")


class Tokens:
    """The tokens that allow predictions, read again whenever the file changes.

    The file is TorchServe's key_file.json, or text with one token per line, so that an old and a new token can both be
    valid during a change.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read_at: tuple[int, ...] | None = None
        self._tokens: list[bytes] = []

    def allow(self, header: str) -> bool:
        """Whether this Authorization header contains a token of the file. Raises UserError where the file cannot be
        read or holds none, as it may for a moment while it is written anew: no token is then right or wrong."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise UserError(f"the token file {self.path} cannot be read ({type(error).__name__})") from error
        # Not st_mtime alone, which `cp -p` sets; two writes in one tick of the clock differ in size, mostly.
        seen = stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size
        if seen != self._read_at:
            self._read_at = None  # until it has been read
            self._tokens = read_tokens(self.path)
            self._read_at = seen
        kind, _, token = header.partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")  # a header may hold any bytes
        # All tokens are compared in constant time, so that the response time does not reveal which one matched.
        matches = [hmac.compare_digest(given, allowed) for allowed in self._tokens]
        return kind.lower() == "bearer" and any(matches)


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Host and port that an API listens on; port 0 chooses a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Listen":
        """Parse `HOST:PORT`. Raises UserError."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"{text!r} is not an address: use HOST:PORT, such as 127.0.0.1:8080")
        return cls(host=host.strip("[]"), port=int(port))

    def url(self, port: int) -> str:
        """The base URL, with the port that was chosen."""
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"


class Reply(NamedTuple):
    """TorchServe's reply; `headers` are the handler's, which say what it cost."""

    status: int
    kind: str
    body: bytes
    headers: dict[str, str]


class Gate:
    """Serves /predictions, /v2, /v1, /ping, /readyz, /livez on one address and /metrics on another, in front of
    `server`."""

    def __init__(self, server: TorchServe, tokens: Tokens):
        self.server, self.tokens = server, tokens
        self.draining = False
        self._pending_bytes = 0
        self._parsing = asyncio.Lock()
        self._ready: tuple[float, list[str]] = (0.0, ["starting"])
        self._questions: dict[str, asyncio.Task[Any]] = {}  # to TorchServe, under way
        self._runners: list[web.BaseRunner] = []
        self._registry = CollectorRegistry()
        self._requests = Counter("patchscan_requests", "Replies by status", ["code"], registry=self._registry)
        self._seconds = Histogram("patchscan_request_seconds", "Request to reply", registry=self._registry)
        self._in_flight = Gauge("patchscan_requests_in_flight", "Requests under way", registry=self._registry)
        self._is_ready = Gauge("patchscan_ready", "1 where every model has a READY worker", registry=self._registry)

    async def start(self, inference: Listen, metrics: Listen) -> tuple[int, int]:
        """Listen on both addresses. Returns their ports. Raises UserError if it cannot listen on one of them."""
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        )
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[self._measure, errors_in_json])
        self._add_routes(app.router)
        metrics_app = web.Application(middlewares=[errors_in_json])
        metrics_app.router.add_get("/metrics", self._metrics)
        return await self._listen(app, inference), await self._listen(metrics_app, metrics)

    def _add_routes(self, router: web.UrlDispatcher) -> None:
        for path, handler in (("/ping", self._readyz), ("/readyz", self._readyz), ("/livez", self._livez)):
            router.add_get(path, handler)
        for method in ("POST", "PUT"):
            router.add_route(method, "/predictions/{path:.*}", self._predict, expect_handler=self._expect)
        router.add_get("/v2", self._describe_server)
        router.add_get("/v2/health/live", self._livez)
        router.add_get("/v2/health/ready", self._readyz)
        for path in (f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/{VERSION}"):
            router.add_get(path, self._describe_model)
            router.add_get(f"{path}/ready", self._model_ready)
            router.add_post(f"{path}/infer", self._infer, expect_handler=self._expect)
        router.add_get(f"/v1/models/{MODEL}", self._model_ready)
        router.add_post(f"/v1/models/{MODEL}:predict", self._predict_v1, expect_handler=self._expect)

    async def _listen(self, app: web.Application, at: Listen) -> int:
        runner = Runner(
            app,
            access_log=None,
            keepalive_timeout=IDLE_TIMEOUT_S,  # for the header of each request, the first one too
            shutdown_timeout=DRAIN_TIMEOUT_S - BODY_TIMEOUT_S,
            auto_decompress=False,  # the limits count bytes as they come
        )
        await runner.setup()
        self._runners.append(runner)
        try:
            await web.TCPSite(runner, at.host, at.port).start()
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot listen on {at.host}:{at.port} ({why}): choose another port") from error
        return int(runner.addresses[0][1])

    async def stop(self) -> None:
        """Accept no more connections, answer the requests in progress (for DRAIN_TIMEOUT_S at most), and close."""
        self.draining = True
        for site in [site for runner in self._runners for site in runner.sites]:
            await site.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                # Once it cleans up, aiohttp drops what arrives of a body.
                while self._pending_bytes:  # noqa: ASYNC110  it is a number
                    await asyncio.sleep(0.05)
        for runner in self._runners:
            await runner.cleanup()
        await self._http.close()

    async def _expect(self, request: web.Request) -> None:
        """Refuse a request before its body is sent, if the client asks with `Expect: 100-continue`."""
        if request.version < HttpVersion11:  # which knows no Expect
            return
        if request.headers["Expect"].lower() != "100-continue":
            raise web.HTTPExpectationFailed
        try:
            self._check(request)
        except web.HTTPException as error:
            raise in_protocol(request.path, error) from None
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0

    def _check(self, request: web.Request) -> str:
        """Return TorchServe's own key, where the request may be passed on."""
        try:
            key = self.server.token("inference")  # it may be the key that the request needs too
            # Of two headers, another server on the way may have looked at the other.
            given = request.headers.getall("Authorization", [])
            allowed = self.tokens.allow(given[0] if len(given) == 1 else "")
        except UserError:
            raise refusal(
                503, "unavailable", "the server has no tokens yet, or cannot read them; try again", {"Retry-After": "1"}
            ) from None
        if not allowed:
            raise refusal(401, "unauthorized", "missing or wrong token: send Authorization: Bearer <inference token>")
        path = request.rel_url.raw_path
        if not path.startswith(PROTOCOLS) and not PREDICTION.fullmatch(path):
            raise refusal(404, "not_found", "predictions are at /predictions/MODEL or /predictions/MODEL/VERSION")
        # The HTTP library takes the last coding of a transfer off, and leaves what others there are.
        unpacked = {"Content-Encoding": "identity", "Transfer-Encoding": "chunked"}
        codings = [(value, plain) for name, plain in unpacked.items() for value in request.headers.getall(name, [])]
        if any(value.strip().lower() != plain for value, plain in codings):
            raise refusal(415, "packed", "the body is packed: send it as it is, a tar or zip for many files")
        if (request.content_length or 0) > MAX_REQUEST_BYTES:
            raise refusal(413, "too_large", f"the request is larger than {MAX_REQUEST_BYTES:,} bytes")
        return key

    async def _predict(self, request: web.Request) -> web.Response:
        key, content_type = self._check(request), request.headers.get("Content-Type", "")
        kind = content_type.partition(";")[0].strip().lower()
        with self._body_counted(request):
            if kind == FORM:
                body = await self._parsed(request, partial(file_of_form, content_type))
            elif kind == JSON:
                body = await self._parsed(request, _checked_json)
            else:
                body = await _body(request)
            # The handler recognises a file by its bytes. From other types TorchServe would make texts and forms of its
            # own, and fail with all requests of the batch where it cannot.
            path = request.rel_url.raw_path
            reply = await self._forward(path, key, JSON if kind == JSON else OCTETS, body)
            if reply.status != 200 and not _problem(reply):
                raise _refusal_of(reply, path)
            return web.Response(body=reply.body, status=reply.status, content_type=reply.kind, headers=reply.headers)

    @contextmanager
    def _body_counted(self, request: web.Request) -> Iterator[None]:
        """Count the body among those in memory while the request is answered."""
        size = MAX_REQUEST_BYTES if request.content_length is None else request.content_length
        if self._pending_bytes + size > MAX_PENDING_BYTES:
            raise refusal(503, "busy", "too many requests in progress; try again", {"Retry-After": "1"})
        self._pending_bytes += size
        try:
            yield
        finally:
            self._pending_bytes -= size

    async def _parsed(self, request: web.Request, parse: Callable[[bytes], Result]) -> Result:
        """What `parse` makes of the request's body. Bodies are parsed one by one: JSON stops all other threads while it
        is read, and between two of them other requests get on."""
        body = await _body(request)
        try:
            async with self._parsing:
                return await asyncio.to_thread(parse, body)
        except RequestError as error:
            raise refusal(400, "bad_request", str(error)) from None

    async def _infer(self, request: web.Request) -> web.Response:
        """Answer /v2/models/NAME/infer. An image that cannot be scored is the answer to the whole request."""
        key, model, version = self._check(request), request.match_info["name"], request.match_info.get("version")
        with self._body_counted(request):
            length = request.headers.get(JSON_LENGTH)
            asked = await self._parsed(request, partial(parse_infer, json_length=length))
            path = f"/predictions/{model}" + (f"/{version}" if version else "")
            if asked.crops is not None:
                reply, headers = await self._ask(path, key, NPY, asked.crops)
                answers: list[dict[str, Any]] = [{"logit": _finite(logit)} for logit in reply["logits"]]
                version = reply["version"]
            else:
                answers, headers = await self._answers(path, key, asked.images)
                version = answers[0]["version"]
            body, own = infer_reply(asked, model, version, answers)
            return web.Response(body=body, headers=headers | own)

    async def _predict_v1(self, request: web.Request) -> web.Response:
        """Answer /v1/models/NAME:predict with the answers of /predictions."""
        key = self._check(request)
        with self._body_counted(request):
            images = await self._parsed(request, parse_predict)
            answers, headers = await self._answers(f"/predictions/{request.match_info['name']}", key, images)
            return web.json_response({"predictions": answers}, headers=headers)

    async def _answers(self, path: str, key: str, images: list[bytes]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The answers of a model to images, and the headers that say what they cost; its error where it has none to one
        of them."""
        if len(images) == 1:
            reply, headers = await self._ask(path, key, OCTETS, images[0])
            if "p_ai" not in reply:  # a tar, a zip or crops: other requests take them
                raise refusal(422, "not_an_image", "the bytes are not an image of any known format")
            return [reply], headers
        reply, headers = await self._ask(path, key, OCTETS, await asyncio.to_thread(tar_of, images))
        for number, answer in enumerate(reply["answers"]):
            del answer["name"]
            if problem := answer.get("error"):
                status = {"busy": 503, "not_finite": 500}.get(problem["code"], 422)
                raise refusal(status, problem["code"], f"image {number}: {problem['message']}")
        return reply["answers"], headers

    async def _ask(self, path: str, key: str, kind: str, body: bytes) -> tuple[dict[str, Any], dict[str, str]]:
        """What TorchServe answers, as JSON, and its headers of ours; raises its error as one of ours."""
        reply = await self._forward(path, key, kind, body)
        if reply.status == 200:
            return _content(reply), reply.headers
        raise _refusal_of(reply, path)

    async def _describe_server(self, request: web.Request) -> web.Response:
        extensions = ["binary_tensor_data"]
        return web.json_response({"name": "patchscan", "version": version_of("patchscan"), "extensions": extensions})

    async def _describe_model(self, request: web.Request) -> web.Response:
        name, versions = await self._versions(request)
        about = {"name": name, "versions": list(versions), "platform": "patchscan"}
        return web.json_response({**about, "inputs": INPUTS, "outputs": OUTPUTS})

    async def _model_ready(self, request: web.Request) -> web.Response:
        """Answer 200 if a worker of the model is READY, else 503."""
        name, versions = await self._versions(request)
        ready = any(versions.values())
        return web.json_response({"name": name, "ready": ready}, status=200 if ready else 503)

    async def _versions(self, request: web.Request) -> tuple[str, dict[str, int]]:
        """The model that is asked for, and the number of READY workers of each of its versions, or of the one."""
        self._check(request)
        name, version = request.match_info["name"], request.match_info.get("version")
        known = await self._shared(name, partial(asyncio.to_thread, self.server.versions, name))
        if known is None:
            raise refusal(503, "unavailable", "TorchServe does not answer; try again", {"Retry-After": "1"})
        versions = {one: ready for one, ready in known.items() if version in (None, one)}
        if not versions:
            raise refusal(404, "not_found", f"there is no model {name}{f' {version}' if version else ''}")
        return name, versions

    async def _shared(self, name: str, ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The answer to a question to TorchServe; whoever asks it meanwhile gets the same. `name` is the question's: a
        model's, or another."""
        if name not in self._questions:
            self._questions[name] = asyncio.create_task(ask())
            self._questions[name].add_done_callback(lambda _: self._questions.pop(name))
        # It goes on when one of those who wait hangs up.
        return cast(Result, await asyncio.shield(self._questions[name]))

    async def _forward(self, path: str, key: str, kind: str, body: bytes) -> Reply:
        url = f"{self.server.addresses.inference_url}{path}"
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        try:
            async with self._http.post(url, data=body, headers=headers) as reply:
                answer = await reply.read()
                own = {name: value for name, value in reply.headers.items() if name.startswith("X-Patchscan-")}
                return Reply(reply.status, reply.content_type, answer, own)
        except TimeoutError:
            raise refusal(504, "timeout", f"no answer in {ANSWER_TIMEOUT_S:.0f} s; try again") from None
        except (aiohttp.ClientError, OSError):
            raise refusal(503, "unavailable", "TorchServe does not answer; try again", {"Retry-After": "1"}) from None

    async def _readyz(self, request: web.Request) -> web.Response:
        """Answer 200 if every model has a READY worker and the server is not stopping, else 503; needs no token."""
        missing = await self._waiting_for()
        about = {"status": "Unhealthy" if missing else "Healthy", "ready": not missing, "waiting_for": missing}
        return web.json_response(about, status=503 if missing else 200)

    async def _waiting_for(self) -> list[str]:
        if time.monotonic() - self._ready[0] > READY_CACHE_S:
            waiting = await self._shared("", partial(asyncio.to_thread, self.server.not_ready))
            self._ready = (time.monotonic(), waiting)
        return ["stopping"] if self.draining else self._ready[1]

    async def _livez(self, request: web.Request) -> web.Response:
        """Answer 200 while TorchServe's process runs, else 503; models that are not ready do not matter."""
        alive = self.server.running
        about = {"status": "Alive" if alive else "Dead", "live": alive}
        return web.json_response(about, status=200 if alive else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Answer with TorchServe's metrics and the gate's own; these alone where TorchServe does not answer in time."""
        ready, torchserve = False, b""
        with suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                ready = not await self._waiting_for()
                torchserve = await self._shared("/metrics", self._torchserve_metrics)
        self._is_ready.set(ready)
        return web.Response(body=torchserve + generate_latest(self._registry), headers={"Content-Type": "text/plain"})

    async def _torchserve_metrics(self) -> bytes:
        """TorchServe's own metrics; empty where it does not answer."""
        try:
            async with self._http.get(self.server.addresses.metrics_url) as reply:
                return await reply.read() if reply.status == 200 else b""
        except (aiohttp.ClientError, OSError, TimeoutError):
            return b""

    @web.middleware
    async def _measure(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count and time each request."""
        started, code = time.perf_counter(), 500
        self._in_flight.inc()
        try:
            reply = await handler(request)
            code = reply.status
            if self.draining:
                reply.force_close()
            return reply
        except web.HTTPException as error:
            code = error.status
            raise
        finally:
            self._in_flight.dec()
            self._requests.labels(str(code)).inc()
            self._seconds.observe(time.perf_counter() - started)


def _content(reply: Reply) -> dict[str, Any]:
    """The JSON of a reply; empty where it holds none."""
    try:
        content = json.loads(reply.body)
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _problem(reply: Reply) -> dict[str, str] | None:
    """The handler's error object; None where TorchServe itself has answered."""
    own = _content(reply).get("error")
    return own if isinstance(own, dict) else None


def _finite(logit: float | None) -> float:
    """The logit; None, or NaN from an older archive, is refused as that of an image is."""
    if logit is None or not math.isfinite(logit):
        raise refusal(500, "not_finite", NOT_FINITE)
    return logit


def _refusal_of(reply: Reply, path: str) -> web.HTTPException:
    """A reply other than 200, to a request for this path, as an error of ours."""
    if own := _problem(reply):
        return refusal(reply.status, own["code"], own["message"])
    if reply.status == 404:
        return refusal(404, "not_found", f"there is no model at {path}")
    if reply.status == 413:  # of many images, which went as a tar
        return refusal(413, "too_large", "the images are too large together; send fewer at once")
    if _content(reply).get("type") == "InvalidKeyException":  # renewed by TorchServe's own API a moment ago
        return refusal(503, "unavailable", "TorchServe has a new key; try again", {"Retry-After": "1"})
    if reply.status < 500:
        return refusal(reply.status, "bad_request", "TorchServe does not take this request")
    code, why = ("busy", "the server is busy") if reply.status == 503 else ("unavailable", "the model failed")
    return refusal(reply.status, code, f"{why}; try again")


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise refusal(408, "slow", f"the body did not arrive in {BODY_TIMEOUT_S:.0f} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise refusal(413, "too_large", f"the request is larger than {MAX_REQUEST_BYTES:,} bytes") from None
    except ConnectionError:  # nobody reads this, but it is counted
        raise refusal(400, "bad_request", "the client hung up within the body") from None


def _checked_json(body: bytes) -> bytes:
    """The body, which is JSON. Raises RequestError."""
    read_json(body)
    return body
