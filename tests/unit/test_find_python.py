"""`make` takes the first Python that will do, and says in one line what to install where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "requirements/venv.sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder that is the whole PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def put_python(machine: Path, name: str, found: str) -> None:
    """A program that answers the probe with `found`, and says who it is when it is to make an environment."""
    (machine / name).write_text(f'#!/bin/sh\ncase $1 in -c) echo "{found}" ;; *) echo "{name} $*" ;; esac\n')
    (machine / name).chmod(0o755)


def make_environment(machine: Path, python: str = "") -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", str(SCRIPT), "new venv", python]
    return subprocess.run(command, env={"PATH": str(machine)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        ({"python3": "3.13 venv"}, "python3"),
        ({"python3": "3.13 venv", "python3.11": "3.11 venv"}, "python3.11"),
        ({"python3": "3.13 venv", "python3.11": "3.11"}, "python3"),
        ({"python3": "3.14 venv", "python3.12": "3.12 venv"}, "python3.12"),
    ],
)
def test_the_first_that_will_do_is_taken(machine: Path, installed: dict[str, str], taken: str) -> None:
    for name, found in installed.items():
        put_python(machine, name, found)
    done = make_environment(machine)
    assert (done.returncode, done.stdout) == (0, f"{taken} -m venv --clear new venv\n"), done.stderr


@pytest.mark.parametrize(
    ("installed", "named", "said"),
    [
        ({}, "", "there is no Python 3.11, 3.12 or 3.13: install one (Debian 12 and 13, Ubuntu 24.04: apt-get install"),
        (
            {"python3": "3.12"},
            "",
            "python3 is Python 3.12 without its venv module: install that (Debian, Ubuntu: apt-get",
        ),
        ({"python3": "3.10 venv"}, "", "python3 is Python 3.10, and 3.11, 3.12 or 3.13 is needed"),
        ({"python3": "3.13 venv", "mine": "3.9 venv"}, "mine", "mine is Python 3.9, and 3.11, 3.12 or 3.13 is needed"),
        (
            {"python3": "3.13 venv"},
            "python3.9",
            "python3.9 does not run: name a Python 3.11, 3.12 or 3.13 with PYTHON=",
        ),
    ],
)
def test_none_that_will_do_is_one_line(machine: Path, installed: dict[str, str], named: str, said: str) -> None:
    for name, found in installed.items():
        put_python(machine, name, found)
    done = make_environment(machine, named)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"make: {said}")


def test_a_user_whose_pip_installs_for_the_user_gets_the_environment() -> None:
    install = "--eval=try: ; $(PIP_INSTALL) --dry-run --no-index pip"
    command = ["make", f"BIN={os.path.relpath(Path(sys.executable).parent, ROOT)}", install, "try"]
    environment = os.environ | {"PIP_USER": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
