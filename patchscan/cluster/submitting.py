"""Start Jobs from a laptop, from a manifest or the nightly scan's CronJob with changed settings, and read their
logs."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path

import yaml

from patchscan.cluster.api_server import AlreadyExistsError, ClusterError
from patchscan.cluster.client import OUR_LABEL, Cluster, Job
from patchscan.cluster.pods import Body, container_statuses, literal, pod_state
from patchscan.cluster.status import why_waiting
from patchscan.common.retries import OutageError

POLL_S = 2.0
# A Job's name becomes a label of its pods. A CronJob's may have 52 characters.
LONGEST_JOB_NAME = 63
# Settings of the S3 client, which reads them from the environment by itself.
LIBRARY_SETTINGS = ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
# In a container's arguments, Kubernetes' form and those of a shell.
REFERENCE = re.compile(r"\$[({]?([A-Z][A-Z0-9_]*)")
# Variables that the cluster sets; another value would break the Job.
GIVEN = {"JOB_NAME", "JOB_COMPLETION_INDEX"}
# Settings that other fields of the manifest go with.
TIED = {
    "NODES": "completions and parallelism",
    "GPUS": "the limit of nvidia.com/gpu",
    "SERVICE": "the Service and the pods' subdomain",
}


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` texts into values by name. Raises ClusterError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ClusterError(f"--set {text}: write NAME=VALUE")
        if name in found:
            raise ClusterError(f"--set {name}: it is given twice")
        found[name] = value
    return found


def submit_manifest(cluster: Cluster, path: str, name: str | None, settings: dict[str, str]) -> str:
    """Create the objects of a manifest that contains one Job; returns the Job's name.

    Objects beside the Job may exist already; a Job of the same name may not. Raises ClusterError.
    """
    try:
        text = Path(path).read_text("utf-8")
        documents = [document for document in yaml.safe_load_all(text) if isinstance(document, dict)]
    except Exception as error:  # PyYAML raises more than YAMLError for wrong dates, numbers and tags
        raise ClusterError(f"{path} cannot be read: {error}") from error
    found = [document for document in documents if document.get("kind") == "Job"]
    if len(found) != 1:
        raise ClusterError(f"{path} contains {len(found)} Jobs; give a file with one, such as k8s/train-ssp.yaml")
    (job,) = found
    try:
        pod = job["spec"]["template"]["spec"]
        name = job["metadata"]["name"] = name or job["metadata"]["name"]
        for labelled in (job, job["spec"]["template"]):  # `patchscan jobs` finds Jobs and pods by these
            labelled["metadata"] = (labelled.get("metadata") or {}) | {"labels": _with_ours(labelled)}
        _change_settings(cluster, pod, settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ClusterError(
            f"the Job in {path} lacks metadata.name or spec.template.spec, or has them in another form than Kubernetes"
        ) from error
    for document in documents:
        if document is not job:
            try:
                cluster.create(document)
            except AlreadyExistsError:
                _check_service(cluster, document, path)
    try:
        return cluster.create_job(job).name
    except AlreadyExistsError as error:
        there = cluster.job(name)
        also = ", or end it with `patchscan jobs cancel`" if there and there.is_ours else ""
        raise ClusterError(f"there is a Job {name} already: give --name{also}") from error


def _check_service(cluster: Cluster, wanted: Body, path: str) -> None:
    """Raise ClusterError where this is a Service, and the one that there is of its name selects other pods: those of
    the Job would not find each other."""
    there = cluster.get(wanted["kind"], wanted["metadata"]["name"])
    if there and wanted["kind"] == "Service" and there["spec"].get("selector") != wanted["spec"].get("selector"):
        name = there["metadata"]["name"]
        raise ClusterError(f"there is another Service {name} already: change name, subdomain and SERVICE in {path}")


def _with_ours(labelled: Body) -> Body:
    """The labels of a training's Job or pod template, with those that patchscan's manifests have."""
    labels = (labelled.get("metadata") or {}).get("labels") or {}
    return {"app.kubernetes.io/component": "train"} | labels | OUR_LABEL


def submit_from_cron_job(cluster: Cluster, cron_job: str, settings: dict[str, str]) -> str:
    """Create a Job as the CronJob would, with changed settings; returns its name. Raises ClusterError."""
    found = cluster.get("CronJob", cron_job)
    if found is None:
        raise ClusterError(f"there is no CronJob {cron_job} in {cluster.namespace}: first kubectl apply -k k8s/")
    template = found["spec"]["jobTemplate"]
    metadata = template.get("metadata", {})
    # Only Jobs that name it as their controller does the CronJob count, and remove beyond its history limits.
    owner = {"apiVersion": "batch/v1", "kind": "CronJob", "name": cron_job, "uid": found["metadata"]["uid"]}
    owner |= {"controller": True}
    body: Body = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": _job_name(cron_job),
            "labels": metadata.get("labels", {}),
            "annotations": {**metadata.get("annotations", {}), "cronjob.kubernetes.io/instantiate": "manual"},
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
    }
    _change_settings(cluster, body["spec"]["template"]["spec"], settings)
    try:
        return cluster.create_job(body).name
    except AlreadyExistsError as error:
        raise ClusterError("another scan was submitted in the same second; run the command again") from error


def _job_name(cron_job: str) -> str:
    """A name for a Job of a CronJob, with the time: as much of the CronJob's as a Job's name has room for."""
    time_now = f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    return f"{cron_job[: LONGEST_JOB_NAME - 1 - len(time_now)].rstrip('-.')}-{time_now}"


def _change_settings(cluster: Cluster, pod: Body, settings: dict[str, str]) -> None:
    """Set these environment variables in every container. Raises ClusterError for a name that no container reads."""
    if not settings:
        return
    containers = [*pod.get("initContainers", []), *pod.get("containers", [])]
    given = _in_config_maps(cluster, containers)
    known = _known_settings(containers) | {name for name in given if name.startswith("AWS_")}
    for name in sorted(settings.keys() - known):
        if name in given:
            raise ClusterError(f"--set {name}: this Job does not read it, so it would change nothing")
        similar = get_close_matches(name.upper(), known, 1)
        meant = f"; did you mean {similar[0]}?" if similar else f"; there are {', '.join(sorted(known))}"
        raise ClusterError(f"--set {name}: there is no such setting{meant}")
    for name in sorted(settings.keys() & TIED.keys()):
        raise ClusterError(f"--set {name}: change it in the manifest, together with {TIED[name]}")
    for container in containers:
        kept = [variable for variable in container.get("env", []) if variable["name"] not in settings]
        container["env"] = kept + [{"name": name, "value": literal(value)} for name, value in settings.items()]


def _known_settings(containers: Sequence[Body]) -> set[str]:
    """The variables that these containers list or name in their arguments, and the S3 client's."""
    known = set(LIBRARY_SETTINGS)
    for container in containers:
        known |= {variable["name"] for variable in container.get("env", [])}
        known |= set(REFERENCE.findall(" ".join([*container.get("command", []), *container.get("args", [])])))
    return known - GIVEN


def _in_config_maps(cluster: Cluster, containers: Sequence[Body]) -> set[str]:
    """The variables that these containers are given from ConfigMaps."""
    sources = [source for container in containers for source in container.get("envFrom", [])]
    names = [source["configMapRef"]["name"] for source in sources if "configMapRef" in source]
    return {key for name in names if (found := cluster.get("ConfigMap", name)) for key in found.get("data", {})}


def log_lines(
    cluster: Cluster, job: str, index: int | None, follow: bool, tell: Callable[[str], None] = print
) -> Iterator[str]:
    """Yield the log of the Job's newest pod (of an index), container by container; with `follow` until the pod has
    ended, and before that wait for it to start. `tell` is called with what it waits for, and why the later containers
    have no log.

    Raises ClusterError where there is no such pod or log and, with `follow`, none to come; OutageError where it breaks
    off.
    """
    pod = _newest_pod(cluster, job, index, follow, tell)
    name, spec = pod["metadata"]["name"], pod["spec"]
    before = spec.get("initContainers", [])
    # A sidecar, which another program has put into the pod, ends last.
    sidecars = [one for one in before if one.get("restartPolicy") == "Always"]
    ordered = [*(one for one in before if one not in sidecars), *spec["containers"], *sidecars]
    containers = [one["name"] for one in ordered]
    for container in containers:
        if why := _why_no_log(cluster, name, container, follow, tell):
            if container == containers[0]:
                raise ClusterError(why)
            tell(why)
            return
        yield f"== {container}"
        try:
            yield from cluster.log(name, container, follow)
        except (ClusterError, OutageError) as error:
            # The log of an evicted pod, or of one whose node is lost, is gone; its status says why it ended.
            found = cluster.get("Pod", name)
            reason = pod_state(found).reason if found else ""
            raise type(error)(f"{error}; {name}: {reason}" if reason else str(error)) from error


def _newest_pod(cluster: Cluster, job: str, index: int | None, follow: bool, tell: Callable[[str], None]) -> Body:
    """The Job's newest pod (of an index); with `follow`, waits until there is one."""
    of = "" if index is None else f" of index {index}"
    told = ""
    while True:
        found = cluster.job(job)  # before its pods: one that has ended by now has made them all
        if found:
            found.check_ours()
        pods = cluster.pods(job, index)
        if pods:
            return pods[-1]
        why = _why_no_pod(cluster, job, found, index)
        if not follow:
            raise ClusterError(f"Job {job} has no pod{of} yet: {why}; --follow waits for it")
        if why != told:
            tell(f"waiting for a pod{of}: {why}")
            told = why
        time.sleep(POLL_S)


def _why_no_pod(cluster: Cluster, job: str, found: Job | None, index: int | None) -> str:
    """Why there is no pod yet of a Job that was `found` so. Raises ClusterError where none will come."""
    of = "" if index is None else f" of index {index}"
    if found is None:
        raise ClusterError(f"there is no Job {job}; `patchscan jobs status` lists all Jobs")
    if index is not None and not found.indexed:
        raise ClusterError(f"the pods of Job {job} have no index: leave --index out")
    if index is not None and index >= found.completions:
        raise ClusterError(f"Job {job} has no pod of index {index}: its indexes are 0 to {found.completions - 1}")
    if found.finished:
        how = ": ".join(filter(None, (found.condition, found.message)))
        raise ClusterError(f"Job {job} has ended ({how}), and has no pod{of} any more")
    why = why_waiting(cluster, found, [pod_state(pod) for pod in cluster.pods(job)])
    now = f"{found.active} pods of at most {found.parallelism} at once, {found.succeeded} of {found.completions} done"
    return f"{now}; {why}" if why else now


def _why_no_log(cluster: Cluster, pod: str, container: str, follow: bool, tell: Callable[[str], None]) -> str:
    """Why the container has no log; empty where it has started. With `follow`, wait until it has, or until the pod has
    ended without it."""
    told = ""
    while True:
        current = cluster.get("Pod", pod)
        if current is None:
            return f"{pod} is gone"
        states = {status["name"]: status["state"] for status in container_statuses(current)}
        if {"running", "terminated"} & states.get(container, {}).keys():
            return ""
        why = pod_state(current).reason or cluster.warning("Pod", pod)
        if current["status"].get("phase") in ("Succeeded", "Failed"):
            return f"{pod} has ended before its container {container} started: {why}"
        if not follow:
            return (
                f"{pod} has no log of its container {container} yet: {why or 'it is starting'}; --follow waits for it"
            )
        if why and why != told:
            tell(f"waiting for {pod}, container {container}: {why}")
            told = why
        time.sleep(POLL_S)
