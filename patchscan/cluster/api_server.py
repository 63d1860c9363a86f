"""Send requests to the API server of a Kubernetes cluster, again where it is busy or unreachable, and read its answers.

The only module that calls the Kubernetes API.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from patchscan.cluster.pods import Body
from patchscan.common.errors import UserError
from patchscan.common.retries import OutageError, Retries, TransientError

ANSWER_S = 30
BUSY = {429, 500, 502, 503, 504}
# The HTTP status for a resource version that the server no longer has; the watch or list is started again.
EXPIRED = 410

Result = TypeVar("Result")


class ClusterError(UserError):
    """No cluster is configured, or it refuses the request; the message says why."""


class AlreadyExistsError(Exception):
    """An object of this name exists already."""


class NotFoundError(ClusterError):
    """404: there is no such object."""


class ExpiredError(Exception):
    """410: the server no longer has this resource version or the rest of this list."""


class ApiServer:
    """The API server that a client of the Kubernetes library is connected to. Requests are retried for `patience_s`
    seconds."""

    def __init__(self, api: client.ApiClient, patience_s: float):
        self.api = api
        self._retries = Retries(patience_s, other_side="the cluster's API server")

    def ask(self, method: str, path: str, body: Body | None = None, query: dict[str, str] | None = None) -> Body:
        """Send a request, retried, and return the answer's JSON. Raises OutageError and what `ask_once` raises."""
        return self.retried(lambda: self.ask_once(method, path, body, query))[0]

    def retried(self, send: Callable[[], Result]) -> tuple[Result, int]:
        """Return what `send` returns, and the number of tries that it took. Raises OutageError after `patience_s`."""
        try:
            return self._retries.call(send)
        except TransientError as error:
            raise OutageError(f"the cluster's API server does not answer: {error}") from error

    def ask_once(self, method: str, path: str, body: Body | None = None, query: dict[str, str] | None = None) -> Body:
        """Send a request once. Raises TransientError where trying again may help, ClusterError, AlreadyExistsError and
        ExpiredError."""
        with _translated_errors():
            result: Body = json.loads(self._send(method, path, query or {}, body, ANSWER_S).read())
            return result

    def stream(self, path: str, query: dict[str, str], silence_s: float | None) -> Iterator[bytes]:
        """Ask for a long answer, and return its lines, with at most `silence_s` seconds between two of them (None: no
        limit). Raises TransientError here and, where the connection breaks, between two lines.
        """
        with _translated_errors():
            return _lines(self._send("GET", path, query, None, (ANSWER_S, silence_s)).response)

    def _send(self, method: str, path: str, query: dict[str, str], body: Body | None, timeout: Any) -> Any:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        request = self.api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        reply = self.api.call_api(*request[:4], _request_timeout=timeout)
        if not 200 <= reply.status < 300:
            raise _error_for_reply(reply.status, reply.read())
        return reply


def _lines(response: Any) -> Iterator[bytes]:
    with _translated_errors(), contextlib.closing(response):
        yield from response


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
        raise TransientError(str(error)) from error
    except ValueError as error:  # without its text, which can contain the token
        what = (
            "its answer is no JSON; does the kubeconfig name an API server?"
            if isinstance(error, json.JSONDecodeError)
            else "the address or token in the kubeconfig cannot be sent; does one end in a line break?"
        )
        raise ClusterError(f"the cluster's API server cannot be asked: {what}") from None


def _error_for_reply(status: int, body: bytes) -> Exception:
    """The error for a reply other than 2xx. Its text is the API server's message, which names the object and the
    field."""
    try:
        answer = json.loads(body)
        message, reason = answer["message"], answer.get("reason")
    except (ValueError, KeyError, TypeError):
        message, reason = body.decode(errors="replace")[:300], None
    if status in BUSY or reason == "Conflict":
        return TransientError(f"{status} {message}")
    if status == EXPIRED:
        return ExpiredError(message)
    if status == 401:
        return ClusterError(
            f"the cluster refuses (401): {message}; the credentials are wrong or have expired, or the kubeconfig's "
            "program for them has failed: `kubectl auth whoami` says more"
        )
    if status == 404:
        return NotFoundError(f"the cluster says: {message}")
    if status == 409:
        return AlreadyExistsError(message)
    return ClusterError(f"the cluster refuses ({status}): {message}")
