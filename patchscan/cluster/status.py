"""Tell what every Job of patchscan is doing, or why it is not: for `patchscan jobs status`, logs and coordinators."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from patchscan.cluster.api_server import ClusterError
from patchscan.cluster.client import Cluster, Job
from patchscan.cluster.pods import JOB_NAME, Body, PodState, pod_state

# What a Job's label app.kubernetes.io/component means to a user.
KINDS = {"train": "training", "scan": "scan", "scan-worker": "workers", "roll-out": "roll-out"}
# The variable that says what a Job works on.
SOURCE_VARIABLES = {"training": "DATA", "scan": "SOURCE", "roll-out": "MODEL"}
# An annotation of a workers' Job, which has no such variable.
SOURCE_ANNOTATION = "patchscan/source"
# In the message of a Job that its pod failure policy ended.
FATAL_POD = re.compile(r" for pod [^/ ]+/(\S+) failed ")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class JobStatus:
    """One Job. `kind` is training, scan, workers or roll-out; `state` pending, running, suspended, complete or failed.

    `done` of `total` indexes are complete, `given_up` have failed for good; `pods_running`, `pods_pending` and
    `pods_failed` count pods. `reason` says why it waits or failed, in the words of its program or of the cluster;
    `created` is ISO 8601, UTC.
    """

    job: str
    kind: str
    state: str
    source: str
    done: int
    total: int
    given_up: int
    pods_running: int
    pods_pending: int
    pods_failed: int
    created: str
    reason: str


def job_statuses(cluster: Cluster) -> list[JobStatus]:
    """Every Job of patchscan in the namespace, oldest first. Raises ClusterError, OutageError."""
    pods: dict[str, list[PodState]] = defaultdict(list)
    for pod in cluster.labelled_pods():
        pods[pod["metadata"].get("labels", {}).get(JOB_NAME, "")].append(pod_state(pod))
    config_map = cache(partial(_config_map, cluster))
    return [_status(cluster, job, pods[job.name], config_map) for job in cluster.jobs()]


def _status(cluster: Cluster, job: Job, pods: list[PodState], config_map: Callable[[str], Body]) -> JobStatus:
    kind = KINDS.get(job.labels.get("app.kubernetes.io/component", ""), "other")
    running, pending = (sum(pod.phase == phase for pod in pods) for phase in ("running", "pending"))
    state = job.condition.lower() if job.condition else "running" if running else "pending"
    return JobStatus(
        job=job.name,
        kind=kind,
        state=state,
        source=_source(job, kind, config_map),
        done=job.succeeded,
        total=job.completions,
        given_up=len(job.failed_indexes),
        pods_running=running,
        pods_pending=pending,
        pods_failed=max(job.failed_pods, sum(pod.phase == "failed" for pod in pods)),
        created=job.created_at,
        reason=_reason(cluster, job, pods),
    )


def _reason(cluster: Cluster, job: Job, pods: list[PodState]) -> str:
    """Why a Job waits or failed; empty where all is well."""
    failed = [pod for pod in pods if pod.phase == "failed"]
    if job.condition == "Complete":
        return ""
    if job.condition == "Failed":
        # A pod that failed says why, but for a Job that took too long. The cluster names the one that ended the Job,
        # if one did; where it is gone, what another failed of is not the reason.
        if named := FATAL_POD.search(job.message):
            failed = [pod for pod in failed if pod.name == named[1]]
        if failed and "deadline" in job.message:
            return f"{job.message}; before that: {failed[-1].reason}"
        return failed[-1].reason if failed else job.message
    return why_waiting(cluster, job, pods)


def why_waiting(cluster: Cluster, job: Job, pods: list[PodState]) -> str:
    """What an unfinished Job waits for, or what has gone wrong so far; empty where all its pods run as they should."""
    if job.condition == "Suspended":
        queue = job.labels.get(QUEUE_LABEL)
        return f"suspended until the queue {queue} admits it" if queue else "suspended"
    failed = [pod for pod in pods if pod.phase == "failed"]
    waiting = [pod for pod in pods if pod.phase == "pending"]
    reason = next((pod.reason for pod in waiting if pod.reason), "")
    if waiting and not reason:
        reason = cluster.warning("Pod", waiting[0].name)
    if reason:
        return f"{len(waiting)} pod{'s wait' if len(waiting) > 1 else ' waits'}: {reason}"
    running = [pod for pod in pods if pod.phase == "running"]
    if lost := [pod for pod in running if pod.reason]:
        return f"{lost[0].name}: {lost[0].reason}"
    if failed:
        return f"{len(failed)} pod{'s' if len(failed) > 1 else ''} failed, the last: {failed[-1].reason}"
    if running:
        if len(running) >= min(job.parallelism, job.completions - job.succeeded - len(job.failed_indexes)):
            return ""
        refused = cluster.warning("Job", job.name)
        return f"{len(running)} pods of at most {job.parallelism} at once: {refused}" if refused else ""
    # No pod, though the Job is not done: the cluster may refuse to create one, for a quota or its pod security.
    return cluster.warning("Job", job.name) or ("" if job.succeeded else "its first pod is not created yet")


def _source(job: Job, kind: str, config_map: Callable[[str], Body]) -> str:
    """What a Job works on: a variable of its container or of its ConfigMap; empty where that cannot be told."""
    if annotated := job.annotations.get(SOURCE_ANNOTATION):
        return annotated
    name = SOURCE_VARIABLES.get(kind, "")
    for container in job.template.get("spec", {}).get("containers", []) if name else []:
        for variable in container.get("env", []):
            if variable["name"] == name:
                return str(variable.get("value", "")).replace("$$", "$")
        for origin in container.get("envFrom", []):
            if "configMapRef" in origin and (found := config_map(origin["configMapRef"]["name"]).get(name)):
                return str(found)
    return ""


def _config_map(cluster: Cluster, name: str) -> Body:
    """The data of a ConfigMap; empty where it is gone or this account may not read it."""
    try:
        found = cluster.get("ConfigMap", name) or {}
    except ClusterError:
        return {}
    data: Body = found.get("data", {})
    return data
