"""What a pod's status means to a user: statuses as a real kubelet and scheduler wrote them."""

from typing import Any

import pytest

from patchscan.cluster.pods import last_words, pod_state

Body = dict[str, Any]


def pod(status: Body, *limits: str) -> Body:
    """A pod with a container `worker` for each memory limit."""
    containers = [{"name": "worker", "resources": {"limits": {"memory": limit}}} for limit in limits]
    metadata = {"name": "p", "annotations": {"batch.kubernetes.io/job-completion-index": "7"}}
    return {"metadata": metadata, "spec": {"containers": containers}, "status": status}


def container(name: str = "worker", **status: Any) -> Body:
    return {"name": name, "restartCount": 0, **status}


def ended(code: int, message: str = "", reason: str = "Error") -> Body:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


FULL = "0/3 nodes are available: 3 Insufficient memory. preemption: 0/3 nodes are available."
CASES = [
    ({"phase": "Running", "containerStatuses": [container(state={"running": {}})]}, "running", ""),
    ({"phase": "Succeeded", "containerStatuses": [container(state=ended(0))]}, "succeeded", ""),
    (
        {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": FULL},
            ],
        },
        "pending",
        f"no node takes it: {FULL}",
    ),
    (
        {
            "phase": "Pending",
            "containerStatuses": [container(state={"waiting": {"reason": "ContainerCreating"}})],
        },
        "pending",
        "",
    ),
    (
        {
            "phase": "Pending",
            "containerStatuses": [
                container(state={"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling "a/b:1"'}})
            ],
        },
        "pending",
        'worker: ImagePullBackOff: Back-off pulling "a/b:1"',
    ),
    (
        {
            "phase": "Failed",
            "containerStatuses": [container(state=ended(75, 'one\npatchscan: no answer\n{"event": "progress"}\n'))],
        },
        "failed",
        "exit code 75, patchscan: no answer",
    ),
    (
        {"phase": "Failed", "containerStatuses": [container(state=ended(137, "", "OOMKilled"))]},
        "failed",
        "killed for memory (OOMKilled), its limit is 1Gi",
    ),
    (
        {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."},
        "failed",
        "Evicted: The node was low on resource: ephemeral-storage.",
    ),
    (
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "The node was low on resource: memory.",
            "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}],
            "containerStatuses": [container(state=ended(75, "patchscan: interrupted"))],
        },
        "failed",
        "Evicted: The node was low on resource: memory.; exit code 75, patchscan: interrupted",
    ),
    (
        {
            "phase": "Failed",
            "conditions": [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "DeletionByPodGC",
                    "message": "PodGC: node no longer exists",
                }
            ],
            "containerStatuses": [container(state={"running": {}})],
        },
        "failed",
        "DeletionByPodGC: PodGC: node no longer exists",
    ),
    (
        {
            "phase": "Running",
            "reason": "NodeLost",
            "message": "Node n1 which was running pod p is unresponsive",
            "containerStatuses": [container(state={"running": {}})],
        },
        "running",
        "NodeLost: Node n1 which was running pod p is unresponsive",
    ),
    (
        {"phase": "Failed", "reason": "OutOfcpu", "message": "Pod was rejected: Node didn't have enough resource: cpu"},
        "failed",
        "OutOfcpu: Pod was rejected: Node didn't have enough resource: cpu",
    ),
    (
        {
            "phase": "Pending",
            "containerStatuses": [
                container(
                    state={"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}}
                )
            ],
        },
        "pending",
        'worker: CreateContainerConfigError: secret "s" not found',
    ),
    (
        {
            "phase": "Pending",
            "initContainerStatuses": [
                container("fetch", state=ended(0, "", "Completed")),
                container(
                    "verify",
                    restartCount=4,
                    state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 1m20s"}},
                    lastState=ended(2, "patchscan: digest"),
                ),
            ],
        },
        "failed",
        "verify: exit code 2, started 5 times, patchscan: digest",
    ),
    (
        {
            "phase": "Running",
            "containerStatuses": [container(restartCount=1, state={"running": {}}, lastState=ended(1))],
        },
        "running",
        "",
    ),
    ({}, "pending", ""),
    (
        {"phase": "Unknown", "containerStatuses": [container(state={"running": {}})]},
        "running",
        "its node does not answer",
    ),
    (
        {
            "phase": "Pending",
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "SchedulingGated",
                    "message": "Scheduling is blocked",
                }
            ],
        },
        "pending",
        "no node takes it: Scheduling is blocked",
    ),
]


@pytest.mark.parametrize(("status", "phase", "reason"), CASES)
def test_a_pods_state_and_reason(status: Body, phase: str, reason: str) -> None:
    state = pod_state(pod(status, "1Gi"))
    assert (state.phase, state.reason, state.index) == (phase, reason, 7)
    assert state.oom_killed == ("OOMKilled" in reason)


def test_a_pod_that_is_being_ended_says_so_and_why() -> None:
    """On a node that is lost it stays so, and its Job waits for it."""
    by = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "Taint manager"}
    body = pod({"phase": "Running", "conditions": [by], "containerStatuses": [container(state={"running": {}})]})
    body["metadata"]["deletionTimestamp"] = "2026-11-27T02:00:00Z"
    state = pod_state(body)
    assert state.phase == "running"
    assert state.reason == "it is being ended since 2026-11-27T02:00:00Z: DeletionByTaintManager: Taint manager"


@pytest.mark.parametrize("disrupted", [False, True])
def test_an_eviction_is_the_pods_own_fault_unless_its_node_was_short(disrupted: bool) -> None:
    words = 'Usage of EmptyDir volume "scratch" exceeds the limit "10Gi".'
    status: Body = {"phase": "Failed", "reason": "Evicted", "message": words}
    by = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    state = pod_state(pod(status | ({"conditions": [by]} if disrupted else {})))
    assert (state.over_limit, state.disrupted) == (not disrupted, disrupted)


def test_a_pod_that_a_short_node_does_not_let_begin_has_no_fault() -> None:
    words = "Pod was rejected: The node had condition: [DiskPressure]. "
    assert not pod_state(pod({"phase": "Failed", "reason": "Evicted", "message": words})).over_limit


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (None, ""),
        ("\n \n", ""),
        ("one\ntwo\n", "two"),
        ("patchscan: first\npatchscan: second\nTrailing", "patchscan: second"),
        ("x" * 999, "x" * 300),
    ],
)
def test_last_words(message: str | None, words: str) -> None:
    assert last_words(message) == words
