"""Run a scan's shards as an Indexed Job: create it or find it again, follow it to its end, and delete it at the end.

The worker pods have the coordinator's own pod template with another command, so that image, credentials, security and
scheduling settings are written once, in the manifest. Whatever ends a coordinator, the next one of the same scan finds
the running Job by its label, or creates one for the shards that are still missing.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kubernetes.utils.quantity import parse_quantity

from patchscan.cluster.api_server import AlreadyExistsError
from patchscan.cluster.client import OUR_LABEL, Cluster, Job, JobGoneError
from patchscan.cluster.elastic import Elastic
from patchscan.cluster.pods import Body, PodState, literal, pod_state
from patchscan.cluster.status import QUEUE_LABEL, SOURCE_ANNOTATION, why_waiting
from patchscan.common.console import ProgressReport, tell
from patchscan.common.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError
from patchscan.scanning import shards
from patchscan.scanning.plan import Plan
from patchscan.storage.store import Store

EXIT_USAGE = UserError.exit_code
SCAN_LABEL = "patchscan/scan"
SHARDS_ANNOTATION = "patchscan/shards"
# Labels that the Job controller adds to a pod template; a copy must not have them.
CONTROLLER_LABELS = ("batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name", "controller-uid", "job-name")
DAY_S = 86_400
# Without any news of the Job for so long, a line says what it waits for.
QUIET_S = 60.0
# Exit codes of a pod that would be the same at every try: a wrong setting, a bug, a command that cannot be run.
HOPELESS_CODES = (EXIT_USAGE, EXIT_BUG, 126, 127, 128)


class ShardsFailedError(UserError):
    """A Job has ended and shards are missing; finished shards are kept, and a rerun works on the missing ones only."""

    exit_code = EXIT_INTERRUPTED


class ConfigurationError(UserError):
    """Workers ended for a reason that stays: a wrong setting, a bug, too little memory at every try."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a scan's Job runs. `command` is a worker's command line without its shard; `parallelism` pods run at once and
    request `cpu` and `memory` each; with `least` over 0, so many at first and up to `parallelism` where the server has
    room (elastic.py). An index is retried `retries` times after its pod failed (evictions do not count); after
    `max_failed` failed indexes, or `deadline_s` seconds, the Job fails. `queue` is its Kueue queue, if any."""

    command: Sequence[str]
    parallelism: int = 8
    least: int = 0
    cpu: str = "1"
    memory: str = "1Gi"
    retries: int = 4
    max_failed: int = 20
    deadline_s: int = DAY_S
    queue: str | None = None


def work_shards(
    cluster: Cluster,
    plan: Plan,
    results: Store,
    workers: WorkerSettings,
    coordinator: Job,
    has_room: Callable[[], bool] = lambda: True,
) -> None:
    """Run pods that work on every unfinished shard of the plan; returns when all parts are written. `has_room` says
    whether the server can answer more, where the number of pods follows that (`WorkerSettings.least`).

    Raises ShardsFailedError, ConfigurationError, and what `Cluster.follow` raises; the same call continues from there.
    """
    missing = unfinished_shards(results, plan)
    if not missing:
        return
    job = find_running(cluster, plan) or _create(cluster, plan, results, missing, workers, coordinator)
    cluster.record(
        coordinator.reference,
        "Planned",
        f"scan {plan.scan}: {len(missing)} of {plan.shards} shards to do, by Job {job.name}; {plan.listed:,} objects, "
        f"{plan.unchanged:,} of them unchanged",
    )
    news = _News(cluster)
    elastic = Elastic(cluster, workers.least, workers.parallelism, has_room) if workers.least else None
    with ProgressReport(f"Job {job.name}", job.completions, "shards") as progress:
        try:
            for state in cluster.follow(job.name):
                job = state
                news.tell(job)
                if elastic and (text := elastic.adjust(job)):
                    tell(text)
                notes = f"{job.active} pods, {len(job.failed_indexes)} shards failed"
                progress.advance(job.succeeded - progress.done, notes)
        except JobGoneError as error:
            raise ShardsFailedError(f"Job {job.name} was deleted") from error
    if missing := unfinished_shards(results, plan):
        failure = _job_error(job, missing, cluster.failed_pods(job.name))
        cluster.record(coordinator.reference, "ShardsGivenUp", str(failure), warning=True)
        raise failure


class _News:
    """Tell on standard error what happens to a Job that is followed: a line for each pod that failed and, where nothing
    has happened for QUIET_S seconds, one that says what it waits for."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._told: set[str] = set()
        self._counts = (-1, -1)
        self._last = time.monotonic()

    def tell(self, job: Job) -> None:
        """Tell what is new in this state of the Job."""
        counts, now = (job.succeeded, job.failed_pods), time.monotonic()
        if counts != self._counts:
            if job.failed_pods:
                self._tell_failed_pods(job)
            self._counts, self._last = counts, now
        elif now - self._last >= QUIET_S and not job.finished:
            pods = [pod_state(pod) for pod in self._cluster.pods(job.name)]
            why = why_waiting(self._cluster, job, pods) or "a shard takes longer than that"
            tell(f"Job {job.name}: {job.active} pods, no shard done for {now - self._last:.0f} s: {why}")
            self._last = now

    def _tell_failed_pods(self, job: Job) -> None:
        for pod in self._cluster.failed_pods(job.name):
            if pod.name not in self._told:
                self._told.add(pod.name)
                tell(f"pod {pod.name} failed{_shard_of(job, pod)}: {pod.reason}")


def _shard_of(job: Job, pod: PodState) -> str:
    """Which shard a pod worked on, in words."""
    if pod.index is None:
        return ""
    return f" on shard {shards.parse_ranges(job.annotations[SHARDS_ANNOTATION])[pod.index]}"


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
    number = 1 + max((int(job.name.rpartition("-")[2]) for job in cluster.jobs(_selector(plan))), default=0)
    while True:
        try:
            return cluster.create_job(worker_job(plan, plan.address(results), missing, number, workers, coordinator))
        except AlreadyExistsError:
            running = find_running(cluster, plan)
            if running:
                return running
            number += 1


def _selector(plan: Plan) -> str:
    return f"{SCAN_LABEL}={plan.scan}"


def worker_job(
    plan: Plan, plan_url: str, missing: Sequence[int], number: int, workers: WorkerSettings, coordinator: Job
) -> Body:
    """The Indexed Job for these shards, as the API's JSON.

    Its name consists of scan and number, so that of two coordinators only one can create it. It is owned by the
    coordinator's Job and deleted with it.
    """
    labels = OUR_LABEL | {"app.kubernetes.io/component": "scan-worker"}
    queue = {QUEUE_LABEL: workers.queue} if workers.queue else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"patchscan-{plan.scan.lower()}-{number}",
            "labels": {**labels, **queue, SCAN_LABEL: plan.scan},
            "annotations": {SHARDS_ANNOTATION: shards.format_ranges(missing), SOURCE_ANNOTATION: plan.source.url},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": coordinator.name, "uid": coordinator.uid}
            ],
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": len(missing),
            "parallelism": min(workers.least or workers.parallelism, len(missing)),
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
        *map(literal, [*workers.command, "--plan", plan_url, "--within", shards.format_ranges(missing)]),
        *("--index", "$(JOB_COMPLETION_INDEX)"),
    ]
    amounts = {"cpu": workers.cpu, "memory": workers.memory}
    container["resources"] = {"requests": amounts, "limits": {"memory": workers.memory}}
    return new


def _job_error(job: Job, missing: list[int], failed_pods: list[PodState]) -> Exception:
    """The error for a Job that ended with shards missing; `failed_pods` are oldest first."""
    shard_of_index = shards.parse_ranges(job.annotations[SHARDS_ANNOTATION])
    tries: dict[int, list[PodState]] = {}
    for pod in failed_pods:
        if pod.index is not None and shard_of_index[pod.index] in missing:
            tries.setdefault(pod.index, []).append(pod)
    reasons = [f"shard {shard_of_index[index]}: {pods[-1].reason}" for index, pods in sorted(tries.items())]
    text = (
        f"Job {job.name} ended {job.condition} ({job.message}), shards {shards.format_ranges(missing)} missing: "
        f"{'; '.join(reasons[:5]) or 'no pod has failed'}; "
    )
    # A pod that the cluster ended says nothing of its shard, and the Job has not counted it as a try.
    counted = ([pod for pod in tries.get(index, []) if not pod.disrupted] for index in job.failed_indexes)
    given_up = [pods for pods in counted if pods]
    tried = [pod for pods in given_up for pod in pods]
    if tried and all(pod.oom_killed or pod.over_limit or pod.exit_code in HOPELESS_CODES for pod in tried):
        return ConfigurationError(f"{text}so at every try{_remedy(given_up[0][-1])}")
    return ShardsFailedError(f"{text}a rerun works on these only")


def _remedy(pod: PodState) -> str:
    if pod.oom_killed:
        return ": raise WORKER_MEMORY"
    return ": raise that limit in the CronJob" if pod.over_limit else ", trying again cannot help"


def check_amounts(cpu: str, memory: str) -> None:
    """Raise ConfigurationError where these are no quantities of Kubernetes, or what nothing could run with."""
    for name, text, least, example in (("WORKER_CPU", cpu, 0.001, "500m"), ("WORKER_MEMORY", memory, 2**26, "1Gi")):
        try:
            amount = parse_quantity(text)
        except ValueError:
            raise ConfigurationError(f"{name} {text!r} is no quantity; write it as {example}") from None
        if amount < least:
            raise ConfigurationError(f"{name} {text} is too little for a worker; write it as {example}")
