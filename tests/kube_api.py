"""A small Kubernetes API server over real HTTP, for the client code and for kubectl.

Objects of one namespace with uid, resourceVersion and generation; defaults and validation; label and field selectors;
pages; watches that time out, break or expire (410); merge and strategic merge patches; conflicts; garbage collection by
owner references; pod logs; and controllers that run Indexed Jobs, by calling a Python function for each pod, and keep a
CronJob's history. What a real 1.36 server did is done here alike.
"""

import contextlib
import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlparse

import yaml
from kubernetes import client

from patchscan.scanning.shards import format_ranges
from tests.kube_objects import Body, invalid, merge, strategic_merge, with_defaults

# A pod's work: its Job, its completion index and which try this is (from 0), to its exit code and last words. Exit code
# OOM_KILLED: killed for memory, as the kubelet tells it.
Pod = Callable[[Body, int, int], tuple[int, str]]
OOM_KILLED = 137

PATH = re.compile(
    r"/(?:apis/[a-z0-9.]+|api)/v\d\w*/namespaces/[^/]+/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?(?P<sub>/log)?"
)
NAMESPACE = re.compile(r"/api/v1/(?P<kind>namespaces)(?:/(?P<name>[^/]+))?(?P<sub>/none)?")
TOKEN = "a-user's-token"
INDEX = "batch.kubernetes.io/job-completion-index"
JOB_NAME = "batch.kubernetes.io/job-name"
# The kinds, by group and version: kind and plural.
KINDS = {
    "v1": {
        "ConfigMap": "configmaps",
        "Event": "events",
        "Namespace": "namespaces",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
    },
    "apps/v1": {"Deployment": "deployments"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "batch/v1": {"CronJob": "cronjobs", "Job": "jobs"},
    "monitoring.coreos.com/v1": {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
}
# What `kubectl get all` means.
IN_ALL = ("CronJob", "Deployment", "HorizontalPodAutoscaler", "Job", "Pod", "Service")
KIND_OF = {plural: kind for kinds in KINDS.values() for kind, plural in kinds.items()}


class KubeApi:
    """The server, as a context manager. `pod` runs each pod of an Indexed Job; without it Jobs stay as created.

    `faults` are (method, path part, status) that the next matching requests are answered with; `expire_watches` answers
    so many watches with 410; `drop_watches` cuts so many of them off after their first event, `cut_watches` ends so
    many in order in the middle of it, as a proxy may; `expire_lists` answers so many further pages of lists with 410.
    `lost_replies` are (method, path part) of requests that are done, and answered with 504.
    """

    def __init__(self, pod: Pod | None = None):
        self.pod = pod
        self.faults: list[tuple[str, str, int]] = []
        self.expire_watches = self.drop_watches = self.cut_watches = self.expire_lists = 0
        self.lost_replies: list[tuple[str, str]] = []
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
        configuration.retries = False  # as Cluster.connect has it
        return client.ApiClient(configuration)

    def kubeconfig(self, folder: Path) -> Path:
        """Write a kubeconfig for this server into the folder; returns its path."""
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "bench",
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "me", "namespace": "default"}}],
            "clusters": [{"name": "bench", "cluster": {"server": self.client().configuration.host}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
        }
        (folder / "kubeconfig").write_text(yaml.safe_dump(text))
        return folder / "kubeconfig"

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
            self._store(kind, body)
            self._collect_garbage()
            return body

    def delete(self, kind: str, name: str, orphan: bool = False) -> Body | None:
        """Remove an object, and what only it owns unless `orphan`, as the garbage collector does."""
        with self._changed:
            body = self._objects.pop((kind, name), None)
            if body is None:
                return None
            self._tell(kind, "DELETED", body)
            if orphan:
                for owned in self._objects.values():
                    owners = owned["metadata"].get("ownerReferences", [])
                    kept = [owner for owner in owners if owner["uid"] != body["metadata"]["uid"]]
                    owned["metadata"]["ownerReferences"] = kept
            self._collect_garbage()
        return body

    def _store(self, kind: str, body: Body) -> None:
        metadata = body["metadata"]
        event = "MODIFIED" if (kind, metadata["name"]) in self._objects else "ADDED"
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        self._objects[kind, metadata["name"]] = body
        self._tell(kind, event, body)

    def _tell(self, kind: str, event: str, body: Body) -> None:
        """A new version of an object, for whoever watches."""
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, kind, copy.deepcopy({"type": event, "object": body})))
        self._changed.notify_all()

    def _collect_garbage(self) -> None:
        """Remove every object that names owners none of which exists any more."""
        while True:
            uids = {body["metadata"]["uid"] for body in self._objects.values()}
            orphans = [
                key
                for key, body in self._objects.items()
                if (owners := body["metadata"].get("ownerReferences")) and not uids & {owner["uid"] for owner in owners}
            ]
            if not orphans:
                return
            for kind, name in orphans:
                self._tell(kind, "DELETED", self._objects.pop((kind, name)))

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

    def wait_for_end(self, pod: str) -> None:
        """Return when the pod has ended, or after 30 seconds."""

        def ended() -> bool:
            body = self._objects.get(("pods", pod), {})
            return body.get("status", {}).get("phase", "Failed") in ("Succeeded", "Failed")

        with self._changed:
            self._changed.wait_for(ended, 30)

    # -- controllers -----------------------------------------------------------------------------------------------

    def run_job(self, job: Body) -> None:
        """Run the Job's pods one after the other, with backoffLimitPerIndex, FailIndex and maxFailedIndexes."""
        spec, name = job["spec"], job["metadata"]["name"]
        status: Body = {"active": 1, "succeeded": 0, "failed": 0}
        done: list[int] = []
        given_up: list[int] = []
        fatal = {
            code for rule in spec["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", [])
        }
        for index in range(spec["completions"]):
            for attempt in range(spec["backoffLimitPerIndex"] + 1):
                code = self._run_pod(job, index, attempt)
                if self.get("jobs", name) is None:
                    return
                status["failed"] += code != 0
                if code == 0:
                    done.append(index)
                elif code in fatal or attempt == spec["backoffLimitPerIndex"]:
                    given_up.append(index)
                status |= {
                    "succeeded": len(done),
                    "completedIndexes": format_ranges(done),
                    "failedIndexes": format_ranges(given_up),
                }
                self._set_status(name, status)
                if code == 0 or index in given_up:
                    break
            if len(given_up) > spec["maxFailedIndexes"]:
                break
        first, kind, reason = (
            ("FailureTarget", "Failed", "FailedIndexes")
            if given_up
            else ("SuccessCriteriaMet", "Complete", "CompletionsReached")
        )
        # A condition of its own comes first, while the last pods are ending.
        conditions = [{"type": one, "status": "True", "reason": reason, "message": reason} for one in (first, kind)]
        self._set_status(name, status | {"conditions": conditions[:1]})
        self._set_status(name, status | {"active": 0, "conditions": conditions})
        self.keep_history()

    def _set_status(self, job: str, status: Body) -> None:
        """Write a Job's status; its spec may have been patched meanwhile."""
        with self._changed:
            if found := self.get("jobs", job):
                self.put("jobs", found | {"status": copy.deepcopy(status)})

    def _run_pod(self, job: Body, index: int, attempt: int) -> int:
        """Run one pod; its status says so while it runs and after it has ended. Returns its exit code."""
        assert self.pod
        if self.get("jobs", job["metadata"]["name"]) is None:
            return 0
        body = job_pod(job, index, attempt)
        self.put("pods", body | {"status": container_status("Running", {"running": {}})})
        code, words = self.pod(job, index, attempt)
        reason = {0: "Completed", OOM_KILLED: "OOMKilled"}.get(code, "Error")
        ended = {"terminated": {"exitCode": code, "reason": reason, "message": words}}
        self.logs[body["metadata"]["name"], "worker"] = words
        if self.get("pods", body["metadata"]["name"]):
            self.put("pods", body | {"status": container_status("Succeeded" if code == 0 else "Failed", ended)})
        return code

    def keep_history(self) -> None:
        """Remove the oldest finished Jobs of every CronJob beyond its limits, as its controller does. It looks at Jobs
        that it controls only, which an owner reference without `controller: true` does not say."""
        for cron_job in self.all("cronjobs"):
            mine = [job for job in self.all("jobs") if _controller(job) == cron_job["metadata"]["uid"]]
            mine.sort(key=lambda job: (job["metadata"]["creationTimestamp"], int(job["metadata"]["resourceVersion"])))
            for condition, limit in (
                ("Complete", cron_job["spec"].get("successfulJobsHistoryLimit", 3)),
                ("Failed", cron_job["spec"].get("failedJobsHistoryLimit", 1)),
            ):
                ended = [job for job in mine if condition in conditions(job)]
                for job in ended[: max(0, len(ended) - limit)]:
                    self.delete("jobs", job["metadata"]["name"])


def job_pod(job: Body, index: int | None, attempt: int) -> Body:
    """A pod of a Job, without a status."""
    name, template = job["metadata"]["name"], job["spec"].get("template", {})
    numbered = {} if index is None else {INDEX: str(index)}
    labels = template.get("metadata", {}).get("labels", {}) | {JOB_NAME: name, **numbered}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": True}
    metadata = {
        "name": f"{name}-{0 if index is None else index}-{attempt}",
        "labels": labels,
        "annotations": dict(numbered),
        "ownerReferences": [owner],
    }
    return {"metadata": metadata, "spec": template.get("spec") or {"containers": [{"name": "worker", "image": "x"}]}}


def container_status(phase: str, state: Body, name: str = "worker") -> Body:
    """The status of a pod whose one container is in this state."""
    container = {"name": name, "ready": "running" in state, "restartCount": 0, "image": "x", "imageID": ""}
    return {"phase": phase, "containerStatuses": [container | {"state": state}]}


def unschedulable(message: str) -> Body:
    """The status of a pod that no node has room for."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def conditions(body: Body) -> set[str]:
    """The types of an object's conditions that are true."""
    found = body.get("status", {}).get("conditions", [])
    return {condition["type"] for condition in found if condition["status"] == "True"}


def _controller(body: Body) -> str | None:
    owners = body["metadata"].get("ownerReferences", [])
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


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
            PATH.fullmatch(address.path) or NAMESPACE.fullmatch(address.path),
            {key: one[0] for key, one in parse_qs(address.query).items()},
        )

    def _fault(self) -> bool:
        # kubectl sends no token where there is no TLS; the official Python library does.
        kubectl = self.headers.get("User-Agent", "").startswith("kubectl")
        if not kubectl and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._status(401, "Unauthorized", "Unauthorized")
            return True
        for fault in self.server_api.faults:
            method, part, status = fault
            if method == self.command and part in self.path:
                self.server_api.faults.remove(fault)
                self._status(status, "Conflict" if status == 409 else "Scripted", "scripted fault")
                return True
        return False

    def do_GET(self) -> None:
        api, match, query = self._route()
        if self._fault():
            return None
        if match is None:
            described = discovery(urlparse(self.path).path)
            return self._json(200, described) if described else self._status(404, "NotFound", "no such path")
        kind, name = match["kind"], match["name"]
        if match["sub"]:
            if query.get("follow") == "true":
                api.wait_for_end(name)
            return self._send(200, api.logs.get((name, query.get("container", "")), ""), "text/plain")
        if name:
            body = api.get(kind, name)
            return self._json(200, body) if body else self._status(404, "NotFound", f'{kind} "{name}" not found')
        matches = _selector(query)
        if query.get("watch") in ("true", "True"):
            return self._watch(kind, query, matches)
        found = [body for body in api.all(kind) if matches(body)]
        if "continue" in query and api.expire_lists:
            api.expire_lists -= 1
            return self._status(410, "Expired", "The provided continue parameter is too old")
        first, limit = int(query.get("continue", "0")), int(query.get("limit", "500"))
        more = {"continue": str(first + limit)} if len(found) > first + limit else {}
        metadata = {"resourceVersion": str(api._version), **more}
        listed = {"kind": f"{KIND_OF[kind]}List", "apiVersion": "v1"}
        return self._json(200, listed | {"items": found[first : first + limit], "metadata": metadata})

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
                if api.cut_watches:
                    api.cut_watches -= 1
                    self._chunk(event, 40)
                    break
                self._chunk(event)
                if api.drop_watches:
                    api.drop_watches -= 1
                    self.close_connection = True
                    return  # no last chunk: the client sees a broken stream
        with contextlib.suppress(BrokenPipeError):  # the client may have had what it waited for, and ended
            self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, event: Body, length: int | None = None) -> None:
        line = (json.dumps(event).encode() + b"\n")[:length]
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    def do_POST(self) -> None:
        api, match, _ = self._route()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fault():
            return None
        assert match
        kind, metadata = match["kind"], body["metadata"]
        metadata.setdefault("name", f"{metadata.get('generateName', '')}{uuid.uuid4().hex[:5]}")
        if api.get(kind, metadata["name"]):
            return self._status(409, "AlreadyExists", f'{kind} "{metadata["name"]}" already exists')
        if problem := invalid(body):
            return self._status(422, "Invalid", f'{body["kind"]} "{metadata["name"]}" is invalid: {problem}')
        metadata |= {"uid": str(uuid.uuid4()), "generation": 1}
        made = api.put(kind, with_defaults(kind, body | {"status": {}}))
        if kind == "jobs" and api.pod and "backoffLimitPerIndex" in body["spec"]:
            threading.Thread(target=api.run_job, args=(copy.deepcopy(made),), daemon=True).start()
        return self._json(201, made)

    def do_PATCH(self) -> None:
        api, match, query = self._route()
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fault():
            return None
        assert match
        kind, name = match["kind"], match["name"]
        body = api.get(kind, name)
        if body is None:
            return self._status(404, "NotFound", f'{kind} "{name}" not found')
        how = {
            "application/merge-patch+json": merge,
            "application/strategic-merge-patch+json": strategic_merge,
        }[self.headers["Content-Type"]]
        merged = with_defaults(kind, how(copy.deepcopy(body), patch))
        if problem := invalid(merged):
            return self._status(422, "Invalid", f'{kind} "{name}" is invalid: {problem}')
        if merged == body:
            return self._json(200, body)
        if query.get("dryRun") == "All":
            return self._json(200, merged)
        if merged.get("spec") != body.get("spec"):
            merged["metadata"]["generation"] = body["metadata"].get("generation", 1) + 1
        return self._json(200, api.put(kind, merged))

    def do_DELETE(self) -> None:
        api, match, query = self._route()
        options = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self._fault():
            return None
        assert match
        policy = query.get("propagationPolicy") or options.get("propagationPolicy")
        # Of all kinds, a Job alone leaves what it owns behind where nobody says otherwise.
        orphan = policy == "Orphan" or (policy is None and match["kind"] == "jobs")
        if api.delete(match["kind"], match["name"], orphan) is None:
            return self._status(404, "NotFound", f'{match["kind"]} "{match["name"]}" not found')
        return self._json(200, {"kind": "Status", "status": "Success", "metadata": {}})

    def _status(self, code: int, reason: str, message: str) -> None:
        self._json(code, {"kind": "Status", "code": code, "reason": reason, "message": message, "metadata": {}})

    def _json(self, code: int, body: Body) -> None:
        for method, part in self.server_api.lost_replies:
            if method == self.command and part in self.path:
                self.server_api.lost_replies.remove((method, part))
                code, body = 504, {"kind": "Status", "message": "the reply was lost"}
                break
        self._send(code, json.dumps(body), "application/json")

    def _send(self, code: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(code)
        if code in (429, 503):
            self.send_header("Retry-After", "15")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def discovery(path: str) -> Body | None:
    """What kubectl asks first: which groups, versions and kinds there are."""
    groups = [version for version in KINDS if "/" in version]
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": group, "version": group.partition("/")[2]} for group in groups]
        named = [
            {"name": one["groupVersion"].partition("/")[0], "versions": [one], "preferredVersion": one}
            for one in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "watch"]
    resources = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "kind": kind,
            "namespaced": kind != "Namespace",
            "verbs": verbs,
            "categories": ["all"] if kind in IN_ALL else [],
        }
        for kind, plural in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _selector(query: dict[str, str]) -> Callable[[Body], bool]:
    labels = [one.replace("==", "=").split("=", 1) for one in query.get("labelSelector", "").split(",") if one]
    fields = [one.split("=", 1) for one in query.get("fieldSelector", "").split(",") if one]
    # A real server knows these fields of these kinds, and answers 400 to others.
    known = ("metadata.name", "status.phase", "involvedObject.name", "involvedObject.kind", "involvedObject.uid")
    assert all(name in known for name, _ in fields), fields

    def matches(body: Body) -> bool:
        of = body["metadata"].get("labels", {})
        return all(of.get(name) == value for name, value in labels) and all(
            _field(body, name) == value for name, value in fields
        )

    return matches


def _field(body: Body, path: str) -> Any:
    found: Any = body
    for name in path.split("."):
        found = found.get(name, {})
    return found
