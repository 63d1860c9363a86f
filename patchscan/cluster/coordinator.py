"""Run a scan's shards as an Indexed Job: create it or find it again, follow it to its end, and delete it at the end.

The worker pods have the coordinator's own pod template with another command, so that image, credentials, security and
scheduling settings are written once, in the manifest. Whatever ends a coordinator, the next one of the same scan finds
the running Job by its label, or creates one for the shards that are still missing.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchscan.cluster.client import AlreadyExistsError, Cluster, Job, JobGoneError, PodFailure
from patchscan.common.console import ProgressReport
from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.scanning import shards
from patchscan.scanning.plan import Plan
from patchscan.storage.store import Store

Body = dict[str, Any]

EXIT_USAGE = UserError.exit_code
SCAN_LABEL = "patchscan/scan"
SHARDS_ANNOTATION = "patchscan/shards"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# Labels that the Job controller adds to a pod template; a copy must not have them.
CONTROLLER_LABELS = (
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
    "controller-uid",
    "job-name",
)
DAY_S = 86_400


class ShardsFailedError(UserError):
    """A Job has ended and shards are missing; finished shards are kept, and a rerun works on the missing ones only."""

    exit_code = EXIT_INTERRUPTED


class ConfigurationError(UserError):
    """Workers ended with exit code 2: trying again cannot help."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a scan's Job runs. `command` is a worker's command line without its shard; `parallelism` pods run at once and
    request `cpu` and `memory` each. An index is retried `retries` times after its pod failed (evictions do not count);
    after `max_failed` failed indexes, or `deadline_s` seconds, the Job fails. `queue` is its Kueue queue, if any."""

    command: Sequence[str]
    parallelism: int = 8
    cpu: str = "1"
    memory: str = "1Gi"
    retries: int = 4
    max_failed: int = 20
    deadline_s: int = DAY_S
    queue: str | None = None


def work_shards(cluster: Cluster, plan: Plan, results: Store, workers: WorkerSettings, coordinator: Job) -> None:
    """Run pods that work on every unfinished shard of the plan; returns when all parts are written.

    Raises ShardsFailedError, ConfigurationError, and what `Cluster.follow` raises; the same call continues from there.
    """
    missing = unfinished_shards(results, plan)
    if not missing:
        return
    job = find_running(cluster, plan) or _create(cluster, plan, results, missing, workers, coordinator)
    with ProgressReport(f"Job {job.name}", job.completions, "shards") as progress:
        try:
            for state in cluster.follow(job.name):
                job = state
                progress.advance(job.succeeded - progress.done, f"{job.active} pods, {len(job.failed)} shards failed")
        except JobGoneError as error:
            raise ShardsFailedError(f"Job {job.name} was deleted") from error
    if missing := unfinished_shards(results, plan):
        raise _job_error(job, missing, cluster.failures(job.name))


def clean_up(cluster: Cluster, plan: Plan) -> None:
    """Delete the Jobs of a scan, and with them their pods."""
    for job in cluster.jobs(_selector(plan)):
        cluster.delete_job(job.name)


def unfinished_shards(results: Store, plan: Plan) -> list[int]:
    """The shards that have no part yet, ascending."""
    prefix = f"scans/{plan.scan}/rows/part-"
    parts = set(results.names(prefix))
    return [index for index in range(plan.shards) if f"{prefix}{shards.name(index)}.parquet" not in parts]


def find_running(cluster: Cluster, plan: Plan) -> Job | None:
    """The scan's unfinished Job, or None."""
    return next((job for job in cluster.jobs(_selector(plan)) if not job.finished), None)


def _create(
    cluster: Cluster, plan: Plan, results: Store, missing: list[int], workers: WorkerSettings, coordinator: Job
) -> Job:
    """Create a Job for the missing shards; where another coordinator was faster, return its running Job."""
    number = 1 + max((_number(job) for job in cluster.jobs(_selector(plan))), default=0)
    while True:
        try:
            return cluster.create_job(worker_job(plan, plan.address(results), missing, number, workers, coordinator))
        except AlreadyExistsError:
            running = find_running(cluster, plan)
            if running:
                return running
            number += 1


def _number(job: Job) -> int:
    return int(job.name.rpartition("-")[2])


def _selector(plan: Plan) -> str:
    return f"{SCAN_LABEL}={plan.scan}"


def worker_job(
    plan: Plan, plan_url: str, missing: Sequence[int], number: int, workers: WorkerSettings, coordinator: Job
) -> Body:
    """The Indexed Job for these shards, as the API's JSON.

    Its name consists of scan and number, so that of two coordinators only one can create it. It is owned by the
    coordinator's Job and deleted with it.
    """
    labels = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": "scan-worker"}
    queue = {QUEUE_LABEL: workers.queue} if workers.queue else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"patchscan-{plan.scan.lower()}-{number}",
            "labels": {**labels, **queue, SCAN_LABEL: plan.scan},
            "annotations": {SHARDS_ANNOTATION: shards.format_ranges(missing)},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": coordinator.name, "uid": coordinator.uid}
            ],
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": len(missing),
            "parallelism": min(workers.parallelism, len(missing)),
            "backoffLimitPerIndex": workers.retries,
            "maxFailedIndexes": min(workers.max_failed, len(missing)),
            "activeDeadlineSeconds": workers.deadline_s,
            "ttlSecondsAfterFinished": 7 * DAY_S,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [EXIT_USAGE]}},
                ]
            },
            # Kueue admits a Job by ending its suspension.
            **({"suspend": True} if workers.queue else {}),
            "template": worker_template(coordinator.template, labels, workers, plan_url, missing),
        },
    }


def worker_template(
    template: Body, labels: Body, workers: WorkerSettings, plan_url: str, missing: Sequence[int]
) -> Body:
    """The coordinator's pod template with a worker's command, labels and resources, and without access to the API."""
    new = copy.deepcopy(template)
    metadata = new.setdefault("metadata", {})
    kept = {name: value for name, value in metadata.get("labels", {}).items() if name not in CONTROLLER_LABELS}
    metadata["labels"] = kept | labels
    metadata.pop("creationTimestamp", None)
    spec = new["spec"]
    spec["restartPolicy"] = "Never"  # backoffLimitPerIndex requires it
    spec["automountServiceAccountToken"] = False
    container = spec["containers"][0]
    container["name"] = "worker"
    container["args"] = [
        *workers.command,
        *("--plan", plan_url, "--within", shards.format_ranges(missing), "--index", "$(JOB_COMPLETION_INDEX)"),
    ]
    amounts = {"cpu": workers.cpu, "memory": workers.memory}
    container["resources"] = {"requests": amounts, "limits": {"memory": workers.memory}}
    return new


def _job_error(job: Job, missing: list[int], failures: dict[int | None, PodFailure]) -> Exception:
    """The error for a Job that ended with shards missing."""
    shard_of_index = shards.parse_ranges(job.annotations[SHARDS_ANNOTATION])
    reasons = [
        f"shard {shard_of_index[failure.index]}: exit code {failure.exit_code}, {failure.message}"
        for failure in failures.values()
        if failure.index is not None and shard_of_index[failure.index] in missing
    ]
    text = (
        f"Job {job.name} ended {job.condition} ({job.message}), shards {shards.format_ranges(missing)} missing: "
        f"{'; '.join(reasons[:5]) or 'no pod has failed'}; a rerun works on these only"
    )
    last_failures = [failures[index] for index in job.failed if index in failures]
    if last_failures and all(failure.exit_code == EXIT_USAGE for failure in last_failures):
        return ConfigurationError(text)
    return ShardsFailedError(text)
