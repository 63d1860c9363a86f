"""The wheel: one import name, everything that a command reads, and commands that run from it anywhere."""

import json
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from patchscan.common.extras import LIBRARIES
from patchscan.serving.archive import archive
from tests.command import environment
from tests.serving_kit import png

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "model_store" / "starter"
SOURCE = ("patchscan", "handlers", "model_store", "training", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: a build leaves files behind, which the next one would pack."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", source / "wheels", source)
    (built,) = (source / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel and every library, and without the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", wheel)
    (site,) = folder.glob("lib/python3*/site-packages")
    # A path in a .pth file is not searched for .pth files itself, so the editable install stays behind.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two images."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    return tmp_path / "photos"


def pip(*arguments: str | Path) -> None:
    command: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, check=True, env=environment() | {"PIP_NO_INDEX": "1"}, timeout=300)


def patchscan(programs: Path, folder: Path, *arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """One command in `folder`; modules in the folder `first` stand before those installed."""
    command = [str(programs / "patchscan"), *arguments]
    variables = environment() | {"PYTHONPATH": first}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=300)


def hide_extras(folder: Path) -> Path:
    """A folder of modules that hide every library of an extra, as where the wheel was installed without extras."""
    without = folder / "without"
    without.mkdir()
    for library in (library for libraries in LIBRARIES.values() for library in libraries):
        (without / f"{library}.py").write_text(f"raise ModuleNotFoundError('no {library}', name='{library}')\n")
    return without


def test_its_one_import_name_is_patchscan(wheel: Path) -> None:
    name, version, *_ = wheel.name.split("-")
    top = {path.partition("/")[0] for path in zipfile.ZipFile(wheel).namelist()}
    assert top == {name, f"{name}-{version}.dist-info"}


@pytest.mark.parametrize("folder", ["handlers", "training", "model_store/starter", "model_store/ssp-lite"])
def test_it_holds_what_comes_beside_the_code(wheel: Path, folder: str) -> None:
    packed = {path for path in zipfile.ZipFile(wheel).namelist() if path.startswith(f"patchscan/shipped/{folder}/")}
    ours = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
    assert packed == {f"patchscan/shipped/{folder}/{name}" for name in ours}
    assert len(ours) >= 2


def test_a_scan_with_the_starter_runs_anywhere(installed: Path, photos: Path) -> None:
    done = patchscan(installed, photos.parent, "scan", "./photos")
    assert done.returncode == 0, done.stderr
    assert "2 objects listed = 2 scored" in done.stdout


def test_a_scan_with_the_starter_needs_no_extra(installed: Path, photos: Path) -> None:
    done = patchscan(installed, photos.parent, "scan", "./photos", first=str(hide_extras(photos.parent)))
    assert done.returncode == 0, done.stderr
    assert "2 objects listed = 2 scored" in done.stdout
    report = json.loads((photos.parent / "scan-results" / "report.json").read_text())
    assert report["model"]["engines"] == [{"engine": "onnx", "scored": 2}]


def test_its_archives_are_those_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    done = patchscan(installed, tmp_path, "archive", str(STARTER))
    assert done.returncode == 0, done.stderr
    ours = archive(STARTER, tmp_path / "ours")
    assert (tmp_path / "model_store/starter.mar").read_bytes() == ours.read_bytes()


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("scan ./photos --engine torch", "train"),
        ("index data", "train"),
        ("train ssp --data photos --run run", "train"),
        (f"archive {shlex.quote(str(STARTER))}", "train"),
        ("serve", "serve"),
        ("jobs status", "cluster"),
    ],
)
def test_what_is_not_installed_is_one_line(installed: Path, photos: Path, command: str, extra: str) -> None:
    shutil.copytree(photos, photos.parent / "data" / "made" / "train" / "ai")
    done = patchscan(installed, photos.parent, *shlex.split(command), first=str(hide_extras(photos.parent)))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("patchscan: this needs ")
    assert line.endswith(f"which is not installed: pip install 'patchscan[{extra}]'")


def test_help_needs_no_extra(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    done = patchscan(installed, tmp_path, "--help", first=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "scan-video" in done.stdout
