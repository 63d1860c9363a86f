"""The images' source: locks that agree with the one that tests run with, and what the manifests rely on."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def pins(lock: Path) -> dict[str, str]:
    """Package names to the versions that a lock file pins."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)", lock.read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_images_hold_what_was_tested(lock: Path) -> None:
    tested = pins(ROOT / "requirements/dev.txt")
    assert {name: version for name, version in pins(lock).items() if tested.get(name) != version} == {}


def test_each_image_has_its_extras_and_the_scan_image_no_torch() -> None:
    held = {lock.stem: pins(lock).keys() for lock in LOCKS}
    assert "kubernetes" in held["scan"]
    assert not {"torch", "torchserve"} & held["scan"]
    assert {"torch", "torchserve", "aiohttp"} <= held["serve"]
    assert {"torch", "torch-model-archiver"} <= held["train"]
    assert held["torch"] <= held["serve"] & held["train"]


def test_every_image_runs_as_the_manifests_user() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    images = {stage.split()[2]: stage for stage in stages if stage.split()[2] in ("scan", "serve", "train")}
    assert len(images) == 3
    for name, stage in images.items():
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["10001:10001"], name
        assert not re.search(r"^(RUN|COPY|ADD)", stage.partition("USER 10001:10001")[2], re.MULTILINE), name
    assert {name: "HEALTHCHECK" in stage and "/readyz" in stage for name, stage in images.items()} == {
        "scan": False,
        "serve": True,
        "train": False,
    }
    base = ROOT / "k8s/base"
    for manifest in [*(ROOT / "k8s/train").glob("train-*.yaml"), base / "serve.yaml", base / "scan.yaml"]:
        assert "runAsUser: 10001" in manifest.read_text()


def test_the_build_sees_every_file_that_it_copies() -> None:
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    for source in (one for line in lines for one in line.split()[:-1]):
        assert source in allowed or f"{Path(source).parent}/*{Path(source).suffix}" in allowed, source
        assert (ROOT / source).exists(), source


def test_the_images_know_patchscans_version(tmp_path: Path) -> None:
    (run,) = re.findall(r"^FROM base AS code.*?^RUN (.*?)\n\n", DOCKERFILE, re.MULTILINE | re.DOTALL)
    app = tmp_path / "app"
    app.mkdir()
    shutil.copy(ROOT / "pyproject.toml", app)
    script = run.replace("/app", str(app)).replace("/links", str(tmp_path / "links"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-ec", script], env=os.environ | {"PATH": path}, check=True)
    (found,) = distributions(name="patchscan", path=[str(tmp_path / "links/site-packages")])
    assert (found.version, found.metadata["Name"]) == (VERSION, "patchscan")
    assert (tmp_path / "links/site-packages/patchscan.pth").read_text() == f"{app}\n"


def test_versions_in_the_manifests_are_the_projects() -> None:
    base = yaml.safe_load((ROOT / "k8s/base/kustomization.yaml").read_text())
    assert {image["newTag"] for image in base["images"]} == {VERSION}
    for manifest in (ROOT / "k8s/train").glob("train-*.yaml"):
        assert f"localhost/patchscan-train:{VERSION}" in manifest.read_text()


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_make_push_names_what_was_pushed_in_the_production_overlay(kind: str, tmp_path: Path) -> None:
    """The engine is a script that keeps its command lines and knows a digest of every image; podman tells it in a file,
    docker when it is asked."""
    engine, pushed = tmp_path / kind, "registry.example.com:5000/team"
    script = """#!/bin/sh
echo "$*" >> calls
for last; do :; done
digest="sha256:$(printf %s "$last" | sha256sum | cut -d" " -f1)"
if [ "$1" = inspect ]; then echo "${last%:*}@$digest"; fi
if [ "$2" = --digestfile ]; then echo "$digest" > "$3"; fi
"""
    engine.write_text(script)
    engine.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s", symlinks=True)

    def make(images: str) -> int:
        command = ["make", "push", f"ENGINE={engine}", f"IMAGES={images}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert make("localhost") == 2, "nobody's registry"
    for _ in range(2):
        assert make(pushed) == 0
    found = yaml.safe_load((tmp_path / "k8s/overlays/production/kustomization.yaml").read_text())["images"]
    assert [image["newName"] for image in found] == [f"{pushed}/patchscan-serve", f"{pushed}/patchscan-scan"]
    digests = [image["digest"] for image in found]
    assert len(set(digests)) == 2
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) and one.strip("sha256:0") for one in digests)
    pushed_images = (tmp_path / "build/digests").read_text().split()
    assert [image.partition("@")[2] for image in pushed_images][:2] == [digests[1], digests[0]]
    assert len(pushed_images) == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [one.split("/")[-1].split(":")[0] for one in calls if one.startswith("push")][:3] == [
        "patchscan-scan",
        "patchscan-serve",
        "patchscan-train",
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_a_releases_files_are_the_manifests_with_images_by_digest(tmp_path: Path) -> None:
    digests = tmp_path / "digests"
    names = {
        name: f"registry.example.com:5000/team/patchscan-{name}@sha256:{name[0] * 64}"
        for name in ("serve", "scan", "train")
    }
    command: list[str | Path] = [sys.executable, ROOT / "k8s/release.py", digests, tmp_path / "release"]
    digests.write_text(names["scan"])
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, "patchscan-serve is not among" in failed.stderr) == (1, True)

    digests.write_text("\n".join(names.values()))
    subprocess.run(command, capture_output=True, check=True)
    files = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in (tmp_path / "release").iterdir()}
    assert files.keys() == {"serve", "scan", *(path.stem for path in (ROOT / "k8s").glob("train-*.yaml"))}
    done = subprocess.run(["kubectl", "kustomize", ROOT / "k8s"], capture_output=True, text=True, check=True)
    base = {(body["kind"], body["metadata"]["name"]) for body in yaml.safe_load_all(done.stdout)}
    made = [(body["kind"], body["metadata"]["name"]) for door in ("serve", "scan") for body in files[door]]
    assert base == set(made)
    assert len(made) == len(base), "what is set in one file is not set back by another"
    for name, bodies in files.items():
        text = (tmp_path / f"release/{name}.yaml").read_text()
        assert text.startswith("#")
        assert "localhost" not in text
        used = set(re.findall(r"image: (\S+)", text))
        assert used == {names["train" if name.startswith("train") else name]} | (
            {names["scan"]} if name == "serve" else set()
        )
        assert all(body["metadata"]["labels"]["app.kubernetes.io/part-of"] == "patchscan" for body in bodies)
