"""A published model into serving, step by step, on an API server over HTTP and a model store on disk."""

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchscan.cluster.api_server import ClusterError
from patchscan.cluster.client import Cluster
from patchscan.cluster.rollout import (
    ARCHIVE_ANNOTATION,
    GOOD_ANNOTATION,
    REJECTED_ANNOTATION,
    NothingServesError,
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
        ready = 0 if how == "dead" else 2
        status: Body = {"observedGeneration": body["metadata"]["generation"], "replicas": 2, "availableReplicas": ready}
        progress = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
        if how in ("stuck", "dead"):
            status |= {"replicas": 3, "updatedReplicas": 1}
            progress |= {"status": "False", "reason": "ProgressDeadlineExceeded"}
        else:
            status |= {"updatedReplicas": 2}
        self.api.put("deployments", body | {"status": status | {"conditions": [progress]}})

    def put_pod(self, name: str, fetched: str, verify: Body) -> None:
        """A pod of the Deployment's template as it is now: what its fetch container said, and its verify container's
        status."""
        template = self.deployment()["spec"]["template"]
        fetch = {"name": "fetch", "state": {"terminated": {"exitCode": 0, "reason": "Completed", "message": fetched}}}
        status = {"phase": "Pending", "initContainerStatuses": [fetch, {"name": "verify"} | verify]}
        metadata = {"name": name, **template["metadata"]}
        self.api.put("pods", copy.deepcopy({"metadata": metadata, "spec": template["spec"], "status": status}))

    def events(self) -> list[tuple[str, str, int]]:
        """Type, reason and count of the Deployment's events."""
        found = [event for event in self.api.all("events") if event["involvedObject"]["name"] == NAME]
        assert all(event["involvedObject"]["uid"] == self.deployment()["metadata"]["uid"] for event in found)
        return [(event["type"], event["reason"], event["count"]) for event in found]

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


def refused(words: str) -> Body:
    """The status of a container that ends again and again, as the kubelet writes it."""
    ended = {"exitCode": 2, "reason": "Error", "message": f"loading\n{words}\n"}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}
    return {"restartCount": 3, "state": {"waiting": waiting}, "lastState": {"terminated": ended}}


PASSED: Body = {"restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}


def test_a_rejection_quotes_the_pod_and_is_an_event(bench: Bench) -> None:
    first = bench.publish(b"first")
    bench.step()
    bench.pods_become("ready")
    bench.step()
    bad = bench.publish(b"bad")
    bench.step()
    bench.put_pod("serve-1", bad, refused("patchscan: golden image 3: 0.41 in place of 0.87"))
    assert "golden image 3" in bench.step()
    bench.pods_become("stuck")
    with pytest.raises(
        RejectedArchiveError, match=f"{first} serves: verify: exit code 2, .*golden image 3: 0.41 in pl"
    ):
        bench.step()
    assert ("Warning", "Rejected", 1) in bench.events()
    assert ("Normal", "RolledOut", 1) in bench.events()
    (rejected,) = [event for event in bench.api.all("events") if event["reason"] == "Rejected"]
    assert "golden image 3" in rejected["message"]


def test_a_rejection_quotes_pods_that_run_and_those_that_the_cluster_refuses(bench: Bench) -> None:
    bench.publish(b"first")
    bench.step()
    bench.pods_become("ready")
    bench.step()
    bad = bench.publish(b"bad")
    bench.step()
    bench.pods_become("stuck")
    body = bench.deployment()
    refused = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota"}
    conditions = [*body["status"]["conditions"], refused]
    bench.api.put("deployments", body | {"status": body["status"] | {"conditions": conditions}})
    with pytest.raises(RejectedArchiveError, match="the cluster refuses to create a pod: exceeded quota"):
        bench.step()
    bench.cluster.patch("Deployment", NAME, {"metadata": {"annotations": {REJECTED_ANNOTATION: None}}})
    bench.pods_become("ready")
    bench.step()
    assert bench.serves == bad
    bench.put_pod("serve-1", bad, PASSED)
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    serve = {"name": "serve", "ready": False, "restartCount": 2, "state": {"running": {}}}
    pod: Any = bench.api.get("pods", "serve-1")
    pod["status"] |= {"phase": "Running", "containerStatuses": [serve | {"lastState": {"terminated": ended}}]}
    bench.pods_become("stuck")
    with pytest.raises(
        RejectedArchiveError, match=r"serve runs and is not ready, before: .* \(OOMKilled\), its limit is 4Gi"
    ):
        bench.step()


def test_a_rejection_quotes_the_event_of_a_pod_that_waits_for_its_volume(bench: Bench) -> None:
    """The status of a pod whose Secret is not there says nothing; one that is being ended has nothing to say."""
    bench.publish(b"first")
    bench.step()
    bench.pods_become("ready")
    bench.step()
    bad = bench.publish(b"second")
    bench.step()
    for name, state in (("serve-1", refused("patchscan: of the old node")), ("serve-2", PASSED)):
        bench.put_pod(name, bad, state)
    ended: Any = bench.api.get("pods", "serve-1")
    ended["metadata"]["deletionTimestamp"] = "2026-11-27T02:00:00Z"
    on = {"kind": "Pod", "name": "serve-2"}
    event = {"metadata": {"name": "mount"}, "involvedObject": on, "type": "Warning", "reason": "FailedMount"}
    bench.api.put("events", event | {"message": 'secret "patchscan-token" not found'})
    bench.pods_become("stuck")
    with pytest.raises(RejectedArchiveError, match='serves: FailedMount: secret "patchscan-token" not found'):
        bench.step()


def test_a_paused_deployment_is_told_and_left_alone(bench: Bench) -> None:
    bench.publish(b"first")
    body = bench.deployment()
    bench.api.put("deployments", body | {"spec": body["spec"] | {"paused": True}})
    assert "is paused: kubectl rollout resume" in bench.step()
    assert bench.serves is None
    assert bench.events() == [("Warning", "Paused", 1)]


def test_a_first_archive_that_is_bad_fails_and_says_that_nothing_serves(bench: Bench) -> None:
    bad = bench.publish(b"bad")
    bench.put_pod("serve-1", bad, refused("patchscan: ssp.mar: the weights are not those of its card"))
    bench.pods_become("dead")
    for _ in range(2):
        with pytest.raises(NothingServesError, match=f"nothing serves: pods with {bad} .*the weights are not those"):
            bench.step()
    assert bench.events() == [("Warning", "NothingServes", 2)]
    start_scan(bench)  # it waits for the server, so nothing may wait for it
    better = bench.publish(b"better")
    assert bench.step() == f"{better} is rolled out in place of {bad}"


def test_a_first_archive_that_the_pods_do_not_name_is_taken_back_and_nothing_serves(bench: Bench) -> None:
    bad = bench.publish(b"bad")
    bench.pods_become("dead")
    bench.step()
    bench.pods_become("dead")
    with pytest.raises(NothingServesError, match=f"{bad} did not become ready, nothing serves"):
        bench.step()
    bench.pods_become("dead")
    with pytest.raises(NothingServesError, match="nothing serves"):
        bench.step()


def test_no_replicas_serve_nothing(bench: Bench) -> None:
    bench.publish(b"first")
    body = bench.deployment()
    bench.api.put("deployments", body | {"spec": body["spec"] | {"replicas": 0}})
    with pytest.raises(NothingServesError, match="nothing serves: kubectl scale"):
        bench.step()
    assert bench.serves is None
    assert bench.events() == [("Warning", "NothingServes", 1)]
    assert bench.api.all("events")[0]["metadata"]["labels"] == {"app.kubernetes.io/part-of": "patchscan"}


def test_fresh_pods_that_serve_the_archive_are_not_replaced(bench: Bench) -> None:
    first = bench.publish(b"first")
    for name in ("serve-1", "serve-2"):
        bench.put_pod(name, f"{first}\n", PASSED)
    bench.put_pod("old", "0" * 12, PASSED)
    ending: Any = bench.api.get("pods", "old")
    ending["metadata"]["deletionTimestamp"] = "2026-11-26T01:00:00Z"
    generation = bench.deployment()["metadata"]["generation"]
    assert bench.step() == f"{first} serves"
    assert bench.step() == f"{first} serves"
    assert bench.deployment()["metadata"]["generation"] == generation
    assert bench.events() == [("Normal", "RolledOut", 1)]

    # Before it waits for a scan, the archive is named, so that pods that start meanwhile do not fetch the new one.
    job = start_scan(bench)
    second = bench.publish(b"second")
    assert bench.step() == f"{second} waits until the running scan has ended"
    assert bench.serves == first
    bench.pods_become("ready")
    assert "waits" in bench.step()
    assert ("Normal", "WaitsForScan", 2) in bench.events()
    bench.cluster.delete_job(job)
    assert bench.step() == f"{second} is rolled out in place of {first}"
    bench.pods_become("stuck")
    with pytest.raises(RejectedArchiveError, match=f"{first} serves"):
        bench.step()
    assert bench.serves == first


def test_pods_that_fetched_different_archives_are_brought_together(bench: Bench) -> None:
    first = bench.publish(b"first")
    bench.put_pod("serve-1", first, PASSED)
    bench.put_pod("serve-2", "0" * 12, PASSED)
    bench.cluster.patch("Deployment", NAME, {"metadata": {"annotations": {GOOD_ANNOTATION: "1" * 12}}})
    bench.pods_become("ready")
    assert bench.step() == f"{first} is rolled out in place of the old archive"
    assert bench.events() == [("Normal", "RollingOut", 1)]


def test_events_that_may_not_be_recorded_do_not_stop_a_roll_out(bench: Bench) -> None:
    first = bench.publish(b"first")
    bench.api.faults = [("POST", "/events", 403)]
    assert bench.step() == f"{first} is rolled out in place of the old archive"
    assert bench.events() == []


def start_scan(bench: Bench) -> str:
    """A scan's Job that runs; returns its name."""
    labels = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": "scan"}
    metadata = {"name": "night", "labels": labels}
    return bench.cluster.create_job({"kind": "Job", "metadata": metadata, "spec": {"template": {}}}).name


def test_a_scan_under_way_is_let_finish(bench: Bench) -> None:
    job = start_scan(bench)
    new = bench.publish(b"new")
    assert "waits until the running scan has ended" in bench.step()
    assert bench.serves is None
    bench.cluster.delete_job(job)
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


def test_an_archive_whose_copy_was_interrupted_is_copied_again(bench: Bench) -> None:
    """A training Job's last step copies archive and digest at once: killed in it, it has left the small one."""
    archive = bench.publish(b"whole")
    kept = bench.folder / "versions" / archive
    kept.mkdir(parents=True)
    (kept / "ssp.mar.sha256").write_bytes((bench.folder / "store/ssp.mar.sha256").read_bytes())
    bench.step()
    assert bench.serves == archive
    assert (kept / "ssp.mar").read_bytes() == b"whole"


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
        told = tmp_path / "told"
        moved = (part.replace("/models", str(models)) for part in fetch["args"])
        command = [part.replace("/dev/termination-log", str(told)) for part in moved]
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, env={**os.environ, **path, **places, "ARCHIVE": archive, "MODEL": "ssp"}, check=True)
        assert (models / "ssp.mar").read_bytes() == expected
        assert told.read_text().strip() == hashlib.sha256(expected).hexdigest()[:12]
