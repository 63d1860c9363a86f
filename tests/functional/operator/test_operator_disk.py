"""A disk that is full."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command import Done, patchscan
from tests.operator_kit import clean, files, scorer
from tests.serving_kit import Served, can_unshare


def on_a_full_disk(folder: Path, kilobytes: int, *arguments: object) -> tuple[Done, set[str], int]:
    """Run a command whose output folder is a disk of this size, and again on a larger one: the first run, the files it
    left, and the second's exit code."""
    if not can_unshare():
        pytest.skip("this user may not mount a small disk")
    folder.mkdir()
    # The disk is there for this process and who shares its mounts, and gone with it.
    mount = f'mount -t tmpfs -o size={kilobytes}k small "$0"; echo mounted; read _; mount -o remount,size=256m "$0"; '
    command = ["unshare", "-m", "sh", "-ec", mount + "echo larger; read _", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as disk:
        assert disk.stdin
        assert disk.stdout
        assert disk.stdout.readline() == "mounted\n"
        done = patchscan(*arguments, env=clean(), mounts_of=disk.pid)
        left = files(Path(f"/proc/{disk.pid}/root{folder}"))
        disk.stdin.write("\n")
        disk.stdin.flush()
        assert disk.stdout.readline() == "larger\n"
        again = patchscan(*arguments, env=clean(), mounts_of=disk.pid)
        disk.stdin.close()
    return done, left, again.returncode


@pytest.mark.parametrize("kilobytes", [4, 40, 70])
def test_the_results_do_not_fit(kilobytes: int, photos: Path, served: Served, tmp_path: Path) -> None:
    """The disk is full at the plan, at the rows, and at the report."""
    out = tmp_path / "out"
    done, left, again = on_a_full_disk(out, kilobytes, "scan", photos, "--out", out, *scorer(served))
    assert done.returncode == 75, done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.match(rf"patchscan: {out}/\S+ cannot be written: No space left on device; fix that", line)
    assert "Traceback" not in done.stderr
    assert not [name for name in left if "partial" in name or name.endswith("_SUCCESS")]
    assert "report.html" not in left
    assert again == 0


def test_the_archive_does_not_fit(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done, left, again = on_a_full_disk(store, 100, "archive", run, "--model-store", store)
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("patchscan: no space left on the disk, where it writes to or in /")
    assert (left, again) == (set(), 0)


def test_the_run_does_not_fit(data: Path, tmp_path: Path) -> None:
    """The disk has room for the weights, and none for the checkpoint."""
    run = tmp_path / "run"
    train = ["train", data / "tiny.yaml", "--data", data, "--run", run, "--device", "cpu", "--epochs", "1"]
    done, left, again = on_a_full_disk(run, 1000, *train, "--workers", "1")
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("patchscan: no space left on the disk")
    assert not left & {"card.json", "checkpoint.pt"}
    assert not [name for name in left if "partial" in name]
    assert again == 0


def test_the_evaluation_does_not_fit(run: Path, data: Path, tmp_path: Path) -> None:
    own, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, own)
    done, left, again = on_a_full_disk(out, 24, "evaluate", "--run", own, "--data", data, "--out", out)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("patchscan: no space left on the disk")
    assert not [name for name in left if "partial" in name or "report" in name]
    assert again == 0
