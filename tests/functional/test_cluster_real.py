"""The same client and manifests on a real cluster, where KUBECONFIG names one: in a namespace made for it that refuses
pods that are not "restricted", and removed afterwards.

PATCHSCAN_SCAN_IMAGE is the scan image as its nodes know it (default: the manifests' own).
"""

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scanning import coordinator
from scanning.cluster import AlreadyExists, Cluster, JobGone
from scanning.coordinator import Workers, worker_job
from scanning.listing import Filters
from scanning.plan import Plan, ShardSize, Source, plan
from scanning.store import open_store
from scanning.submitting import log_lines
from tests.scan_kit import StubScorer, image

K8S = Path(__file__).parents[2] / "k8s"
IMAGE = os.environ.get("PATCHSCAN_SCAN_IMAGE", "localhost/patchscan-scan:0.1.0")
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"

pytestmark = pytest.mark.skipif(
    "KUBECONFIG" not in os.environ or shutil.which("kubectl") is None,
    reason="needs a cluster: set KUBECONFIG, and install kubectl",
)


def kubectl(*arguments: str, text: str | None = None) -> str:
    """What kubectl prints, its warnings included; fails where it does."""
    done = subprocess.run(
        ["kubectl", *arguments], input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"patchscan-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, RESTRICTED)
        kubectl("create", "serviceaccount", "patchscan-scan", "-n", name)
        kubectl("create", "secret", "generic", "patchscan-token", "--from-literal=token=t", "-n", name)
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def made(tmp_path: Path) -> Plan:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(image(number))
    out = open_store(str(tmp_path / "out"))
    return plan(Source(url=str(tmp_path / "in")), Filters(), StubScorer().card, out, ShardSize(max_objects=1))


@pytest.mark.parametrize(
    "source", [*sorted(K8S.glob("train-*.yaml")), K8S, K8S / "overlays/demo", K8S / "overlays/train-cpu"], ids=str
)
def test_the_api_server_takes_every_manifest_without_a_warning(source: Path, namespace: str) -> None:
    how = ["-f" if source.is_file() else "-k", str(source)]
    said = kubectl("apply", "--dry-run=server", "--validate=strict", "-n", namespace, *how)
    assert "Warning" not in said, said


def test_an_indexed_job_is_followed_to_its_end_and_its_failures_are_told(namespace: str, made: Plan) -> None:
    cluster = Cluster.connect(namespace)
    own = cluster.create_job(_job_of_the_cron_job())
    try:
        body = worker_job(made, "/out/scans/x/plan.json", [0, 1, 2], 1, Workers(command=[], cpu="50m", retries=0), own)
        container = body["spec"]["template"]["spec"]["containers"][0]
        script = 'echo index $JOB_COMPLETION_INDEX >&2; [ "$JOB_COMPLETION_INDEX" != 1 ] || exit 75'
        container["args"] = ["sh", "-c", script]
        body["spec"]["activeDeadlineSeconds"] = 180
        job = cluster.create_job(body)
        with pytest.raises(AlreadyExists):
            cluster.create_job(body)
        assert coordinator.find_running(cluster, made) is not None
        states = list(cluster.follow(job.name))
        assert (states[-1].condition, states[-1].succeeded, states[-1].failed) == ("Failed", 2, [1])
        assert cluster.failures(job.name)[1].exit_code == 75
        assert cluster.failures(job.name)[1].message == "index 1"
        assert list(log_lines(cluster, job.name, 2, follow=True)) == ["== worker", "index 2"]
    finally:
        cluster.delete_job(own.name)
    _wait_until_gone(cluster, job.name)
    with pytest.raises(JobGone):
        list(cluster.follow(job.name))


def _job_of_the_cron_job() -> dict[str, object]:
    """A coordinator's Job that does nothing, of the manifest's own pod template."""
    cron_job = next(one for one in yaml.safe_load_all((K8S / "base/scan.yaml").read_text()) if one["kind"] == "CronJob")
    spec = cron_job["spec"]["jobTemplate"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    container |= {"image": IMAGE, "args": ["sleep", "300"], "envFrom": []}
    container["resources"] = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "coordinator"}, "spec": spec}


def _wait_until_gone(cluster: Cluster, name: str) -> None:
    """The workers' Job goes with the coordinator's, which owns it."""
    end = time.monotonic() + 60
    while cluster.job(name) is not None:
        assert time.monotonic() < end, f"{name} outlives its owner"
        time.sleep(1)
