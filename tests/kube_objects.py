"""What a Kubernetes API server does to objects: fill in defaults, refuse what is invalid, and merge patches.

Only what patchscan's manifests and client meet. The rules were compared with a real 1.36 API server.
"""

import copy
import re
from typing import Any

Body = dict[str, Any]

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
# Lists that a strategic merge patch merges by this field of their items. All other lists are replaced as a whole.
# Beware: topologySpreadConstraints, where two items may have the same key, and a patch then changes both or neither.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
    "ownerReferences": "uid",
    "conditions": "type",
}
# `ports` are merged by another field in a container than in a Service; those of a NetworkPolicy are replaced.
PORT_KEYS = ("containerPort", "port")


def with_defaults(kind: str, body: Body) -> Body:
    """The object as the API server stores it. `kind` is the plural, such as "jobs"."""
    body = copy.deepcopy(body)
    spec = body.get("spec", {})
    if kind == "deployments":
        spec.setdefault("replicas", 1)
        spec.setdefault("strategy", {}).setdefault("type", "RollingUpdate")
    if kind == "jobs":
        spec.setdefault("parallelism", 1)
        spec.setdefault("completions", 1)
        spec.setdefault("suspend", False)
        labels = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
        labels |= {"batch.kubernetes.io/job-name": body["metadata"]["name"], "job-name": body["metadata"]["name"]}
        labels |= {"batch.kubernetes.io/controller-uid": body["metadata"]["uid"]}
    return body


def invalid(body: Body) -> str | None:
    """Why the API server refuses this object (422), or None."""
    metadata = body["metadata"]
    if not NAME.fullmatch(metadata["name"]) or len(metadata["name"]) > 253:
        return f'metadata.name: Invalid value: "{metadata["name"]}"'
    owners = metadata.get("ownerReferences", [])
    for owner in owners:
        if not all(owner.get(field) for field in ("apiVersion", "kind", "name", "uid")):
            return "metadata.ownerReferences: Invalid value: apiVersion, kind, name and uid must not be empty"
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        return "metadata.ownerReferences: Only one reference can have Controller set to true"
    return None


def merge(body: Any, patch: Any) -> Any:
    """https://www.rfc-editor.org/rfc/rfc7386"""
    if not isinstance(patch, dict):
        return patch
    merged = dict(body) if isinstance(body, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged.get(name), value)
    return merged


def strategic_merge(body: Any, patch: Any) -> Any:
    """Merge as the API server does for its own kinds, with `$patch`, `$retainKeys` and `$setElementOrder`."""
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {name: value for name, value in patch.items() if name != "$patch"}
    merged = dict(body) if isinstance(body, dict) else {}
    if "$retainKeys" in patch:
        merged = {name: value for name, value in merged.items() if name in patch["$retainKeys"]}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        key = _merge_key(name, value)
        if value is None:
            merged.pop(name, None)
        elif key:
            merged[name] = _merge_list(merged.get(name, []), value, key)
        else:
            merged[name] = strategic_merge(merged.get(name), value)
        if name in merged and (order := patch.get(f"$setElementOrder/{name}")) and key:
            places = {item[key]: place for place, item in enumerate(order)}
            merged[name].sort(key=lambda item: places.get(item[key], len(places)))
    return merged


def _merge_key(name: str, value: Any) -> str | None:
    """The field that this list is merged by; None for what is no list, or is replaced."""
    if not isinstance(value, list):
        return None
    if name == "ports":
        return next((key for key in PORT_KEYS if any(key in item for item in value)), None)
    return MERGE_KEYS.get(name)


def _merge_list(items: list[Body], patch: list[Body], key: str) -> list[Body]:
    """Merge a list by the key of its items; of several items with one key, the first is changed, and all are
    deleted."""
    merged = [dict(item) for item in items]
    for change in patch:
        found = next((place for place, item in enumerate(merged) if item.get(key) == change[key]), None)
        if change.get("$patch") == "delete":
            merged = [item for item in merged if item.get(key) != change[key]]
        elif found is None:
            merged.append(strategic_merge({}, change))
        else:
            merged[found] = strategic_merge(merged[found], change)
    return merged
