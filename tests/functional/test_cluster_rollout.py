"""A published model into serving, step by step, on an API server over HTTP and a model store on disk."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchscan.cluster.client import Cluster, ClusterError
from patchscan.cluster.rollout import (
    ARCHIVE_ANNOTATION,
    GOOD_ANNOTATION,
    REJECTED_ANNOTATION,
    RejectedArchiveError,
    next_step,
    roll_out_state,
)
from patchscan.storage import open_store
from patchscan.storage.store import StoreError
from tests.kube_api import KubeApi
from tests.kube_objects import Body

K8S = Path(__file__).parents[2] / "k8s"
NAME = "patchscan-serve"


class Bench:
    """The Deployment of k8s/base as a cluster holds it, what its controller makes of it, and a store of models."""

    def __init__(self, api: KubeApi, folder: Path):
        self.api, self.folder = api, folder
        self.cluster = Cluster(api.client(), "default", patience_s=5.0)
        documents = yaml.safe_load_all((K8S / "base/serve.yaml").read_text())
        made: Body = next(one for one in documents if one["kind"] == "Deployment")
        made["metadata"]["generation"], made["spec"]["replicas"] = 1, 2
        api.put("deployments", made)
        self.pods_become("ready")

    def publish(self, data: bytes) -> str:
        """What a training Job's last step does."""
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "store").mkdir(exist_ok=True)
        (self.folder / "store/ssp.mar").write_bytes(data)
        (self.folder / "store/ssp.mar.sha256").write_text(f"{digest}  ssp.mar\n")
        return digest[:12]

    def step(self) -> str:
        folders = (open_store(str(self.folder / name)) for name in ("store", "versions"))
        return next_step(self.cluster, NAME, "ssp", *folders)

    def deployment(self) -> Any:
        return self.api.get("deployments", NAME)

    def pods_become(self, how: str) -> None:
        """The Deployment controller's status when the template's pods are ready, or have failed for too long."""
        body = self.deployment()
        status: Body = {"observedGeneration": body["metadata"]["generation"], "replicas": 2, "availableReplicas": 2}
        progress = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
        if how == "stuck":
            status |= {"replicas": 3, "updatedReplicas": 1}
            progress |= {"status": "False", "reason": "ProgressDeadlineExceeded"}
        else:
            status |= {"updatedReplicas": 2}
        self.api.put("deployments", body | {"status": status | {"conditions": [progress]}})

    @property
    def serves(self) -> str | None:
        """The archive that the pod template names."""
        annotations: dict[str, str] = self.deployment()["spec"]["template"]["metadata"]["annotations"]
        return annotations.get(ARCHIVE_ANNOTATION)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with KubeApi() as api:
        yield Bench(api, tmp_path)


def test_what_is_published_is_rolled_out_once_and_kept_under_its_digest(bench: Bench) -> None:
    first = bench.publish(b"first")
    assert bench.step() == f"{first} is rolled out in place of the old archive"
    assert bench.serves == first
    assert (bench.folder / "versions" / first / "ssp.mar").read_bytes() == b"first"
    assert "under way" in bench.step(), "the controller has not seen it yet"
    bench.pods_become("ready")
    assert bench.step() == f"{first} serves"
    generation = bench.deployment()["metadata"]["generation"]
    assert bench.step() == f"{first} serves"
    assert bench.deployment()["metadata"]["generation"] == generation
    # What kubectl apply has set is still there.
    assert "prometheus.io/port" in bench.deployment()["spec"]["template"]["metadata"]["annotations"]


def test_a_model_whose_pods_do_not_become_ready_is_taken_back_and_not_tried_again(bench: Bench) -> None:
    first = bench.publish(b"first")
    bench.step()
    bench.pods_become("ready")
    bench.step()
    bad = bench.publish(b"scores otherwise than archived")
    bench.step()
    assert bench.serves == bad
    bench.pods_become("stuck")
    with pytest.raises(RejectedArchiveError, match=f"{bad} did not become ready, {first} serves"):
        bench.step()
    assert bench.serves == first
    bench.pods_become("ready")
    assert bench.step() == f"{bad} was rejected, {first} serves"
    better = bench.publish(b"better")
    bench.step()
    bench.pods_become("ready")
    assert bench.step() == f"{better} serves"
    notes = bench.deployment()["metadata"]["annotations"]
    assert (notes[GOOD_ANNOTATION], notes.get(REJECTED_ANNOTATION)) == (better, None)


def test_a_first_model_that_fails_leaves_what_was_there(bench: Bench) -> None:
    bad = bench.publish(b"bad")
    bench.step()
    bench.pods_become("stuck")
    with pytest.raises(RejectedArchiveError, match="the old archive serves"):
        bench.step()
    assert bench.serves is None
    bench.pods_become("ready")
    assert f"{bad} was rejected" in bench.step()


def test_a_scan_under_way_is_let_finish(bench: Bench) -> None:
    labels = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": "scan"}
    job = bench.cluster.create_job(
        {"kind": "Job", "metadata": {"name": "night", "labels": labels}, "spec": {"template": {}}}
    )
    new = bench.publish(b"new")
    assert "waits until the running scan has ended" in bench.step()
    assert bench.serves is None
    bench.cluster.delete_job(job.name)
    bench.step()
    assert bench.serves == new


def test_an_archive_that_is_not_its_digests_is_not_rolled_out(bench: Bench) -> None:
    with pytest.raises(StoreError, match=r"holds no ssp\.mar\.sha256"):
        bench.step()
    bench.publish(b"whole")
    (bench.folder / "store/ssp.mar").write_bytes(b"half")
    with pytest.raises(StoreError, match="does not match its"):
        bench.step()
    bench.api.delete("deployments", NAME)
    with pytest.raises(ClusterError, match="no Deployment patchscan-serve"):
        bench.step()


def test_a_deployment_without_pods_yet_is_under_way(bench: Bench) -> None:
    body = bench.deployment()
    assert roll_out_state(body) == "complete"
    assert roll_out_state(body | {"status": {}}) == "under way"
    assert roll_out_state(body | {"status": body["status"] | {"replicas": 3}}) == "under way", "an old pod is ending"


def test_a_pod_fetches_the_archive_that_its_template_names_else_the_stores(bench: Bench, tmp_path: Path) -> None:
    first = bench.publish(b"first")
    bench.step()
    bench.publish(b"second")
    fetch = bench.deployment()["spec"]["template"]["spec"]["initContainers"][0]
    places = {"VERSIONS": str(tmp_path / "versions"), "MODEL_STORE": str(tmp_path / "store")}
    for archive, expected in ((first, b"first"), ("", b"second")):
        models = tmp_path / f"models-{archive}"
        command = [part.replace("/models", str(models)) for part in fetch["args"]]
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, env={**os.environ, **path, **places, "ARCHIVE": archive}, check=True)
        assert (models / "ssp.mar").read_bytes() == expected
