"""The same client and manifests on a real cluster, where KUBECONFIG names one: in a namespace made for it that refuses
pods that are not "restricted", and removed afterwards.

PATCHSCAN_SCAN_IMAGE is an image with a shell as the nodes know it (default: the scan image as the manifests name it; a
tiny one such as busybox does too, since no pod here runs patchscan).
"""

import hashlib
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchscan.cluster import coordinator
from patchscan.cluster.api_server import AlreadyExistsError
from patchscan.cluster.client import Cluster, Job, JobGoneError
from patchscan.cluster.coordinator import SHARDS_ANNOTATION, ConfigurationError, ShardsFailedError, WorkerSettings
from patchscan.cluster.rollout import ARCHIVE_ANNOTATION, RejectedArchiveError, next_step
from patchscan.cluster.submitting import log_lines
from patchscan.scanning.plan import Plan, ScanSource
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.store import Store
from tests.scan_kit import StubScorer, image

Body = dict[str, Any]

K8S = Path(__file__).parents[2] / "k8s"
SOURCES = [*sorted(K8S.glob("train-*.yaml")), K8S, *sorted((K8S / "overlays").iterdir())]
IMAGE = os.environ.get("PATCHSCAN_SCAN_IMAGE", "localhost/patchscan-scan:0.2.0")
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
SMALL = {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}}
PATIENCE_S = 180
# Kinds that the API server lacks, or that are outside the namespace.
CUSTOM = ("Namespace", "PodMonitor", "PrometheusRule")

pytestmark = pytest.mark.skipif(
    "KUBECONFIG" not in os.environ or shutil.which("kubectl") is None,
    reason="needs a cluster: set KUBECONFIG, and install kubectl",
)


def kubectl(*arguments: str, text: str | None = None, fails: bool = False) -> str:
    """What kubectl prints, its warnings included."""
    done = subprocess.run(
        ["kubectl", *arguments], input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def wait_for(what: str, true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"patchscan-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, RESTRICTED)
        _accounts(name)
        kubectl("create", "secret", "generic", "patchscan-token", "--from-literal=token=t", "-n", name)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def cluster(namespace: str) -> Cluster:
    return Cluster.connect(namespace)


@pytest.fixture
def own(cluster: Cluster) -> Iterator[Job]:
    """A coordinator's Job that does nothing, of the manifest's own pod template."""
    found = _of(K8S / "base/scan.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    _runs(found["template"], "sleep 600")
    name = f"coordinator-{uuid.uuid4().hex[:6]}"
    job = cluster.create_job({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": found})
    yield job
    cluster.delete_job(name)


class Scan:
    """A planned scan of three shards. Its pods run a script in place of a worker, and the test writes their parts."""

    def __init__(self, folder: Path, cluster: Cluster, own: Job):
        (folder / "in").mkdir()
        for number in range(3):
            (folder / "in" / f"{number}.png").write_bytes(image(number))
        self.cluster, self.own, self.scorer = cluster, own, StubScorer()
        self.out: Store = open_store(str(folder / "out"))
        self.plan: Plan = plan_scan(
            ScanRequest(source=ScanSource(url=str(folder / "in")), card=self.scorer.card, shard_objects=1),
            self.out,
        )

    def work(self, script: str, retries: int = 0) -> None:
        """What the coordinator does; JOB_COMPLETION_INDEX is the pod's index."""
        workers = WorkerSettings(
            command=["sh", "-c", script], cpu="20m", memory="64Mi", retries=retries, deadline_s=PATIENCE_S
        )
        coordinator.work_shards(Cluster.connect(self.cluster.namespace), self.plan, self.out, workers, self.own)

    def write(self, *shards: int) -> None:
        for shard in shards:
            Worker(self.plan, self.out, self.scorer, WorkSettings(threads=1)).work(shard)

    def jobs(self) -> list[Job]:
        return self.cluster.jobs(f"{coordinator.SCAN_LABEL}={self.plan.scan}")


@pytest.fixture
def scan(tmp_path: Path, cluster: Cluster, own: Job) -> Iterator[Scan]:
    made = Scan(tmp_path, cluster, own)
    yield made
    coordinator.clean_up(cluster, made.plan)


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(K8S.parent)))
def test_the_api_server_takes_every_manifest_without_a_warning(source: Path, namespace: str) -> None:
    text = source.read_text() if source.is_file() else kubectl("kustomize", str(source))
    bodies = [body for body in yaml.safe_load_all(text) if body["kind"] not in CUSTOM]
    for body in bodies:
        body["metadata"]["namespace"] = namespace
        for subject in body.get("subjects", []):
            subject.pop("namespace", None)
    said = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=yaml.safe_dump_all(bodies))
    assert "Warning" not in said, said


def test_applied_twice_nothing_changes_and_every_right_is_the_least(namespace: str) -> None:
    where = ["-n", namespace, "-k", str(K8S / "overlays/demo")]
    kubectl("apply", *where)
    try:
        again = kubectl("apply", *where).splitlines()
        # kubectl sends a budget's selector every time, since a patch replaces it as a whole.
        changed = [line for line in again if not line.endswith("unchanged")]
        assert changed == ["poddisruptionbudget.policy/patchscan-serve configured"]
        wait_for("a serving pod that pod security admits", lambda: "patchscan-serve" in _pods(namespace))
        for account, verb, what, answer in (
            ("patchscan-scan", "create", "jobs.batch", "yes"),
            ("patchscan-scan", "list", "pods", "yes"),
            ("patchscan-scan", "patch", "jobs.batch", "yes"),
            ("patchscan-scan", "create", "events", "yes"),
            ("patchscan-scan", "get", "secrets", "no"),
            ("patchscan-scan", "patch", "deployments.apps/patchscan-serve", "no"),
            ("patchscan-roll-out", "patch", "deployments.apps/patchscan-serve", "yes"),
            ("patchscan-roll-out", "patch", "deployments.apps/other", "no"),
            ("patchscan-roll-out", "list", "pods", "yes"),
            ("patchscan-roll-out", "create", "events", "yes"),
            ("patchscan-roll-out", "create", "jobs.batch", "no"),
            ("patchscan-serve", "list", "pods", "no"),
        ):
            asked = ["auth", "can-i", verb, what, "-n", namespace, f"--as=system:serviceaccount:{namespace}:{account}"]
            assert kubectl(*asked, fails=answer == "no").split()[0] == answer, (account, verb, what)
    finally:
        kubectl("delete", "--ignore-not-found", *where)
        _accounts(namespace)


@pytest.mark.parametrize(("code", "tries"), [(2, 1), (75, 2)])
def test_a_training_ends_at_once_on_a_wrong_setting_and_is_tried_again_otherwise(
    code: int, tries: int, cluster: Cluster
) -> None:
    job = _of(K8S / "train-ssp.yaml", "Job")
    job["metadata"]["name"] = name = f"train-{code}"
    job["spec"]["backoffLimit"] = 1
    _runs(job["spec"]["template"], f"exit {code}")
    job["spec"]["template"]["spec"].pop("nodeSelector")
    cluster.create_job(job)
    try:
        last = list(cluster.follow(name))[-1]
        assert last.condition == "Failed"
        assert len(cluster.pods(name)) == tries
        assert {pod.exit_code for pod in cluster.failed_pods(name)} == {code}
    finally:
        cluster.delete_job(name)


# -- scans -------------------------------------------------------------------------------------------------------------


def test_failed_shards_are_named_and_a_rerun_by_two_coordinators_is_one_job_of_only_them(scan: Scan) -> None:
    scan.write(0, 2)
    failing = 'sleep 5; echo index $JOB_COMPLETION_INDEX >&2; [ "$JOB_COMPLETION_INDEX" != 1 ] || exit 75'
    made = coordinator.worker_job(
        scan.plan, "/out", [0, 1, 2], 1, WorkerSettings(command=["sh", "-c", failing], retries=0), scan.own
    )
    made["spec"]["template"]["spec"]["containers"][0]["resources"] = SMALL
    first = scan.cluster.create_job(made)
    with pytest.raises(AlreadyExistsError):
        scan.cluster.create_job(made)
    with pytest.raises(ShardsFailedError, match="shards 1 missing: shard 1: exit code 75, index 1; a rerun"):
        scan.work("exit 1")
    assert [job.name for job in scan.jobs()] == [first.name], "the running Job was found again"
    assert (scan.jobs()[0].succeeded, scan.jobs()[0].failed_indexes) == (2, [1])
    assert list(log_lines(scan.cluster, first.name, 2, follow=True)) == ["== worker", "index 2"]

    crew = [threading.Thread(target=scan.work, args=("sleep 5",)) for _ in range(2)]
    for one in crew:
        one.start()
    wait_for("the rerun's Job", lambda: len(scan.jobs()) == 2)
    scan.write(1)
    for one in crew:
        one.join(PATIENCE_S)
    second = scan.jobs()[1]
    assert len(scan.jobs()) == 2
    assert (second.completions, second.condition) == (1, "Complete")
    assert second.annotations[SHARDS_ANNOTATION] == "1"
    coordinator.clean_up(scan.cluster, scan.plan)
    wait_for("the Jobs to be gone", lambda: scan.jobs() == [])


def test_killed_pods_are_replaced(scan: Scan) -> None:
    worker = threading.Thread(target=scan.work, args=("sleep 8", 3))
    worker.start()
    wait_for("the Job", scan.jobs)
    (job,) = scan.jobs()
    wait_for("a running pod", lambda: "Running" in _phases(scan.cluster, job.name))
    victims = {pod["metadata"]["name"] for pod in scan.cluster.pods(job.name)}
    for victim in victims:
        kubectl("delete", "pod", victim, "-n", scan.cluster.namespace, "--grace-period=1", "--wait=false")
    scan.write(0, 1, 2)
    worker.join(PATIENCE_S)
    (job,) = scan.jobs()
    assert (job.condition, job.succeeded, job.failed_indexes) == ("Complete", 3, [])
    assert {pod["metadata"]["name"] for pod in scan.cluster.pods(job.name)} - victims


def test_a_wrong_setting_is_tried_once_an_index(scan: Scan) -> None:
    with pytest.raises(ConfigurationError, match="exit code 2"):
        scan.work("echo refused >&2; exit 2", retries=3)
    assert len(scan.cluster.pods(scan.jobs()[0].name)) == 3


def test_the_workers_go_with_their_coordinator(scan: Scan) -> None:
    workers = WorkerSettings(command=["sh", "-c", "sleep 300"], cpu="20m", memory="64Mi")
    job = scan.cluster.create_job(coordinator.worker_job(scan.plan, "/out", [0, 1, 2], 1, workers, scan.own))
    scan.cluster.delete_job(scan.own.name)
    wait_for("the workers' Job to be gone", lambda: scan.cluster.job(job.name) is None)
    with pytest.raises(JobGoneError):
        list(scan.cluster.follow(job.name))


# -- a new model -------------------------------------------------------------------------------------------------------


def test_a_model_whose_pods_fail_is_taken_back_and_the_old_pods_stay(cluster: Cluster, tmp_path: Path) -> None:
    """The pods' gate refuses the archive whose content is "bad"."""
    refused = hashlib.sha256(b"bad").hexdigest()[:12]
    deployment = _of(K8S / "base/serve.yaml", "Deployment")
    deployment["spec"]["progressDeadlineSeconds"] = 20
    pod = deployment["spec"]["template"]["spec"]
    pod |= {"initContainers": pod["initContainers"][:1], "terminationGracePeriodSeconds": 1}
    _runs(deployment["spec"]["template"], "sleep 600", f'[ "$ARCHIVE" != {refused} ]')
    kubectl("apply", "-n", cluster.namespace, "-f", "-", text=yaml.safe_dump(deployment))
    store, versions = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "versions"))

    def publish(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        store.write("ssp.mar", data)
        store.write("ssp.mar.sha256", digest.encode())
        return digest[:12]

    def step() -> str:
        return next_step(cluster, "patchscan-serve", "ssp", store, versions)

    try:
        good = publish(b"good")
        wait_for("the good one to serve", lambda: step() == f"{good} serves")
        before = _serving(cluster.namespace, good)
        bad = publish(b"bad")
        assert "is rolled out" in step()
        with pytest.raises(RejectedArchiveError, match=f"{bad} did not become ready, {good} serves"):
            wait_for("the bad one to be taken back", lambda: step() is None)
        assert step() in (f"{bad} was rejected, {good} serves", f"the roll-out of {good} is under way")
        wait_for("the bad pod to be gone", lambda: step() == f"{bad} was rejected, {good} serves")
        assert _serving(cluster.namespace, good) == before
        assert len(before) == 1
    finally:
        kubectl("delete", "deployment", "patchscan-serve", "-n", cluster.namespace)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _of(path: Path, kind: str) -> Body:
    """The one object of a kind in a file."""
    found: Body = next(one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == kind)
    return found


def _runs(template: Body, script: str, first: str = "") -> None:
    """Have a pod template's container run a script, and its first container for initialisation another."""
    for container, text in zip(
        [*template["spec"]["containers"], *template["spec"].get("initContainers", [])], (script, first), strict=False
    ):
        container |= {"image": IMAGE, "args": ["sh", "-c", text], "envFrom": [], "resources": SMALL}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(probe, None)


def _accounts(namespace: str) -> None:
    """The manifests' ServiceAccounts, as kubectl apply makes them."""
    for path in ("base/scan.yaml", "base/serve.yaml", "train-ssp.yaml"):
        kubectl("apply", "-n", namespace, "-f", "-", text=yaml.safe_dump(_of(K8S / path, "ServiceAccount")))


def _pods(namespace: str) -> str:
    return kubectl("get", "pods", "-n", namespace, "-o", "name")


def _serving(namespace: str, archive: str) -> set[str]:
    """The pods that serve an archive and are not ending."""
    found = yaml.safe_load(kubectl("get", "pods", "-n", namespace, "-o", "yaml"))["items"]
    pods = [pod["metadata"] for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return {pod["name"] for pod in pods if pod.get("annotations", {}).get(ARCHIVE_ANNOTATION) == archive}


def _phases(cluster: Cluster, job: str) -> set[str]:
    return {pod["status"]["phase"] for pod in cluster.pods(job)}
