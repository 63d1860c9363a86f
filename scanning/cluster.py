"""The Jobs of one namespace of a Kubernetes cluster: create them, follow them to the end, ask why their pods failed.

The one module of the scan that speaks to Kubernetes. Errors: ClusterError where the request itself is at fault,
AlreadyExists and JobGone where the cluster holds another state than was thought, Outage where it is out of reach.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from detector.errors import UserError
from scanning import shards
from scanning.retries import Outage, Retries, Transient

Result = TypeVar("Result")
Body = dict[str, Any]

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"
PART_OF = "app.kubernetes.io/part-of=patchscan"
CONNECT_S = 10
# The server ends a watch after so long; it is taken up again where the Job then stands.
WATCH_S = 240
PAGE = 500
GONE = 410
BUSY = {429, 500, 502, 503, 504}


class ClusterError(UserError):
    """The cluster cannot be asked, or refuses what was asked; the message says why."""


class AlreadyExists(Exception):
    """There is an object of this name."""


class JobGone(Exception):
    """The Job was deleted while it was being followed."""


@dataclass(frozen=True)
class Job:
    """A Job as the cluster last told it. `failed` are the indexes given up; `condition` is Complete, Failed, Suspended
    or None; `template` is its pod template as it was created, as the API's JSON."""

    name: str
    uid: str
    version: str
    labels: dict[str, str]
    annotations: dict[str, str]
    completions: int
    active: int
    succeeded: int
    failed: list[int]
    condition: str | None
    message: str
    created_at: Any
    template: Body = field(repr=False)

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.condition in ("Complete", "Failed")


@dataclass(frozen=True)
class PodFailure:
    """How the last pod of an index, or of a Job without indexes (None), ended: its container's exit code (None where
    it never started) and the end of its log, or the cluster's reason."""

    index: int | None
    exit_code: int | None
    message: str


class Cluster:
    """One namespace. Calls are tried again while the API server is busy or out of reach, for `patience_s` seconds, and
    then raise Outage."""

    def __init__(self, api: client.ApiClient, namespace: str, patience_s: float = 300.0, pause_s: float = 2.0):
        self.namespace, self.pause_s = namespace, pause_s
        self._api = api
        self._batch, self._core = client.BatchV1Api(api), client.CoreV1Api(api)
        self._retries = Retries(patience_s)

    @classmethod
    def connect(cls, namespace: str | None = None, context: str | None = None, patience_s: float = 30.0) -> Self:
        """The cluster that this pod runs in, else the one of the user's kubeconfig. Raises ClusterError."""
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and NAMESPACE_FILE.exists():
                config.load_incluster_config()
                namespace = namespace or NAMESPACE_FILE.read_text().strip()
            else:
                config.load_kube_config(context=context)
                namespace = namespace or _default_namespace(context)
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no cluster is configured: {error}; set KUBECONFIG or choose a --context") from error
        return cls(client.ApiClient(), namespace, patience_s)

    # -- Jobs ------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> Job | None:
        """The Job of this name, or None."""
        found = self._found(lambda: self._batch.read_namespaced_job(name, self.namespace, _request_timeout=CONNECT_S))
        return self._job(found) if found else None

    def jobs(self, selector: str = PART_OF) -> list[Job]:
        """The Jobs that carry these labels, oldest first."""
        listed = self._paged(self._batch.list_namespaced_job, label_selector=selector)
        return sorted((self._job(item) for item in listed), key=lambda job: (str(job.created_at), job.name))

    def create_job(self, body: Body) -> Job:
        """Create a Job from the API's JSON. Raises AlreadyExists, ClusterError."""
        create: Any = self._batch.create_namespaced_job  # takes JSON as well as its own models
        made = self._call(lambda: create(self.namespace, body, _request_timeout=30))
        return self._job(made)

    def create(self, body: Body) -> None:
        """Create an object of any kind from the API's JSON; it must not name another namespace."""
        from kubernetes.utils import FailToCreateError, create_from_dict

        def make() -> None:
            try:
                create_from_dict(self._api, body, namespace=self.namespace)
            except FailToCreateError as error:
                raise error.api_exceptions[0] from error

        self._call(make)

    def delete_job(self, name: str) -> bool:
        """Delete a Job; its pods are told to stop. Whether there was one."""
        deleted = self._found(
            lambda: self._batch.delete_namespaced_job(
                name, self.namespace, propagation_policy="Background", _request_timeout=30
            )
        )
        return deleted is not None

    def cron_job(self, name: str) -> Body | None:
        """A CronJob as the API's JSON, or None."""
        found = self._found(
            lambda: self._batch.read_namespaced_cron_job(name, self.namespace, _request_timeout=CONNECT_S)
        )
        return self._json(found) if found else None

    def follow(self, name: str) -> Iterator[Job]:
        """The Job's states from now until it has finished, through broken connections and expired watches.

        Raises JobGone where it is deleted, Outage and ClusterError.
        """
        while True:
            job = self.job(name)
            if job is None:
                raise JobGone(name)
            yield job
            if job.finished:
                return
            try:
                for state in self._watch(job):
                    yield state
                    if state.finished:
                        return
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                # 410: the version to watch from is forgotten. All others are told better by the next read.
                if isinstance(error, ApiException) and error.status not in BUSY | {0, GONE}:
                    raise _refused(error) from error
            time.sleep(self.pause_s * random.uniform(0.5, 1.5))

    def _watch(self, job: Job) -> Iterator[Job]:
        """The states after this one, until the server ends the watch."""
        events = watch.Watch().stream(
            self._batch.list_namespaced_job,
            self.namespace,
            field_selector=f"metadata.name={job.name}",
            resource_version=job.version,
            timeout_seconds=WATCH_S,
            _request_timeout=(CONNECT_S, WATCH_S + 30),
        )
        for event in events:
            if event["type"] == "DELETED":
                raise JobGone(job.name)
            yield self._job(event["object"])

    # -- pods ------------------------------------------------------------------------------------------------------

    def pods(self, job: str, index: int | None = None) -> list[Any]:
        """The Job's pods (of one index), oldest first."""
        selector = f"{JOB_NAME}={job}" + ("" if index is None else f",{INDEX}={index}")
        listed = self._paged(self._core.list_namespaced_pod, label_selector=selector)
        return sorted(listed, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def failures(self, job: str) -> dict[int | None, PodFailure]:
        """The last failure of each index that has a failed pod; index None for a Job without indexes."""
        failed = [pod for pod in self.pods(job) if pod.status.phase == "Failed"]
        ends = [_failure(pod) for pod in failed]
        return {end.index: end for end in ends}

    def log(self, pod: str, container: str, follow: bool = False) -> Iterator[str]:
        """The lines of a container's log; with `follow` until it ends."""
        reply: Any = self._call(
            lambda: self._core.read_namespaced_pod_log(
                pod, self.namespace, container=container, follow=follow, _preload_content=False
            )
        )
        try:
            for line in reply:
                yield line.decode(errors="replace").rstrip("\n")
        finally:
            reply.release_conn()

    # -- one way to ask --------------------------------------------------------------------------------------------

    def _paged(self, function: Callable[..., Any], **options: Any) -> Iterator[Any]:
        token: str | None = None
        while True:
            more = {"_continue": token} if token else {}
            page = self._call(partial(function, self.namespace, limit=PAGE, _request_timeout=30, **options, **more))
            yield from page.items
            token = page.metadata._continue
            if not token:
                return

    def _found(self, function: Callable[[], Result]) -> Result | None:
        try:
            return self._call(function)
        except _NotFound:
            return None

    def _call(self, function: Callable[[], Result]) -> Result:
        """The function's result, with the client's errors in our words."""

        def attempt() -> Result:
            try:
                return function()
            except ApiException as error:
                if error.status in BUSY | {0}:
                    raise Transient(f"{error.status} {error.reason}") from error
                raise _refused(error) from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise Transient(str(error)) from error

        try:
            return self._retries.call(attempt)[0]
        except Transient as error:
            raise Outage(f"the cluster's API server does not answer: {error}") from error

    def _json(self, model: Any) -> Body:
        return self._api.sanitize_for_serialization(model)

    def _job(self, job: Any) -> Job:
        status = job.status
        state = next(
            (one for one in status.conditions or [] if one.status == "True" and one.type in ("Complete", "Failed")),
            next((one for one in status.conditions or [] if one.status == "True" and one.type == "Suspended"), None),
        )
        return Job(
            name=job.metadata.name,
            uid=job.metadata.uid,
            version=job.metadata.resource_version,
            labels=job.metadata.labels or {},
            annotations=job.metadata.annotations or {},
            completions=job.spec.completions or 1,
            active=status.active or 0,
            succeeded=status.succeeded or 0,
            failed=shards.parse_ranges(status.failed_indexes or ""),
            condition=state.type if state else None,
            message=(state.message or state.reason or "") if state else "",
            created_at=job.metadata.creation_timestamp,
            template=self._json(job.spec.template),
        )


class _NotFound(ClusterError):
    """404."""


def _refused(error: ApiException) -> Exception:
    """A 4xx in our words: the API server's own message names object and field."""
    try:
        message = json.loads(error.body or "")["message"]
    except (ValueError, KeyError):
        message = error.reason
    if error.status == 409:
        return AlreadyExists(message)
    if error.status == 404:
        return _NotFound(f"the cluster says: {message}")
    return ClusterError(f"the cluster refuses ({error.status}): {message}")


def _failure(pod: Any) -> PodFailure:
    """How this failed pod ended: its first container that did not end well, or the cluster's own reason."""
    index = (pod.metadata.annotations or {}).get(INDEX)
    statuses = [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
    ends = [one.state.terminated for one in statuses if one.state.terminated and one.state.terminated.exit_code]
    exit_code = ends[0].exit_code if ends else None
    message = (ends[0].message or ends[0].reason) if ends else (pod.status.message or pod.status.reason)
    last = (message or "").strip().splitlines()[-1:]
    return PodFailure(int(index) if index is not None else None, exit_code, "".join(last)[:300])


def _default_namespace(context: str | None) -> str:
    """The namespace of the kubeconfig's context."""
    contexts, active = config.list_kube_config_contexts()
    chosen = next((one for one in contexts if one["name"] == context), active)
    return chosen["context"].get("namespace") or "default"
