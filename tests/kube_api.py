"""A small Kubernetes API server over real HTTP, for the client code: objects of one namespace, with uid,
resourceVersion, label and field selectors, pages, watches that time out or expire (410), conflicts, pod logs, and a
controller that runs Indexed Jobs by calling a Python function for each pod."""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

from kubernetes import client

from patchscan.scanning.shards import format_ranges

Body = dict[str, Any]
# A pod's work: its Job, its completion index and which try this is (from 0), to its exit code and last words.
Pod = Callable[[Body, int, int], tuple[int, str]]

PATH = re.compile(
    r"/(?:apis/batch/v1|apis/apps/v1|api/v1)/namespaces/[^/]+/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?(?P<sub>/log)?"
)
TOKEN = "a-user's-token"
LISTS = {"jobs": "JobList", "pods": "PodList"}
INDEX = "batch.kubernetes.io/job-completion-index"


class KubeApi:
    """The server, as a context manager. `pod` runs each pod of an Indexed Job; without it Jobs stay as created.

    `faults` are (method, path part, status) that the next matching requests are answered with; `expire_watches` answers
    so many watches with 410; `drop_watches` cuts so many of them off after their first event.
    """

    def __init__(self, pod: Pod | None = None):
        self.pod = pod
        self.faults: list[tuple[str, str, int]] = []
        self.expire_watches = self.drop_watches = 0
        self.requests: list[str] = []
        self.logs: dict[tuple[str, str], str] = {}
        self._version = 100
        self._objects: dict[tuple[str, str], Body] = {}
        self._events: list[tuple[int, str, Body]] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        api = self

        class Handler(_Handler):
            server_api = api  # type: ignore[assignment]  # mypy takes the name for the attribute's own type

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client(self) -> client.ApiClient:
        """A client of the official library."""
        configuration = client.Configuration()
        configuration.host = f"http://127.0.0.1:{self._server.server_port}"
        configuration.api_key["BearerToken"] = f"Bearer {TOKEN}"
        return client.ApiClient(configuration)

    # -- objects ---------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Body | None:
        """The object as it stands."""
        with self._changed:
            return self._objects.get((kind, name))

    def all(self, kind: str) -> list[Body]:
        """Every object of a kind, by name."""
        with self._changed:
            return [body for (one, _), body in sorted(self._objects.items()) if one == kind]

    def put(self, kind: str, body: Body) -> Body:
        """Create or change an object, and tell whoever watches."""
        with self._changed:
            metadata = body["metadata"]
            event = "MODIFIED" if (kind, metadata["name"]) in self._objects else "ADDED"
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
            self._version += 1
            metadata["resourceVersion"] = str(self._version)
            self._objects[kind, metadata["name"]] = body
            self._events.append((self._version, kind, json.loads(json.dumps({"type": event, "object": body}))))
            self._changed.notify_all()
            return body

    def delete(self, kind: str, name: str) -> Body | None:
        """Remove an object, and what it owns."""
        with self._changed:
            body = self._objects.pop((kind, name), None)
            if body is None:
                return None
            self._version += 1
            self._events.append((self._version, kind, {"type": "DELETED", "object": body}))
            self._changed.notify_all()
            owned = [
                key
                for key, one in self._objects.items()
                if any(owner["uid"] == body["metadata"]["uid"] for owner in one["metadata"].get("ownerReferences", []))
            ]
        for owned_kind, owned_name in owned:
            self.delete(owned_kind, owned_name)
        return body

    def watch(self, kind: str, since: int, seconds: float, matches: Callable[[Body], bool]) -> Any:
        """Events after a version, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._changed:
                fresh = [(version, event) for version, one, event in self._events if one == kind and version > since]
                if not fresh:
                    self._changed.wait(min(0.5, max(0.0, end - time.monotonic())))
            for version, event in fresh:
                since = version
                if matches(event["object"]):
                    yield event

    # -- the Indexed Job controller --------------------------------------------------------------------------------

    def run_job(self, job: Body) -> None:
        """Run the Job's pods one after the other, with backoffLimitPerIndex, FailIndex and maxFailedIndexes."""
        spec = job["spec"]
        status: Body = {"active": 1, "succeeded": 0, "failed": 0}
        done: list[int] = []
        given_up: list[int] = []
        name = job["metadata"]["name"]
        fatal = {
            code for rule in spec["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", [])
        }
        for index in range(spec["completions"]):
            for attempt in range(spec["backoffLimitPerIndex"] + 1):
                if self.get("jobs", name) is None:
                    return
                assert self.pod
                code, words = self.pod(job, index, attempt)
                self._record_pod(job, index, attempt, code, words)
                if code == 0:
                    done.append(index)
                    break
                if code in fatal or attempt == spec["backoffLimitPerIndex"]:
                    given_up.append(index)
                    break
            if self.get("jobs", name) is None:
                return
            status |= {
                "succeeded": len(done),
                "completedIndexes": format_ranges(done),
                "failedIndexes": format_ranges(given_up),
            }
            self.put("jobs", job | {"status": dict(status)})
            if len(given_up) > spec["maxFailedIndexes"]:
                break
        kind, reason = ("Failed", "FailedIndexes") if given_up else ("Complete", "CompletionsReached")
        condition = {"type": kind, "status": "True", "reason": reason, "message": reason}
        self.put("jobs", job | {"status": status | {"active": 0, "conditions": [condition]}})

    def _record_pod(self, job: Body, index: int, attempt: int, code: int, words: str) -> None:
        name = f"{job['metadata']['name']}-{index}-{attempt}"
        metadata = {
            "name": name,
            "labels": {"batch.kubernetes.io/job-name": job["metadata"]["name"], INDEX: str(index)},
            "annotations": {INDEX: str(index)},
            "ownerReferences": [{"uid": job["metadata"]["uid"], "kind": "Job", "name": "", "apiVersion": "batch/v1"}],
        }
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "message": words}
        container = {"name": "worker", "ready": False, "restartCount": 0, "image": "x", "imageID": ""}
        status = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [container | {"state": {"terminated": ended}}],
        }
        spec = {"containers": [{"name": "worker", "image": "x"}]}
        self.logs[name, "worker"] = words
        self.put("pods", {"metadata": metadata, "spec": spec, "status": status})


class _Handler(BaseHTTPRequestHandler):
    server_api: KubeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> tuple[KubeApi, re.Match[str] | None, dict[str, str]]:
        address = urlparse(self.path)
        self.server_api.requests.append(f"{self.command} {self.path}")
        return (
            self.server_api,
            PATH.fullmatch(address.path),
            {key: one[0] for key, one in parse_qs(address.query).items()},
        )

    def _fault(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(401, "Unauthorized", "Unauthorized")
            return True
        for fault in self.server_api.faults:
            method, part, status = fault
            if method == self.command and part in self.path:
                self.server_api.faults.remove(fault)
                self._status(status, "Scripted", "scripted fault")
                return True
        return False

    def do_GET(self) -> None:
        api, match, query = self._route()
        if self._fault():
            return None
        if match is None:
            return self._status(404, "NotFound", "no such path")
        kind, name = match["kind"], match["name"]
        if match["sub"]:
            return self._send(200, api.logs.get((name, query.get("container", "")), ""), "text/plain")
        if name:
            body = api.get(kind, name)
            return self._json(200, body) if body else self._status(404, "NotFound", f'{kind} "{name}" not found')
        matches = _selector(query)
        if query.get("watch") in ("true", "True"):
            return self._watch(kind, query, matches)
        found = [body for body in api.all(kind) if matches(body)]
        first, limit = int(query.get("continue", "0")), int(query.get("limit", "500"))
        more = {"continue": str(first + limit)} if len(found) > first + limit else {}
        metadata = {"resourceVersion": str(api._version), **more}
        return self._json(200, {"kind": LISTS[kind], "items": found[first : first + limit], "metadata": metadata})

    def _watch(self, kind: str, query: dict[str, str], matches: Callable[[Body], bool]) -> None:
        api = self.server_api
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if api.expire_watches:
            api.expire_watches -= 1
            gone = {
                "kind": "Status",
                "code": 410,
                "reason": "Expired",
                "message": "too old resource version",
                "metadata": {},
            }
            self._chunk({"type": "ERROR", "object": gone})
        else:
            for event in api.watch(kind, int(query["resourceVersion"]), float(query["timeoutSeconds"]), matches):
                self._chunk(event)
                if api.drop_watches:
                    api.drop_watches -= 1
                    self.close_connection = True
                    return  # no last chunk: the client sees a broken stream
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, event: Body) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    def do_POST(self) -> None:
        api, match, _ = self._route()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fault():
            return None
        assert match
        kind, name = match["kind"], body["metadata"]["name"]
        if api.get(kind, name):
            return self._status(409, "AlreadyExists", f'{kind} "{name}" already exists')
        made = api.put(kind, body | {"status": {}})
        if kind == "jobs" and api.pod and "backoffLimitPerIndex" in body["spec"]:
            threading.Thread(target=api.run_job, args=(json.loads(json.dumps(made)),), daemon=True).start()
        return self._json(201, made)

    def do_PATCH(self) -> None:
        api, match, _ = self._route()
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fault():
            return None
        assert match
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        body = api.get(match["kind"], match["name"])
        if body is None:
            return self._status(404, "NotFound", f'{match["kind"]} "{match["name"]}" not found')
        merged = _merge(body, patch)
        if merged["spec"] != body["spec"]:
            merged["metadata"]["generation"] = body["metadata"].get("generation", 1) + 1
        return self._json(200, api.put(match["kind"], merged))

    def do_DELETE(self) -> None:
        api, match, _ = self._route()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._fault():
            return None
        assert match
        if api.delete(match["kind"], match["name"]) is None:
            return self._status(404, "NotFound", f'{match["kind"]} "{match["name"]}" not found')
        return self._json(200, {"kind": "Status", "status": "Success", "metadata": {}})

    def _status(self, code: int, reason: str, message: str) -> None:
        self._json(code, {"kind": "Status", "code": code, "reason": reason, "message": message, "metadata": {}})

    def _json(self, code: int, body: Body) -> None:
        self._send(code, json.dumps(body), "application/json")

    def _send(self, code: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _merge(body: Any, patch: Any) -> Any:
    """https://www.rfc-editor.org/rfc/rfc7386"""
    if not isinstance(patch, dict):
        return patch
    merged = dict(body) if isinstance(body, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged


def _selector(query: dict[str, str]) -> Callable[[Body], bool]:
    labels = [one.split("=", 1) for one in query.get("labelSelector", "").split(",") if one]
    fields = [one.split("=", 1) for one in query.get("fieldSelector", "").split(",") if one]
    assert all(name == "metadata.name" for name, _ in fields), "only metadata.name is known here"

    def matches(body: Body) -> bool:
        metadata = body["metadata"]
        return all(metadata.get("labels", {}).get(name) == value for name, value in labels) and all(
            metadata["name"] == value for _, value in fields
        )

    return matches
