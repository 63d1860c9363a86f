"""The engine openvino, in a process of its own: its library has once taken down one in which hundreds of other tests
had run, with their threads and libraries, and with it the tests that were to come."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs pip install 'patchscan[openvino]'")
def test_the_cases_of_openvino_pass() -> None:
    """tests/openvino_cases.py, where each case stands."""
    cases = Path(__file__).parents[1] / "openvino_cases.py"
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
