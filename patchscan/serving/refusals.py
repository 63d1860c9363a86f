"""What the gate answers to a request that it refuses: JSON as docs/serve.md states it, also where the HTTP library
refuses one before the gate sees it."""

import json
from collections.abc import Awaitable, Callable

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD

# What begins the paths whose errors are of another form than TorchServe's.
PROTOCOLS = ("/v2", "/v1")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BaseHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.HTTPException:
    """Build the exception for aiohttp to answer with: an error object like the handler's; closes the connection."""
    text = json.dumps({"error": {"code": code, "message": message}})
    headers = {**({"WWW-Authenticate": "Bearer"} if status == 401 else {}), **(headers or {})}
    error = web.HTTPException(text=text, content_type="application/json", headers=headers)
    error.set_status(status)
    error.force_close()
    return error


def in_protocol(path: str, error: web.HTTPException) -> web.HTTPException:
    """The error as the protocol of this path has it: those of the Open Inference Protocol are a text, with the code
    beside it."""
    if path.startswith(PROTOCOLS) and error.text:
        problem = json.loads(error.text)["error"]
        if isinstance(problem, dict):
            error.text = json.dumps({"error": problem["message"], "code": problem["code"]})
    return error


@web.middleware
async def errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every refusal the form that docs/serve.md states, those of aiohttp's router too."""
    try:
        return await handler(request)
    except web.HTTPNotFound:  # the router's, as that below: the gate's own are of no such class
        error = refusal(404, "not_found", f"there is nothing at {request.path[:200]}")
        raise in_protocol(request.path, error) from None
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        unfit = refusal(405, "method_not_allowed", f"this path takes {allowed}", {"Allow": allowed})
        raise in_protocol(request.path, unfit) from None
    except web.HTTPException as error:
        raise in_protocol(request.path, error) from None


class Runner(web.AppRunner):
    """Runs an application whose refusals are JSON also where aiohttp answers in its place."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        handler = _expectations_in_json(server.request_handler)
        return _Server(handler, request_factory=server.request_factory, **self._kwargs)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    _newest_body: StreamReader = EMPTY_PAYLOAD

    def data_received(self, data: bytes) -> None:
        """Note the body of the newest request."""
        super().data_received(data)
        if self._messages:
            self._newest_body = self._messages[-1][1]

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio takes None for False
        """Return whether the connection stays open for an answer: its client has sent a whole request and says that it
        will send no more, as `nc -N` does. aiohttp would close it at once."""
        is_answering = self._waiter is None or self._waiter.done()
        if is_answering and self._newest_body.is_eof():
            self.close()  # after the answer
            return True
        return False

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what is no HTTP request, and a request at which the gate failed."""
        if isinstance(exc, LineTooLong):
            error = refusal(431, "too_large", "the path, or a header, is too long")
        elif isinstance(exc, HttpProcessingError):
            why = exc.message.partition(":\n")[0][:200]  # without a drawing of where it is
            error = refusal(400, "bad_request", f"this is no HTTP request: {why}")
        else:
            super().handle_error(request, status, exc, message)  # writes the error to the log
            error = refusal(500, "internal_error", "a bug of the gate; its log has the details")
        in_protocol(request.path, error)
        reply = web.Response(text=error.text, status=error.status, content_type=error.content_type)
        reply.force_close()
        return reply


def _expectations_in_json(handler: BaseHandler) -> BaseHandler:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPExpectationFailed:  # comes before the middlewares
            error = refusal(417, "expectation", "the header Expect may say nothing but 100-continue")
            raise in_protocol(request.path, error) from None

    return handle
