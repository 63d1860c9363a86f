"""A published model into serving: by a roll-out of the Deployment whose pods verify their archive before they serve.

The pod template names the archive, so that every replica of a template serves the same one, also a replica that starts
later, and the replicas of the old template go on until the new one's are ready. A roll-out that does not succeed is
taken back. All that is known of it stands on the Deployment: any call may be the last, the next one goes on.
"""

import hashlib
from typing import Any

from patchscan.cluster.client import Cluster, ClusterError
from patchscan.common.errors import UserError
from patchscan.storage.store import Store, StoreError

# On the pod template: what its pods serve. On the Deployment: what last succeeded, and what did not.
ARCHIVE = "patchscan/archive"
GOOD = "patchscan/archive-good"
REJECTED = "patchscan/archive-rejected"
# A scan that meets two models stops; one that is under way is let finish.
SCANS = "app.kubernetes.io/part-of=patchscan,app.kubernetes.io/component=scan"


class RejectedArchiveError(UserError):
    """The new model's pods did not become ready; the old one serves."""

    exit_code = 1


def next_step(cluster: Cluster, deployment: str, model: str, store: Store, versions: Store) -> str:
    """Do the one step that is due, if any; returns what it was.

    Raises RejectedArchiveError, ClusterError, StoreError.
    """
    found = cluster.deployment(deployment)
    if found is None:
        raise ClusterError(f"there is no Deployment {deployment} in {cluster.namespace}: first kubectl apply -k k8s/")
    notes = found["metadata"].get("annotations", {})
    current, good = _archive(found["spec"]["template"]), notes.get(GOOD)
    state = roll_out_state(found)
    if state == "under way":
        return f"the roll-out of {current or 'a new template'} is under way"
    if state == "failed" and current != good:
        _change(cluster, deployment, archive=good, notes={REJECTED: current})
        raise RejectedArchiveError(
            f"{current} did not become ready, {good or 'what was there'} serves: see the logs of its pods' verify "
            f"container; to try it again: kubectl annotate deployment {deployment} {REJECTED}-"
        )
    if state == "complete" and current != good:
        _change(cluster, deployment, archive=current, notes={GOOD: current})
    wanted = keep(model, store, versions)
    if wanted == current:
        return f"{wanted} serves"
    if wanted == notes.get(REJECTED):
        return f"{wanted} was rejected, {current} serves"
    if any(not job.finished for job in cluster.jobs(SCANS)):
        return f"{wanted} waits until the scan under way has ended"
    _change(cluster, deployment, archive=wanted, notes={GOOD: current, REJECTED: None})
    return f"{wanted} is rolled out in place of {current or 'what was there'}"


def roll_out_state(deployment: dict[str, Any]) -> str:
    """complete, failed or under way: as `kubectl rollout status` decides it."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return "under way"
    if any(one.get("reason") == "ProgressDeadlineExceeded" for one in status.get("conditions", [])):
        return "failed"
    updated = status.get("updatedReplicas", 0)
    settled = updated >= wanted and status.get("replicas", 0) <= updated <= status.get("availableReplicas", 0)
    return "complete" if settled else "under way"


def keep(model: str, store: Store, versions: Store) -> str:
    """The first 12 digits of the digest of the store's archive, under which it is kept among the versions; it is
    copied there where it is not. Raises StoreError where the store holds no archive, or not the one of its digest."""
    noted = store.read(f"{model}.mar.sha256")
    if noted is None:
        raise StoreError(f"{store.url} holds no {model}.mar.sha256: publish what `patchscan archive` wrote, both files")
    digest = noted.decode().split()[0]
    name = digest[:12]
    if versions.read(f"{name}/{model}.mar.sha256") is None:
        data = store.read(f"{model}.mar") or b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{store.url}/{model}.mar is not the archive of its sha256 file (still being copied?)")
        versions.write(f"{name}/{model}.mar", data)
        versions.write(f"{name}/{model}.mar.sha256", noted)
    return name


def _archive(template: dict[str, Any]) -> str | None:
    result: str | None = template["metadata"].get("annotations", {}).get(ARCHIVE)
    return result


def _change(cluster: Cluster, deployment: str, archive: str | None, notes: dict[str, str | None]) -> None:
    template = {"metadata": {"annotations": {ARCHIVE: archive}}}
    cluster.patch("Deployment", deployment, {"metadata": {"annotations": notes}, "spec": {"template": template}})
