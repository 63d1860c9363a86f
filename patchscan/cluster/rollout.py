"""Roll out a published model to the serving Deployment, whose pods verify their archive before they serve.

The pod template names the archive, so that all replicas of a template serve the same one, also those that start later,
and the old replicas serve until the new ones are ready. A roll-out that does not succeed is rolled back. All state is
kept in annotations of the Deployment, so that a call may be interrupted anywhere and the next one continues.
"""

import hashlib
from typing import Any

from patchscan.cluster.client import Cluster, ClusterError
from patchscan.common.errors import UserError
from patchscan.storage.store import Store, StoreError

# An annotation of the pod template: the archive that its pods serve.
ARCHIVE_ANNOTATION = "patchscan/archive"
# Annotations of the Deployment: the archive last rolled out with success, and the one last rejected.
GOOD_ANNOTATION = "patchscan/archive-good"
REJECTED_ANNOTATION = "patchscan/archive-rejected"
# The labels of scan Jobs. A scan stops when the model changes under it, so a roll-out waits for running scans.
SCAN_SELECTOR = "app.kubernetes.io/part-of=patchscan,app.kubernetes.io/component=scan"


class RejectedArchiveError(UserError):
    """The new model's pods did not become ready; the old model serves."""

    exit_code = 1


def next_step(cluster: Cluster, deployment: str, model: str, store: Store, versions: Store) -> str:
    """Do the one step that is due, if any. Returns a sentence that says what was done or what is waited for.

    Raises RejectedArchiveError, ClusterError, StoreError.
    """
    found = cluster.deployment(deployment)
    if found is None:
        raise ClusterError(f"there is no Deployment {deployment} in {cluster.namespace}: first kubectl apply -k k8s/")
    annotations = found["metadata"].get("annotations", {})
    current, good = _archive(found["spec"]["template"]), annotations.get(GOOD_ANNOTATION)
    state = roll_out_state(found)
    if state == "under way":
        return f"the roll-out of {current or 'a new template'} is under way"
    if state == "failed" and current != good:
        _change(cluster, deployment, archive=good, annotations={REJECTED_ANNOTATION: current})
        raise RejectedArchiveError(
            f"{current} did not become ready, {good or 'the old archive'} serves: see the logs of its pods' verify "
            f"container; to try it again: kubectl annotate deployment {deployment} {REJECTED_ANNOTATION}-"
        )
    if state == "complete" and current != good:
        _change(cluster, deployment, archive=current, annotations={GOOD_ANNOTATION: current})
    wanted = keep_version(model, store, versions)
    if wanted == current:
        return f"{wanted} serves"
    if wanted == annotations.get(REJECTED_ANNOTATION):
        return f"{wanted} was rejected, {current} serves"
    if any(not job.finished for job in cluster.jobs(SCAN_SELECTOR)):
        return f"{wanted} waits until the running scan has ended"
    _change(cluster, deployment, archive=wanted, annotations={GOOD_ANNOTATION: current, REJECTED_ANNOTATION: None})
    return f"{wanted} is rolled out in place of {current or 'the old archive'}"


def roll_out_state(deployment: dict[str, Any]) -> str:
    """Return complete, failed or under way, by the rules of `kubectl rollout status`."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return "under way"
    if any(condition.get("reason") == "ProgressDeadlineExceeded" for condition in status.get("conditions", [])):
        return "failed"
    updated = status.get("updatedReplicas", 0)
    settled = updated >= wanted and status.get("replicas", 0) <= updated <= status.get("availableReplicas", 0)
    return "complete" if settled else "under way"


def keep_version(model: str, store: Store, versions: Store) -> str:
    """Copy the model store's archive to `versions`, unless it is there, under the first 12 digits of its SHA-256;
    returns these. Raises StoreError where the store has no archive, or one that does not match its .sha256 file."""
    digest_file = store.read(f"{model}.mar.sha256")
    if digest_file is None:
        raise StoreError(f"{store.url} holds no {model}.mar.sha256: publish both files that `patchscan archive` wrote")
    digest = digest_file.decode().split()[0]
    name = digest[:12]
    if versions.read(f"{name}/{model}.mar.sha256") is None:
        data = store.read(f"{model}.mar") or b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{store.url}/{model}.mar does not match its .sha256 file (is it still being copied?)")
        versions.write(f"{name}/{model}.mar", data)
        versions.write(f"{name}/{model}.mar.sha256", digest_file)
    return name


def _archive(template: dict[str, Any]) -> str | None:
    result: str | None = template["metadata"].get("annotations", {}).get(ARCHIVE_ANNOTATION)
    return result


def _change(cluster: Cluster, deployment: str, archive: str | None, annotations: dict[str, str | None]) -> None:
    template = {"metadata": {"annotations": {ARCHIVE_ANNOTATION: archive}}}
    cluster.patch("Deployment", deployment, {"metadata": {"annotations": annotations}, "spec": {"template": template}})
