"""Create Jobs in one namespace of a Kubernetes cluster, follow them to their end, and find out why their pods failed.

Errors: ClusterError where the request is wrong or not allowed, AlreadyExistsError and JobGoneError where the cluster is
not in the expected state, OutageError where it is unreachable.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self
from urllib.parse import unquote

import urllib3
import yaml
from kubernetes import client, config

from patchscan.cluster.api_server import (
    ANSWER_S,
    AlreadyExistsError,
    ApiServer,
    ClusterError,
    ExpiredError,
    NotFoundError,
)
from patchscan.cluster.pods import INDEX, JOB_NAME, WORDS, Body, PodState, pod_state, true_condition
from patchscan.common.retries import OutageError, TransientError
from patchscan.scanning import shards

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# The label of all that is patchscan's, and its selector.
OUR_LABEL = {"app.kubernetes.io/part-of": "patchscan"}
PART_OF = ",".join(map("=".join, OUR_LABEL.items()))
# The kinds that can be used: API group and plural.
PATHS = {
    "Job": ("apis/batch/v1", "jobs"),
    "CronJob": ("apis/batch/v1", "cronjobs"),
    "Event": ("api/v1", "events"),
    "Pod": ("api/v1", "pods"),
    "ConfigMap": ("api/v1", "configmaps"),
    "Service": ("api/v1", "services"),
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "Deployment": ("apis/apps/v1", "deployments"),
}
# What objects of these kinds, and namespaces, may be called. An address with another name, or an empty one, is that of
# something else, such as all objects of the kind.
NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
# An annotation of each Job that is created here: which call did.
REQUEST_ANNOTATION = "patchscan/request"
# The server ends a watch after so many seconds; a new one is started from the Job's state at that time. So `follow`
# yields a state at least that often, and who follows can say what it waits for.
WATCH_S = 60
PAGE = 500
# The most characters that an event's message may have.
EVENT_MESSAGE = 1024
LIST_TRIES = 5


class JobGoneError(Exception):
    """The Job was deleted while it was being followed."""


@dataclass(frozen=True)
class Job:
    """A Job as last read from the cluster. `failed_indexes` have failed for good, `failed_pods` counts pods;
    `condition` is Complete, Failed, Suspended or None; `created_at` is ISO 8601, UTC; `template` is its pod template as
    the API's JSON; `indexed` says whether its pods have a completion index."""

    name: str
    uid: str
    version: str
    labels: dict[str, str]
    annotations: dict[str, str]
    completions: int
    active: int
    succeeded: int
    failed_indexes: list[int]
    condition: str | None
    message: str
    created_at: str
    template: Body = field(repr=False)
    failed_pods: int = 0
    parallelism: int = 1
    indexed: bool = False

    @property
    def reference(self) -> Body:
        """What names it to `Cluster.record`."""
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": self.name, "uid": self.uid}}

    @property
    def finished(self) -> bool:
        """Whether the Job is complete or has failed."""
        return self.condition in ("Complete", "Failed")

    @property
    def is_ours(self) -> bool:
        """Whether the Job has patchscan's label, by which `Cluster.jobs` lists it."""
        return OUR_LABEL.items() <= self.labels.items()

    def check_ours(self) -> None:
        """Raise ClusterError where the Job is not patchscan's."""
        if not self.is_ours:
            raise ClusterError(f"the Job {self.name} is not patchscan's, it lacks the label {PART_OF}: use kubectl")


class Cluster:
    """One namespace of a cluster. Calls are retried while the API server is busy or unreachable, for `patience_s`
    seconds, and then raise OutageError; `pause_s` is about how long `follow` waits between two watches, in seconds.

    Objects are the API's own JSON: the client's typed models refuse some that the server accepts (`nvidia.com/gpu: 1`).
    """

    def __init__(self, api: client.ApiClient, namespace: str, patience_s: float = 300.0, pause_s: float = 2.0):
        self.namespace, self.pause_s = namespace, pause_s
        self._server = ApiServer(api, patience_s)

    @classmethod
    def connect(cls, namespace: str | None = None, context: str | None = None, patience_s: float = 30.0) -> Self:
        """Connect to the cluster that this pod runs in, else to the one of the user's kubeconfig. Raises
        ClusterError."""
        settings = client.Configuration()
        # By itself urllib3 tries three times, and before each waits as long as a Retry-After header says: in silence.
        settings.retries = False
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and NAMESPACE_FILE.exists():
                config.load_incluster_config(client_configuration=settings)
                namespace = NAMESPACE_FILE.read_text().strip() if namespace is None else namespace
            else:
                config.load_kube_config(context=context, client_configuration=settings)
                namespace = _default_namespace(context) if namespace is None else namespace
        except (config.ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, LookupError) as error:
            # A kubeconfig that is no YAML, or has another form, fails anywhere in the client library.
            why = " ".join(str(error).split())
            raise ClusterError(f"no cluster is configured: {why}; set KUBECONFIG or choose a --context") from error
        _check_name("namespace", namespace)
        # The client library takes a proxy's address from the environment or the kubeconfig, but does not log in there.
        if settings.proxy and (login := urllib3.util.parse_url(settings.proxy).auth):
            settings.proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(login))
        return cls(client.ApiClient(settings), namespace, patience_s)

    # -- Jobs ------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> Job | None:
        """The Job of this name, or None."""
        found = self.get("Job", name)
        return _job(found) if found else None

    def jobs(self, selector: str = PART_OF) -> list[Job]:
        """The Jobs with these labels, oldest first."""
        found = map(_job, self._list("Job", selector))
        return sorted(found, key=lambda job: (job.created_at, job.name))

    def create_job(self, body: Body) -> Job:
        """Create a Job. Raises AlreadyExistsError, ClusterError."""
        # A try whose reply was lost may have created it: then the next one finds it there.
        mark = {REQUEST_ANNOTATION: uuid.uuid4().hex}
        marked = body["metadata"] | {"annotations": (body["metadata"].get("annotations") or {}) | mark}
        try:
            return _job(self.create(body | {"metadata": marked}))
        except AlreadyExistsError:
            there = self.job(body["metadata"]["name"])
            if there is None or not mark.items() <= there.annotations.items():
                raise
            return there

    def create(self, body: Body) -> Body:
        """Create an object of a kind in PATHS; returns it as the cluster stored it.

        Raises AlreadyExistsError, ClusterError.
        """
        if body.get("kind") not in PATHS:
            raise ClusterError(f"patchscan creates no {body.get('kind')}, only {', '.join(PATHS)}; use kubectl apply")
        return self._server.ask("POST", self._path(body["kind"]), body)

    def delete_job(self, name: str) -> bool:
        """Delete a Job and its pods, which get SIGTERM. Returns whether the Job existed."""
        path = self._path("Job", name)

        def delete() -> bool:
            try:
                self._server.ask_once("DELETE", path, query={"propagationPolicy": "Background"})
            except NotFoundError:
                return False
            return True

        existed, tries = self._server.retried(delete)
        return existed or tries > 1  # a try whose reply was lost has deleted it

    def patch_job(self, name: str, body: Body) -> None:
        """Merge `body` into a Job. Raises JobGoneError where it is deleted, ClusterError, OutageError."""
        try:
            self.patch("Job", name, body)
        except NotFoundError:
            raise JobGoneError(name) from None

    def get(self, kind: str, name: str) -> Body | None:
        """The object of a kind in PATHS and this name, or None."""
        try:
            return self._server.ask("GET", self._path(kind, name))
        except NotFoundError:
            return None

    def patch(self, kind: str, name: str, body: Body) -> Body:
        """Merge `body` into an object; None removes a field. Returns the new object. Raises ClusterError."""
        return self._server.ask("PATCH", self._path(kind, name), body)

    def follow(self, name: str) -> Iterator[Job]:
        """Yield the Job's states from now until it has finished, through broken connections and expired watches.

        Raises JobGoneError where it is deleted, OutageError and ClusterError.
        """
        while True:
            job = self.job(name)
            if job is None:
                raise JobGoneError(name)
            yield job
            if job.finished:
                return
            # Whatever ends a watch (its time limit, a broken connection, an expired resource version): the loop then
            # reads the Job's state anew.
            with contextlib.suppress(TransientError, ExpiredError):
                for state in self._watch(job):
                    yield state
                    if state.finished:
                        return
            time.sleep(self.pause_s * random.uniform(0.5, 1.5))

    def _watch(self, job: Job) -> Iterator[Job]:
        """The states after this one, until the server ends the watch."""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={job.name}",
            "resourceVersion": job.version,
            "timeoutSeconds": str(WATCH_S),
        }
        for line in self._server.stream(self._path("Job"), query, WATCH_S + ANSWER_S):
            try:
                event = json.loads(line)
            except ValueError:
                raise TransientError("the watch ended in the middle of a line") from None
            if event["type"] == "DELETED":
                raise JobGoneError(job.name)
            if event["type"] == "ERROR":
                raise TransientError(event["object"].get("message", "the watch ended"))
            yield _job(event["object"])

    # -- pods ------------------------------------------------------------------------------------------------------

    def pods(self, job: str, index: int | None = None) -> list[Body]:
        """The Job's pods (of one index), oldest first."""
        return self.labelled_pods(f"{JOB_NAME}={job}" + ("" if index is None else f",{INDEX}={index}"))

    def failed_pods(self, job: str) -> list[PodState]:
        """The Job's failed pods, oldest first."""
        return [pod_state(pod) for pod in _oldest_first(self._list("Pod", f"{JOB_NAME}={job}", "status.phase=Failed"))]

    def labelled_pods(self, selector: str = PART_OF) -> list[Body]:
        """The pods with these labels, oldest first."""
        return _oldest_first(self._list("Pod", selector))

    def log(self, pod: str, container: str, follow: bool = False) -> Iterator[str]:
        """The lines of a container's log; with `follow` until it ends."""
        path, query = f"{self._path('Pod', pod)}/log", {"container": container, "follow": str(follow).lower()}
        # A pod that is followed may log nothing for any length of time.
        silence_s = None if follow else ANSWER_S
        try:
            for line in self._server.retried(lambda: self._server.stream(path, query, silence_s))[0]:
                yield line.decode(errors="replace").rstrip("\n")
        except (TransientError, OutageError) as error:
            raise OutageError(f"the log of {pod} cannot be read, or broke off: {error}") from error

    # -- events ----------------------------------------------------------------------------------------------------

    def warning(self, kind: str, name: str) -> str:
        """The newest warning about an object, as `kubectl describe` shows it; empty where there is none, or where this
        account may not list events."""
        try:
            found = list(self._list("Event", fields=f"involvedObject.kind={kind},involvedObject.name={name}"))
        except ClusterError:
            return ""
        warnings = [event for event in found if event.get("type") == "Warning"]
        newest = max(warnings, key=_time_of_event, default={})
        return ": ".join(newest[name] for name in ("reason", "message") if newest.get(name))[:WORDS]

    def record(self, on: Body, reason: str, message: str, warning: bool = False) -> None:
        """Record an event on an object, for `kubectl describe`. `on` is the object's JSON; `reason` is one word in
        CamelCase. An event of the same words is counted up.

        Events are for people who look: where one cannot be recorded, the work goes on without it.
        """
        metadata, now = on["metadata"], datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        key = hashlib.sha256(f"{metadata['uid']} {reason} {message}".encode()).hexdigest()[:16]
        named = {name: on[name] for name in ("apiVersion", "kind")} | {"namespace": self.namespace}
        name = f"{metadata['name'][:200]}.{key}"
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "labels": OUR_LABEL},
            "involvedObject": named | {"name": metadata["name"], "uid": metadata["uid"]},
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message[:EVENT_MESSAGE],
            "source": {"component": "patchscan"},
            "reportingComponent": "patchscan",
            "reportingInstance": "patchscan",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        path = self._path("Event", name)
        with contextlib.suppress(ClusterError, TransientError):
            try:
                self._server.ask_once("POST", self._path("Event"), body)
            except AlreadyExistsError:
                count = self._server.ask_once("GET", path).get("count", 1)
                self._server.ask_once("PATCH", path, {"count": count + 1, "lastTimestamp": now})

    # -- addresses and lists ---------------------------------------------------------------------------------

    def _path(self, kind: str, name: str | None = None) -> str:
        """The address of the object of this name, or of all of a kind. Raises ClusterError for a name that none can
        have."""
        group, plural = PATHS[kind]
        folder = f"/{group}/namespaces/{self.namespace}/{plural}"
        if name is None:
            return folder
        _check_name(kind, name)
        return f"{folder}/{name}"

    def _list(self, kind: str, labels: str = "", fields: str = "") -> list[Body]:
        """Objects of a kind, page by page. A page that comes so late that the server has forgotten the first one (410)
        makes the listing begin anew."""
        query = {"limit": str(PAGE)} | ({"labelSelector": labels} if labels else {})
        query |= {"fieldSelector": fields} if fields else {}
        for _ in range(LIST_TRIES):
            with contextlib.suppress(ExpiredError):
                return self._pages(kind, query)
        raise OutageError(f"the cluster's API server forgets a list of {PATHS[kind][1]} before it is read")

    def _pages(self, kind: str, query: dict[str, str]) -> list[Body]:
        found: list[Body] = []
        following: dict[str, str] = {}
        while True:
            page = self._server.ask("GET", self._path(kind), query=query | following)
            found += page["items"]
            if not (token := page["metadata"].get("continue")):
                return found
            following = {"continue": token}


def _check_name(kind: str, name: str) -> None:
    """Raise ClusterError where no object of this kind can have the name."""
    if not NAME.fullmatch(name):
        raise ClusterError(f"{name!r} is no name of a {kind}: small letters, digits, - and .")


def _job(body: Body) -> Job:
    metadata, status = body["metadata"], body.get("status", {})
    conditions = (true_condition(status, kind) for kind in ("Complete", "Failed", "Suspended"))
    state: Body = next(filter(None, conditions), {})
    return Job(
        name=metadata["name"],
        uid=metadata["uid"],
        version=metadata["resourceVersion"],
        labels=metadata.get("labels", {}),
        annotations=metadata.get("annotations", {}),
        completions=body["spec"].get("completions", 1),
        active=status.get("active", 0),
        succeeded=status.get("succeeded", 0),
        failed_indexes=shards.parse_ranges(status.get("failedIndexes", "")),
        condition=state.get("type"),
        message=state.get("message") or state.get("reason") or "",
        created_at=metadata["creationTimestamp"],
        template=body["spec"]["template"],
        failed_pods=status.get("failed", 0),
        parallelism=body["spec"].get("parallelism", 1),
        indexed=body["spec"].get("completionMode") == "Indexed",
    )


def _oldest_first(pods: Iterable[Body]) -> list[Body]:
    return sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))


def _time_of_event(event: Body) -> str:
    """When an event was last seen. Those of the newer events API, as the scheduler's, have no lastTimestamp."""
    times = (event.get("lastTimestamp"), (event.get("series") or {}).get("lastObservedTime"), event.get("eventTime"))
    return str(next(filter(None, times), ""))


def _default_namespace(context: str | None) -> str:
    """The namespace of the kubeconfig's context."""
    contexts, active = config.list_kube_config_contexts()
    chosen = next((candidate for candidate in contexts if candidate["name"] == context), active)
    return chosen["context"].get("namespace") or "default"
