"""kubectl with the manifests on an API server over HTTP: applied twice, in any order, and removed by their label."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from patchscan.cluster.client import Cluster
from patchscan.cluster.submitting import submit_from_cron_job
from tests.kube_api import KINDS, KubeApi
from tests.kube_objects import Body, with_defaults

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = K8S / "overlays"
# Each has objects or fields that no other has: monitoring holds all of the base, and the others other values.
SOURCES = [OVERLAYS / "demo", OVERLAYS / "monitoring", OVERLAYS / "train-pvc", K8S / "train-ssp-multinode.yaml"]
TITLES = ("2. Namespace, credentials, token", "Uninstall")
PLURALS = {kind: plural for kinds in KINDS.values() for kind, plural in kinds.items()}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


class Kubectl:
    """kubectl, on a server of its own."""

    def __init__(self, api: KubeApi, folder: Path):
        self.api = api
        config = api.kubeconfig(folder)
        self._environment = {**os.environ, "KUBECONFIG": str(config), "HOME": str(folder)}

    def __call__(self, *arguments: str, stdin: str = "") -> list[str]:
        """Run kubectl; returns the lines that it prints."""
        done = subprocess.run(
            ["kubectl", *arguments],
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def apply(self, source: Path) -> list[str]:
        return self("apply", "--validate=false", "-f" if source.is_file() else "-k", str(source))

    def objects(self) -> list[Body]:
        """Every object on the server."""
        return [body for plural in PLURALS.values() for body in self.api.all(plural)]


def comparable(body: Body) -> Body:
    """An object without what the server adds to it."""
    kept = {name: value for name, value in body.items() if name not in ("metadata", "status")}
    return kept | {"labels": body["metadata"].get("labels")}


@pytest.fixture
def kubectl(tmp_path: Path) -> Iterator[Kubectl]:
    with KubeApi() as api:
        yield Kubectl(api, tmp_path)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_applied_twice_nothing_changes(source: Path, kubectl: Kubectl) -> None:
    kubectl.apply(source)
    again = kubectl.apply(source)
    # kubectl sends a budget's selector every time, since a patch replaces it as a whole.
    budget = "poddisruptionbudget.policy/patchscan-serve configured"
    assert [line for line in again if not line.endswith("unchanged") and line != budget] == []
    if shutil.which("diff"):
        assert kubectl("diff", "-f" if source.is_file() else "-k", str(source)) == []


def test_overlays_applied_in_any_order_end_the_same(kubectl: Kubectl) -> None:
    for name in ("base", "production", "demo", "monitoring", "kueue"):
        source = K8S if name == "base" else K8S / "overlays" / name
        rendered = list(yaml.safe_load_all("\n".join(kubectl("kustomize", str(source)))))
        kubectl.apply(source)
        now = {(body["kind"], body["metadata"]["name"]): body for body in kubectl.objects()}
        for body in rendered:
            kind = body["kind"]
            expected = comparable(with_defaults(PLURALS[kind], body))
            assert comparable(now[kind, body["metadata"]["name"]]) == expected, f"{kind} after {name}"


def test_the_documented_uninstall_removes_everything(kubectl: Kubectl) -> None:
    page = (ROOT / "docs/cluster.md").read_text().replace("\\\n", " ")
    setup, uninstall = (re.findall(rf"## {title}.*?```sh\n(.*?)```", page, re.DOTALL)[0] for title in TITLES)
    secrets = [line for line in setup.splitlines() if " secret " in line]
    assert len(secrets) == 3
    for line in secrets[:2]:  # applied rather than created: kubectl creates in protobuf, which the server here lacks
        made = kubectl(*shlex.split(line, comments=True)[1:], "--dry-run=client", "-o", "yaml")
        kubectl("apply", "--validate=false", "-f", "-", stdin="\n".join(made))
    kubectl(*shlex.split(secrets[2], comments=True)[1:])
    kubectl.apply(K8S / "overlays/demo")
    # Each leaves the ConfigMap of the one before behind.
    for source in (
        OVERLAYS / "demo",
        OVERLAYS / "monitoring",
        OVERLAYS / "train-pvc",
        K8S / "train-ssp-multinode.yaml",
    ):
        kubectl.apply(source)
    cluster = Cluster(kubectl.api.client(), "default")
    submit_from_cron_job(cluster, "patchscan-scan", {})
    assert len(kubectl.objects()) > 25
    (command,) = uninstall.splitlines()
    (monitoring,) = re.findall(r"`(kubectl delete podmonitor[^`]*)`", page)
    kubectl(*shlex.split(command)[1:])
    kubectl(*shlex.split(monitoring)[1:])
    assert kubectl.objects() == []
