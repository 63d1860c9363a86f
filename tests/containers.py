"""The three images as a cluster runs them: `python -m tests.containers --data genimage-mini --photos FOLDER`.

Podman runs what the manifests say (arguments, user, read-only root, no capabilities) on this machine; the API server is
`tests/kube_api.py`, whose Jobs are worked by containers. In this order:

1. overlay train-cpu's Job, interrupted once (SIGTERM, exit code 75), then to the end: a published, calibrated archive;
2. the serving pod of k8s/base: fetch, verify, serve that archive;
3. the nightly scan's Job: the coordinator and three workers at once, one of them killed; one row for every object.

Needs `make images ENGINE=podman`, podman and kubectl. `--data` is in GenImage's layout, with the generators that --seen
and --unseen name. Prints a line for each step and ends with 1 where a promise is broken.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import httpx
import yaml

from patchscan.scanning.history import last_complete
from patchscan.storage import open_store
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.kube_api import KubeApi
from tests.kube_objects import Body
from tests.scan_kit import table_of

K8S = Path(__file__).parents[1] / "k8s"
MODELS, DATA, PHOTOS, RESULTS = "patchscan-models", "patchscan-data", "patchscan-photos", "patchscan-results"
INTERRUPTED = 75
KILLED_AFTER_S = 8  # a shard of 100 images is under way then, on two cores
METRICS_PORT = "9100"  # of a scan's pods, in k8s/base
# What the manifests ask of every container.
RESTRICTED = "--user=10001:10001 --read-only --read-only-tmpfs=false --cap-drop=all --security-opt=no-new-privileges"
TOKEN = "a-token-of-this-run"


def main() -> None:
    """Run the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seen", default="sd_v1,ldm")
    parser.add_argument("--unseen", default="stylegan2_ada")
    parser.add_argument("--images", type=int, default=32, help="images of each class and split")
    parser.add_argument("--objects", type=int, default=2000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="patchscan-containers-") as name, EmbeddedS3() as s3:
        engine = Engine(Path(name), s3)
        with engine.ended_at_last():
            os.environ.update(engine.environment)
            fill(s3, asked)
            train(engine, asked.seen, asked.unseen)
            with serving(engine):
                scan(engine, s3, asked.objects)


def fill(s3: EmbeddedS3, asked: argparse.Namespace) -> None:
    """Put the data set's first images and the photographs, repeated under new keys, into buckets."""
    store = s3.client()
    for bucket in (MODELS, DATA, PHOTOS, RESULTS):
        store.create_bucket(Bucket=bucket)
    for generator in (*asked.seen.split(","), *asked.unseen.split(",")):
        for folder in sorted(asked.data.glob(f"{generator}/*/*")):
            for file in sorted(folder.iterdir())[: asked.images]:
                store.put_object(Bucket=DATA, Key=f"set/{file.relative_to(asked.data)}", Body=file.read_bytes())
    photos = [file.read_bytes() for file in sorted(asked.photos.rglob("*.jpg"))]
    for number in range(asked.objects):
        store.put_object(Bucket=PHOTOS, Key=f"{number % 10}/{number:05}.jpg", Body=photos[number % len(photos)])
    print(f"buckets: {asked.objects} photographs of {len(photos)}", flush=True)


class Engine:
    """Podman, and what all containers of a run share: S3, settings, a folder for each volume."""

    def __init__(self, folder: Path, s3: EmbeddedS3):
        self.folder, self.s3 = folder, s3
        self.prefix = folder.name
        self.environment = s3.environment | {"AWS_ENDPOINT_URL": s3.endpoint_url}

    def volume(self, name: str) -> Path:
        """A folder that every user may write."""
        made = self.folder / name
        made.mkdir(exist_ok=True)
        made.chmod(0o777)
        return made

    def start(
        self, name: str, container: Body, settings: dict[str, str], volumes: dict[str, Path], log: IO[str]
    ) -> subprocess.Popen[str]:
        """Start a container of a pod template as the kubelet would. Volumes that are not given are empty, in memory."""
        environment = {one["name"]: one.get("value", "") for one in container.get("env", [])}
        environment |= self.environment | settings
        command = f"podman run --rm --network=host --add-host=patchscan-serve:127.0.0.1 {RESTRICTED}".split()
        command += [f"--name={self.prefix}-{name}", *(f"--env={key}={value}" for key, value in environment.items())]
        for mount in container.get("volumeMounts", []):
            folder, path = volumes.get(mount["name"]), mount["mountPath"]
            command.append(f"--volume={folder}:{path}" if folder else f"--tmpfs={path}")
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], one) for one in container["args"]]
        return subprocess.Popen([*command, container["image"], *arguments], stdout=log, stderr=log, text=True)

    def run(self, name: str, container: Body, settings: dict[str, str], volumes: dict[str, Path]) -> tuple[int, str]:
        """Run a container to its end. Returns its exit code and what it wrote."""
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            code = self.start(name, container, settings, volumes, log).wait()
        return code, path.read_text()

    def kill(self, name: str, how: str) -> None:
        """Send a container a signal, if it still runs."""
        command = ["podman", "kill", f"--signal={how}", f"{self.prefix}-{name}"]
        subprocess.run(command, check=False, capture_output=True)

    @contextlib.contextmanager
    def ended_at_last(self) -> Iterator[None]:
        """End all containers of this run, whatever happened."""
        try:
            yield
        finally:
            command = ["podman", "rm", "--force", "--time=5", f"--filter=name={self.prefix}"]
            subprocess.run(command, check=False, capture_output=True)


def rendered(folder: Path, kind: str, name: str) -> Body:
    """An object of the manifests, as kubectl renders them."""
    text = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    return next(one for one in yaml.safe_load_all(text) if (one["kind"], one["metadata"]["name"]) == (kind, name))


def train(engine: Engine, seen: str, unseen: str) -> None:
    """Run the training Job, interrupted once: a calibrated archive is published."""
    (container,) = rendered(K8S / "overlays/train-cpu", "Job", "train-ssp")["spec"]["template"]["spec"]["containers"]
    settings = {"DATA": f"s3://{DATA}/set", "SEEN": seen, "UNSEEN": unseen}
    volumes = {"data": engine.volume("data"), "scratch": engine.volume("scratch")}
    began, path = time.monotonic(), engine.folder / "train-1.log"
    with path.open("w") as log:
        first = engine.start("train-1", container, settings, volumes, log)
        wait(lambda: "loss" in path.read_text() or first.poll() is not None, 600)
        engine.kill("train-1", "TERM")
        code = first.wait()
    print(f"training interrupted after {time.monotonic() - began:.0f} s: exit code {code}", flush=True)
    check(code == INTERRUPTED, path.read_text())
    code, text = engine.run("train-2", container, settings, {name: engine.volume(f"{name}-2") for name in volumes})
    print(f"training again: exit code {code}: {text.splitlines()[-1]}", flush=True)
    check(code == 0 and "published to" in text.splitlines()[-1], text)
    run = json.loads(open_store(f"s3://{MODELS}/runs/ssp").read("card.json") or b"{}")
    check(run.get("decision") is not None, "the run in the bucket is not calibrated")


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[None]:
    """The serving pod: its init containers, then the server, ready."""
    pod = rendered(K8S / "base", "Deployment", "patchscan-serve")["spec"]["template"]["spec"]
    settings = settings_of_base() | {"ARCHIVE": ""}
    volumes = {"models": engine.volume("models"), "token": token_volume(engine)}
    for container in pod["initContainers"]:
        code, text = engine.run(container["name"], container, settings, volumes)
        check(code == 0, text)
    with (engine.folder / "serve.log").open("w") as log:
        server = engine.start("serve", pod["containers"][0], settings, volumes, log)
        try:
            wait(ready, 300)
            print("serving: ready", flush=True)
            yield
        finally:
            engine.kill("serve", "TERM")
            print(f"serving: exit code {server.wait()} on SIGTERM", flush=True)


def ready() -> bool:
    """Whether the serving pod's readiness probe would pass."""
    try:
        return httpx.get("http://127.0.0.1:8080/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def scan(engine: Engine, s3: EmbeddedS3, objects: int) -> None:
    """The nightly scan with three workers at once, one of them killed: one row for every object."""
    pods = Pods(engine)
    with pods as api:
        api.put("cronjobs", rendered(K8S / "base", "CronJob", "patchscan-scan"))
        template = rendered(K8S / "base", "CronJob", "patchscan-scan")["spec"]["jobTemplate"]["spec"]["template"]
        api.put("jobs", {"kind": "Job", "metadata": {"name": "night"}, "spec": {"template": template}})
        access = engine.volume("access")
        shutil.copy(api.kubeconfig(engine.folder), access / "config")
        (access / "config").chmod(0o644)
        (container,) = template["spec"]["containers"]
        container["volumeMounts"].append({"name": "access", "mountPath": "/access"})
        settings = settings_of_base() | {"JOB_NAME": "night", "KUBECONFIG": "/access/config"}
        began = time.monotonic()
        code, text = engine.run("night", container, settings, {"token": token_volume(engine), "access": access})
    print(f"scan: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
    check(code == 0, text)
    check(pods.killed, "no worker was killed")
    results = open_store(f"s3://{RESULTS}/photos")
    done = last_complete(results)
    assert done
    rows = table_of(results, done.scan)
    listed = s3.client().get_paginator("list_objects_v2").paginate(Bucket=PHOTOS)
    keys = sorted(one["Key"] for page in listed for one in page["Contents"])
    check(sorted(rows) == keys, "not one row for every object")
    check(all(row["status"] == "scored" for row in rows.values()), "objects without a score")
    print(f"{len(rows)} rows for {objects} objects, {pods.most} workers at once, one killed", flush=True)


class Pods(KubeApi):
    """An API server whose Jobs run as containers, `parallelism` at once; the first try of index 2 is killed."""

    def __init__(self, engine: Engine):
        super().__init__(self.container)
        self.engine = engine
        self.killed, self.most, self._running = False, 0, 0
        self._counts = threading.Lock()

    def run_job(self, job: Body) -> None:
        """Run the pods of an Indexed Job at once, as many as its parallelism says; a shard is tried three times."""
        name, done = job["metadata"]["name"], list[int]()

        def run_index(index: int) -> None:
            for attempt in range(3):
                if self._run_pod(job, index, attempt) == 0:
                    with self._counts:
                        done.append(index)
                        self._set_status(name, {"active": 1, "succeeded": len(done), "failed": 0})
                    return

        with ThreadPoolExecutor(job["spec"]["parallelism"]) as pool:
            list(pool.map(run_index, range(job["spec"]["completions"])))
        ended = "Complete" if len(done) == job["spec"]["completions"] else "Failed"
        conditions = [{"type": ended, "status": "True", "reason": ended, "message": ended}]
        self._set_status(name, {"active": 0, "succeeded": len(done), "failed": 0, "conditions": conditions})

    def container(self, job: Body, index: int, attempt: int) -> tuple[int, str]:
        """A worker pod."""
        container = copy.deepcopy(job["spec"]["template"]["spec"]["containers"][0])
        # A pod has an address of its own; these containers share this machine's.
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = str(free.getsockname()[1])
        container["args"] = [own if one == METRICS_PORT else one for one in container["args"]]
        name = f"worker-{index}-{attempt}"
        settings = settings_of_base() | {"JOB_COMPLETION_INDEX": str(index)}
        path = self.engine.folder / f"{name}.log"
        with self._counts:
            self._running += 1
            self.most = max(self.most, self._running)
        with path.open("w") as log:
            process = self.engine.start(name, container, settings, {"token": token_volume(self.engine)}, log)
            if (index, attempt) == (2, 0):
                time.sleep(KILLED_AFTER_S)
                self.engine.kill(name, "KILL")
                self.killed = process.wait() == 128 + signal.SIGKILL
            code = process.wait()
        with self._counts:
            self._running -= 1
        return code, path.read_text()[-2000:]


def token_volume(engine: Engine) -> Path:
    """The Secret with the token of the serving pod."""
    folder = engine.volume("token")
    if not (folder / "token").exists():  # a worker may read it just then
        (folder / "token").write_text(TOKEN)
        (folder / "token").chmod(0o644)
    return folder


def settings_of_base() -> dict[str, str]:
    """The settings of k8s/base, with small shards, and results in this run's bucket."""
    text = subprocess.run(["kubectl", "kustomize", K8S / "base"], check=True, capture_output=True, text=True).stdout
    found = next(one for one in yaml.safe_load_all(text) if one["kind"] == "ConfigMap")
    return dict(found["data"]) | {"SHARD_OBJECTS": "100", "PARALLELISM": "3", "RESULTS": f"s3://{RESULTS}/photos"}


def wait(condition: Callable[[], bool], limit_s: float) -> None:
    """Wait until something holds. Raises TimeoutError."""
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {limit_s:.0f} s")
        time.sleep(0.5)


def check(holds: bool, text: str) -> None:
    """End with what a container wrote last, where a promise is broken."""
    if not holds:
        sys.exit(f"broken: {text[-3000:]}")


if __name__ == "__main__":
    main()
