"""Read from a pod's JSON what state it is in and why, in its program's own words or the cluster's."""

from dataclasses import dataclass
from typing import Any

# An object of Kubernetes as the API's own JSON.
Body = dict[str, Any]

JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"
OOM_KILLED = "OOMKilled"
EVICTED = "Evicted"
LOST = "its node does not answer"
# What a container waits for in an ordinary start.
STARTING = ("ContainerCreating", "PodInitializing")
# A line of a program's last words that begins so says why it ended; others are progress.
ERROR_LINE = "patchscan: "
WORDS = 300


@dataclass(frozen=True)
class PodState:
    """A pod: its completion index (None where its Job has none) and `phase`: pending, running, succeeded or failed.

    `reason` says why it waits or failed, or that its node is lost, and is empty where there is nothing to say.
    `exit_code` and `oom_killed` are those of the container that failed; the exit code is None where none ran.
    `disrupted`: the cluster ended the pod (eviction, preemption, a lost node), so it does not count as a failure.
    `over_limit`: the pod wrote more to the disk than its own limits allow, and was evicted for that.
    """

    name: str
    index: int | None
    phase: str
    reason: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    disrupted: bool = False
    over_limit: bool = False


def pod_state(pod: Body) -> PodState:
    """The state of a pod, from its JSON."""
    status = pod.get("status", {})
    index = pod["metadata"].get("annotations", {}).get(INDEX)
    name, number = pod["metadata"]["name"], int(index) if index is not None else None
    phase = status.get("phase", "Pending").lower()
    ended = _failed_container(pod)
    if phase == "failed" or (ended and phase in ("pending", "running")):
        code = ended["terminated"].get("exitCode") if ended else None
        oom = bool(ended) and ended["terminated"].get("reason") == OOM_KILLED
        disruption = true_condition(status, "DisruptionTarget")
        by_cluster = _words(status) or _words(disruption)
        reasons = (by_cluster, _words_of_failure(pod, ended) if ended else "")
        # The kubelet sets the condition where it evicts a pod because its node is short of something, but not where it
        # does not let one begin for that.
        over_limit = status.get("reason") == EVICTED and not disruption and "exceed" in status.get("message", "")
        return PodState(
            name, number, "failed", "; ".join(filter(None, reasons)), code, oom, bool(disruption), over_limit
        )
    if phase == "pending":
        return PodState(name, number, phase, _why_pending(pod))
    if phase == "succeeded":
        return PodState(name, number, phase)
    # A node that is lost cannot say that its pods have ended; "Unknown" is what some clusters call that.
    return PodState(name, number, "running", _words(status) or _why_ended(pod) or LOST * (phase == "unknown"))


def _why_ended(pod: Body) -> str:
    """Why a pod that runs is being deleted; empty where it is not."""
    if "deletionTimestamp" not in pod["metadata"]:
        return ""
    disruption = _words(true_condition(pod.get("status", {}), "DisruptionTarget"))
    return f"it is being ended since {pod['metadata']['deletionTimestamp']}" + (f": {disruption}" if disruption else "")


def why_not_ready(pod: Body) -> str:
    """Why a server's pod takes no requests: it failed, waits, or runs and is not ready; empty where it is ready, or has
    ended otherwise."""
    state = pod_state(pod)
    if state.phase != "running" or state.reason:
        return state.reason
    for container in pod.get("status", {}).get("containerStatuses", []):
        if not container.get("ready"):
            name, end = container["name"], container.get("lastState", {}).get("terminated")
            before = {"name": name, "terminated": end, "restarts": container.get("restartCount", 0)}
            return f"{name} runs and is not ready" + (f", before: {_words_of_failure(pod, before)}" if end else "")
    return ""


def container_statuses(pod: Body) -> list[Body]:
    """The statuses of a pod's containers, init containers first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def true_condition(status: Body, kind: str) -> Body:
    """The condition of this type, where it is true; else empty."""
    found = (one for one in status.get("conditions", []) if (one["type"], one["status"]) == (kind, "True"))
    return next(found, {})


def _failed_container(pod: Body) -> Body:
    """The first container that failed, as {name, terminated, restarts}; empty where none did. One that is started again
    and again counts while it is not running."""
    for container in container_statuses(pod):
        now, before = container.get("state", {}), container.get("lastState", {})
        end = now.get("terminated") or ({} if "running" in now else before.get("terminated", {}))
        if end.get("exitCode"):
            return {"name": container["name"], "terminated": end, "restarts": container.get("restartCount", 0)}
    return {}


def _words_of_failure(pod: Body, failed: Body) -> str:
    """How a container ended: its exit code or the memory limit that it went over, and the last line that it wrote."""
    end = failed["terminated"]
    if end.get("reason") == OOM_KILLED:
        how = f"killed for memory (OOMKilled), its limit is {_memory_limit(pod, failed['name'])}"
    else:
        how = f"exit code {end['exitCode']}"
    if failed["restarts"] > 1:
        how += f", started {failed['restarts'] + 1} times"
    several = len(container_statuses(pod)) > 1
    return (f"{failed['name']}: " if several else "") + ", ".join(filter(None, [how, last_words(end.get("message"))]))


def _memory_limit(pod: Body, container: str) -> str:
    spec = pod.get("spec", {})
    for one in (*spec.get("initContainers", []), *spec.get("containers", [])):
        if one["name"] == container:
            return str(one.get("resources", {}).get("limits", {}).get("memory", "that of its node"))
    return "unknown"


def literal(text: str) -> str:
    """The text as Kubernetes must be given it in arguments and variables: it reads `$(NAME)` there as a variable, and
    `$$` as one `$`."""
    return text.replace("$", "$$")


def last_words(message: str | None) -> str:
    """The line of a container's termination message that says why it ended: the last error line of patchscan, else the
    last line."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR_LINE)]
    return (errors or lines or [""])[-1][:WORDS]


def _why_pending(pod: Body) -> str:
    """Why a pod does not run yet; empty in an ordinary start."""
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"no node takes it: {condition.get('message') or condition.get('reason', '')}"[:WORDS]
    for container in container_statuses(pod):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") and waiting["reason"] not in STARTING:
            return f"{container['name']}: {_words(waiting)}"
    return _words(status)


def _words(status: Body) -> str:
    """The cluster's reason and message in one line."""
    texts = (status.get("reason"), last_words(status.get("message")))
    return ": ".join(text for text in texts if text)[:WORDS]
