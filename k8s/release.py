"""Write the manifests of a release: one file for each thing that is run, with the images by digest.

    make push IMAGES=registry.example.com/forensics && make release-manifests
    kubectl apply -f build/release/serve.yaml        # a file, or the address where you publish it

Reads `build/digests`, which `make push` writes: a line NAME@sha256:... for each image.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

Body = dict[str, Any]

K8S = Path(__file__).parent
COMPONENT = "app.kubernetes.io/component"
# The components in each file. Objects without one, the settings and network policies, are in serve.yaml alone: a scan
# needs serving, and what is set in one file would else be set back by the other.
FILES = {"serve": ("serve", "roll-out", None), "scan": ("scan", "scan-worker")}
HEADERS = {
    "serve": "# Serving and roll-outs, and the settings of scans too: set all in the ConfigMap. Needs the Secrets of\n"
    "# docs/cluster.md. After a change of settings also: kubectl rollout restart deployment/patchscan-serve\n",
    "scan": "# The nightly scan. Needs serving and the settings: serve.yaml, applied before.\n",
}
# What a training's file says of its image, which may then be one of this machine's store.
LOCAL_IMAGE = re.compile(r"^# - the image localhost/.*$", re.MULTILINE)


def read_digests(path: Path) -> dict[str, str]:
    """The images of `make push` by their names without registry, such as patchscan-serve."""
    images = path.read_text().split()
    return {image.partition("@")[0].rpartition("/")[2]: image for image in images}


def name_images(pod: Body, digests: dict[str, str]) -> None:
    """Name a pod's images by digest. Ends the program where one was not pushed."""
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        name = container["image"].rpartition("/")[2].partition(":")[0]
        if name not in digests:
            sys.exit(f"release: {name} is not among the images that were pushed: run make push first")
        container["image"] = digests[name]


def pods_of(body: Body) -> list[Body]:
    """The pod specs in an object: that of a Job, a CronJob or a Deployment."""
    spec = body.get("spec", {})
    template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
    return [template["spec"]] if template else []


def write(path: Path, header: str, bodies: list[Body], digests: dict[str, str]) -> None:
    """Write objects into one file, the settings first."""
    for body in bodies:
        for pod in pods_of(body):
            name_images(pod, digests)
    bodies = sorted(bodies, key=lambda body: body["kind"] != "ConfigMap")
    path.write_text(header + yaml.safe_dump_all(bodies, sort_keys=False, width=120))
    print(path)


def main(digests_file: str, folder: str) -> None:
    """Write serve.yaml, scan.yaml and the training Jobs' files into the folder."""
    digests, out = read_digests(Path(digests_file)), Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    kubectl = shutil.which("kubectl") or sys.exit("release: kubectl is missing: install it")
    rendered = subprocess.run([kubectl, "kustomize", str(K8S)], capture_output=True, text=True, check=True).stdout
    for name, components in FILES.items():
        bodies = [
            body for body in yaml.safe_load_all(rendered) if body["metadata"]["labels"].get(COMPONENT) in components
        ]
        write(out / f"{name}.yaml", HEADERS[name], bodies, digests)
    for path in sorted(K8S.glob("train-*.yaml")):
        text = path.read_text()
        header = LOCAL_IMAGE.sub("# - rights to pull the image named below", text[: text.index("apiVersion")])
        write(out / path.name, header, list(yaml.safe_load_all(text)), digests)


if __name__ == "__main__":
    main(*sys.argv[1:])
