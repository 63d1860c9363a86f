"""Roll out a published model to the serving Deployment, whose pods verify their archive before they serve.

The pod template names the archive, so that all replicas of a template serve the same one, also those that start later,
and the old replicas serve until the new ones are ready. A roll-out that does not succeed is rolled back. All state is
kept in annotations of the Deployment, so that a call may be interrupted anywhere and the next one continues.
"""

import hashlib
import re

from patchscan.cluster.api_server import ClusterError
from patchscan.cluster.client import Cluster
from patchscan.cluster.pods import Body, pod_state, true_condition, why_not_ready
from patchscan.common.errors import UserError
from patchscan.common.files import digest_in
from patchscan.storage.store import Store, StoreError

# The first 12 digits of an archive's SHA-256, which name it.
DIGEST = re.compile("[0-9a-f]{12}")
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


class NothingServesError(RejectedArchiveError):
    """No pod serves a model, and the published one will not change that."""


def next_step(cluster: Cluster, deployment: str, model: str, store: Store, versions: Store) -> str:
    """Do the one step that is due, if any. Returns a sentence that says what was done or what is waited for; events on
    the Deployment say it too.

    Raises RejectedArchiveError, NothingServesError, ClusterError, StoreError.
    """
    found = cluster.get("Deployment", deployment)
    if found is None:
        raise ClusterError(f"there is no Deployment {deployment} in {cluster.namespace}: first kubectl apply -k k8s/")
    if found["spec"].get("replicas", 1) == 0:
        text = f"nothing serves: kubectl scale deployment {deployment} --replicas=2 starts pods"
        cluster.record(found, "NothingServes", text, warning=True)
        raise NothingServesError(text)
    if found["spec"].get("paused"):
        text = f"nothing is rolled out, {deployment} is paused: kubectl rollout resume deployment {deployment}"
        cluster.record(found, "Paused", text, warning=True)
        return text
    annotations = found["metadata"].get("annotations", {})
    current, good = _archive(found["spec"]["template"]), annotations.get(GOOD_ANNOTATION)
    rejected = annotations.get(REJECTED_ANNOTATION)
    pods = cluster.labelled_pods(_selector(found))
    state = roll_out_state(found)
    if state == "under way":
        return _with_reason(
            f"the roll-out of {current or 'a new template'} is under way", _why_not_ready(cluster, found, pods)
        )
    if state == "failed" and current and current != good:
        why = _why_not_ready(cluster, found, pods)  # before the pods go
        _change(cluster, found, archive=good, annotations={REJECTED_ANNOTATION: current})
        raise _rejection(cluster, found, current, good, why)
    served = current or _fetched_archive(pods)
    if state == "complete" and served and served != good:
        cluster.patch("Deployment", deployment, {"metadata": {"annotations": {GOOD_ANNOTATION: served}}})
        cluster.record(found, "RolledOut", f"archive {served} serves")
    wanted = keep_version(model, store, versions)
    if state == "failed" and wanted in (served, rejected):
        raise _nothing_new(cluster, found, wanted, _why_not_ready(cluster, found, pods))
    if wanted == served:
        return f"{wanted} serves"
    if wanted == rejected:
        return f"{wanted} was rejected, {served or 'the old archive'} serves"
    known = served if served and _is_kept(model, served, versions) else current
    return _start(cluster, found, wanted, served, known)


def _start(cluster: Cluster, found: Body, wanted: str, served: str | None, known: str | None) -> str:
    """Roll out `wanted`, unless a scan runs that something serves: one that waits for the server would wait for ever.
    `served` is the archive that the pods serve, where that is known, and `known` the one that can be gone back to by
    its name."""
    serving = found.get("status", {}).get("availableReplicas", 0)
    if serving and any(not job.finished for job in cluster.jobs(SCAN_SELECTOR)):
        if known != _archive(found["spec"]["template"]):
            # Pods that start from now on would fetch the new archive in the middle of the scan.
            _change(cluster, found, archive=known, annotations={GOOD_ANNOTATION: known})
        cluster.record(found, "WaitsForScan", f"archive {wanted} waits until the running scan has ended")
        return f"{wanted} waits until the running scan has ended"
    _change(cluster, found, archive=wanted, annotations={GOOD_ANNOTATION: known, REJECTED_ANNOTATION: None})
    cluster.record(found, "RollingOut", f"archive {wanted} in place of {served or 'the old one'}")
    return f"{wanted} is rolled out in place of {served or 'the old archive'}"


def _rejection(cluster: Cluster, found: Body, rejected: str, good: str | None, why: str) -> RejectedArchiveError:
    """The error for an archive that was taken back, recorded as an event."""
    name = found["metadata"]["name"]
    serving = found.get("status", {}).get("availableReplicas", 0)
    after = f"{good or 'the old archive'} serves" if serving else "nothing serves"
    text = _with_reason(f"{rejected} did not become ready, {after}", why)
    cluster.record(found, "Rejected", text, warning=True)
    return (RejectedArchiveError if serving else NothingServesError)(
        f"{text}; to try it again: kubectl annotate deployment {name} {REJECTED_ANNOTATION}-"
    )


def _nothing_new(cluster: Cluster, found: Body, wanted: str, why: str) -> RejectedArchiveError:
    """The error for pods that do not become ready with the archive that is published, or that was rejected before."""
    serving, of = found.get("status", {}).get("availableReplicas", 0), found["spec"].get("replicas", 1)
    if serving:
        return RejectedArchiveError(_with_reason(f"{serving} of {of} pods serve, the others do not become ready", why))
    text = _with_reason(f"nothing serves: pods with {wanted} do not become ready, publish another archive", why)
    cluster.record(found, "NothingServes", text, warning=True)
    return NothingServesError(text)


def _with_reason(text: str, why: str) -> str:
    return f"{text}: {why}" if why else text


def _why_not_ready(cluster: Cluster, found: Body, pods: list[Body]) -> str:
    """Why a pod of this template is not ready, in the words of its container or of the pod's events, or why there is no
    such pod; empty where nothing says."""
    here = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    mine = [pod for pod in here if _archive(pod) == _archive(found["spec"]["template"])]
    for phase in ("failed", "pending", "running"):
        of_phase = [pod for pod in mine if pod_state(pod).phase == phase]
        for pod in of_phase:
            if why := why_not_ready(pod):
                return why
        # A volume that cannot be mounted, for a Secret that is not there, is told by events alone.
        for pod in of_phase if phase == "pending" else []:
            if why := cluster.warning("Pod", pod["metadata"]["name"]):
                return why
    refused = true_condition(found.get("status", {}), "ReplicaFailure")
    return f"the cluster refuses to create a pod: {refused.get('message', '')}" if refused else ""


def _fetched_archive(pods: list[Body]) -> str | None:
    """The archive that all pods serve whose template names none: their `fetch` container says which one it was. None
    where they do not say, or not the same."""
    said = {
        status.get("state", {}).get("terminated", {}).get("message", "").strip()
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"]
        for status in pod.get("status", {}).get("initContainerStatuses", [])
        if status["name"] == "fetch"
    }
    found = said.pop() if len(said) == 1 else ""
    return found if DIGEST.fullmatch(found) else None


def _selector(deployment: Body) -> str:
    return ",".join(f"{name}={value}" for name, value in deployment["spec"]["selector"]["matchLabels"].items())


def roll_out_state(deployment: Body) -> str:
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
    try:
        digest = digest_in(digest_file)
    except ValueError:
        raise StoreError(f"{store.url}/{model}.mar.sha256 is damaged: publish both files again") from None
    name = digest[:12]
    if not _is_kept(model, name, versions):
        data = store.read(f"{model}.mar") or b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{store.url}/{model}.mar does not match its .sha256 file (is it still being copied?)")
        versions.write(f"{name}/{model}.mar", data)
        versions.write(f"{name}/{model}.mar.sha256", digest_file)
    return name


def _is_kept(model: str, archive: str, versions: Store) -> bool:
    """Whether this archive can be fetched by its name, and so be gone back to. A copy that was interrupted may have
    left its digest alone."""
    files = {f"{archive}/{model}.mar", f"{archive}/{model}.mar.sha256"}
    return files <= set(versions.names(f"{archive}/"))


def _archive(template: Body) -> str | None:
    """The archive that a pod template, or a pod, names."""
    result: str | None = template["metadata"].get("annotations", {}).get(ARCHIVE_ANNOTATION)
    return result


def _change(cluster: Cluster, found: Body, archive: str | None, annotations: dict[str, str | None]) -> None:
    """Name another archive in the pod template, which replaces the pods."""
    template = {"metadata": {"annotations": {ARCHIVE_ANNOTATION: archive}}}
    changed = {"metadata": {"annotations": annotations}, "spec": {"template": template}}
    cluster.patch("Deployment", found["metadata"]["name"], changed)
