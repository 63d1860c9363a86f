"""The script of every training Job, on a bucket: what it publishes, and how it ends where it cannot go on."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchscan.detector.card import NOT_CALIBRATED, Card
from patchscan.storage.copying import copy_tree
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests.image_tree import picture, write

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: tiny
architecture: ssp-lite
preset: {kind: patch, size: 32, rule: random, count: 2}
seen: [gan]
epochs: 2
batch_size: 8
learning_rate: 1.0e-3
"""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, empty_s3: EmbeddedS3) -> Iterator[EmbeddedS3]:
    """A bucket with a small data set, and one for what the Job publishes."""
    data = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("val", 8)):
        for number in range(count):
            real = picture(1000 * (split == "val") + number)
            write(data / "gan" / split / "nature" / f"{number}.png", real)
            write(data / "gan" / split / "ai" / f"{number}.png", real // 16 * 16)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in empty_s3.environment.items():
            patch.setenv(name, value)
        for bucket in ("data", "models"):
            empty_s3.client().create_bucket(Bucket=bucket)
        copy_tree(str(data), "s3://data/set")
        yield empty_s3


@pytest.fixture
def job(s3: EmbeddedS3, tmp_path: Path) -> list[str | Path]:
    """The command of a training Job with a recipe of its own."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return ["sh", ROOT / "training/job.sh", tmp_path / "tiny.yaml"]


@pytest.fixture(autouse=True)
def commands(forked_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", forked_path)


def environment(work: Path, **settings: str) -> dict[str, str]:
    where = {name: f"s3://models/{work.name}/{name.lower()}" for name in ("RUN", "MODEL_STORE", "VERSIONS", "REPORT")}
    fixed = {"DATA": "s3://data/set", "SEEN": "gan", "UNSEEN": "", "EPOCHS": "2", "DEVICE": "cpu", "LOADERS": "0"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "WORK": str(work), **where, **fixed, **settings}


def test_it_publishes_a_calibrated_archive_and_puts_the_calibrated_card_back(
    job: list[str | Path], tmp_path: Path
) -> None:
    settings = environment(tmp_path)
    running = subprocess.Popen(job, env=settings, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stdout
    first = running.stdout.readline()
    assert first.startswith("train ")
    assert "publish to s3://models" in first
    deadline = time.monotonic() + 900
    while not (tmp_path / "set" / "index.parquet").exists():  # training has begun
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGTERM)  # as tini -g passes it on
    assert running.wait(600) == 75

    done = subprocess.run(job, env=settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("published to s3://models")
    again = settings | {"EPOCHS": "3"}
    other = subprocess.run(job, env=again, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert other.returncode == 2
    assert other.stderr.startswith(f"patchscan: RUN {settings['RUN']} was begun with another recipe (epochs differ): ")
    assert [
        step for step in ("check", "copy", "train", "evaluate", "archive", "publish") if f"{step} " not in last
    ] == []
    for name in ("RUN", "MODEL_STORE", "REPORT", "VERSIONS"):
        copy_tree(settings[name], str(tmp_path / "published" / name))
    assert NOT_CALIBRATED not in Card.read(tmp_path / "published/RUN").all_warnings
    assert (tmp_path / "published/MODEL_STORE/tiny.mar").exists()
    assert json.loads((tmp_path / "published/REPORT/report.json").read_text())["models"][0]["name"] == "tiny"
    assert len(list((tmp_path / "published/VERSIONS").glob("*/tiny.mar"))) == 1


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("DEVICE", "cuda", "device cuda cannot be used: "),
        ("DEVICE", "cuda:3", "device cuda:3 cannot be used: "),
        ("DEVICE", "gpu", "device gpu cannot be used: "),
        ("DEVICE", "cpu\n", "DEVICE 'cpu\\n': it begins or ends with white space"),
        ("SEEN", "gan,gam", "SEEN: s3://data/set holds no generator gam; there are gan"),
        ("UNSEEN", "adn", "UNSEEN: s3://data/set holds no generator adn; there are gan"),
        # Without generators' folders they are called as the folder that they are copied to.
        ("DATA", "s3://data/set/gan", "SEEN: s3://data/set/gan holds no generator gan; there are set"),
        ("DATA", "s3://data/sett", "s3://data/sett is in no layout that can be read"),
        ("EPOCHS", "1e3", "EPOCHS 1e3: it must be a whole number of at least 1"),
        ("EPOCHS", "", "EPOCHS is empty"),
        ("LOADERS", "-1", "LOADERS -1: it must be a whole number of at least 0"),
        ("GPUS", "3", "NODES 1 with GPUS 3: the recipe's batch of 8 cannot be divided by 3"),
        ("WEIGHTS", "imagnet", "WEIGHTS imagnet: there is no such file"),
        ("RUN", "", "RUN is empty"),
        ("ENGINE", "onx", "ENGINE onx: there are torch, onnx and openvino"),
        ("MODEL_STORE", "s3://modles/store", "s3://modles/store: there is no bucket modles"),
        ("REPORT", "s3:/models/reports", "s3:/models/reports: "),
        ("VERSIONS", "gs://models/versions", "gs://models/versions: only s3://bucket/prefix URLs and folders"),
        ("RUN", "/proc/run", "/proc/run: "),
        ("MIN_METRIC", "auc:unseen:0.8", "MIN_METRIC: s3://data/set has no val images of unseen; there are seen, unse"),
    ],
)
def test_what_would_fail_in_the_end_is_one_line_before_anything_is_copied(
    setting: str, value: str, words: str, job: list[str | Path], tmp_path: Path
) -> None:
    (tmp_path / "s3:").write_text("in place of a root file system that cannot be written to")
    settings = environment(tmp_path, CUDA_VISIBLE_DEVICES="") | {setting: value, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(job, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"patchscan: {words}")
    assert not (tmp_path / "set").exists()


CHECKED = """\
#!/bin/sh
case $2 in
  patchscan.training.settings) ;;
  patchscan.dataset.outdated) echo "outdated $3 $4" >> "$WORK/calls" ;;
  *) exec "{python}" "$@" ;;
esac
"""
STUB = """\
#!/bin/sh
echo "$*" >> "$WORK/calls"
case $1 in
  copy) [ "$2" != "${AWAY:-}" ] || exit 75; mkdir -p "$3" ;;
  evaluate) mkdir -p "$WORK/.job/report" ;;
  archive) mkdir -p "$WORK/.job/store" && echo archive > "$WORK/.job/store/tiny.mar" ;;
esac
"""


@pytest.mark.parametrize(
    ("bound", "code", "words"),
    [
        ("auc:seen:0.5", 0, ""),
        ("auc:seen:1", 3, "patchscan: not published: auc of seen is 0.9"),
    ],
)
def test_a_model_that_is_not_good_enough_is_not_published(bound: str, code: int, words: str, tmp_path: Path) -> None:
    done, calls = rehearse(tmp_path, MIN_METRIC=bound)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    assert f"copy {tmp_path}/.job/report {tmp_path}/REPORT" in calls, "the report is there to look at"
    assert any(call.endswith(f"{tmp_path}/MODEL_STORE") for call in calls) == (code == 0)


def test_a_volume_with_a_copy_of_other_data_gets_this_trainings(tmp_path: Path) -> None:
    for data, kept in (("s3://one", False), ("s3://one", True), ("s3://two", False)):
        done, _ = rehearse(tmp_path, DATA=data)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "set/kept").exists() == kept
        (tmp_path / "set/kept").touch()
    assert f"{tmp_path}/set holds a copy of s3://one: s3://two replaces it" in done.stdout


def test_a_folder_that_no_job_has_copied_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    done, calls = rehearse(tmp_path, DATA="s3://one")
    assert done.returncode == 2
    assert done.stderr == f"patchscan: {tmp_path}/set is no copy that a Job has made: move it, or set DATA to it\n"
    assert calls == []


def test_run_and_stores_may_be_folders_of_the_volume_that_the_job_works_on(tmp_path: Path) -> None:
    """RUN=/data/run is what comes to mind first: nothing that is there may be removed."""
    where = {"RUN": "run", "MODEL_STORE": "store", "VERSIONS": "versions", "REPORT": "report"}
    for folder in where.values():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kept").touch()
    shutil.copy(ROOT / "model_store/ssp-lite/card.json", tmp_path / "run")
    done, _ = rehearse(tmp_path, **{name: str(tmp_path / folder) for name, folder in where.items()})
    assert done.returncode == 0, done.stderr
    assert [folder for folder in where.values() if not (tmp_path / folder / "kept").exists()] == []
    assert (tmp_path / "run/card.json").exists()


def test_a_second_job_on_a_volume_waits_for_the_first(tmp_path: Path) -> None:
    (tmp_path / ".job").mkdir()
    with (tmp_path / ".job/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(3, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        done, calls = rehearse(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"another Job works in {tmp_path}: waiting until it has ended\n" in done.stdout
    assert calls


def test_a_volume_without_locks_is_worked_on(tmp_path: Path) -> None:
    """Lustre, for one, is often mounted so: to wait there would be to wait for ever."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/flock").write_text("#!/bin/sh\nexit 65\n")
    (tmp_path / "bin/flock").chmod(0o755)
    done, calls = rehearse(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"the volume of {tmp_path} has no locks: no other Job may work there\n" in done.stdout
    assert calls


def test_a_run_keeps_the_data_on_its_volume_and_the_next_run_takes_what_has_changed(tmp_path: Path) -> None:
    """A run refuses to go on with other data. The next one's copy is indexed, also where it was interrupted before."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/index.parquet").touch()
    (tmp_path / "set-of").write_text("s3://one\n")
    shutil.copytree(ROOT / "model_store/ssp-lite", tmp_path / "RUN2")
    steps, before = [], 0
    for run, away in (("RUN", "s3://one"), ("RUN", ""), ("RUN", ""), ("RUN2", "")):
        done, calls = rehearse(tmp_path, DATA="s3://one", RUN=str(tmp_path / run), AWAY=away)
        assert done.returncode == (75 if away else 0), done.stderr
        told = ("outdated s3://one", "copy s3://one", "index")
        steps.append([call.split()[0] for call in calls[before:] if call.startswith(told)])
        before = len(calls)
    assert steps == [["outdated", "copy"], ["outdated", "copy", "index"], [], ["outdated", "copy", "index"]]


def test_a_run_out_of_reach_is_not_taken_for_none(tmp_path: Path) -> None:
    """Another node would go on to train, and wait for the others."""
    done, calls = rehearse(tmp_path, NODES="2", RUN="s3://models/run", AWAY="s3://models/run")
    assert done.returncode == 75, done.stderr
    assert "no run in" not in done.stdout
    assert not any(call.startswith("train") for call in calls)


def test_every_node_ends_with_the_time_of_its_steps(tmp_path: Path) -> None:
    done, calls = rehearse(tmp_path, JOB_COMPLETION_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"trained: check \d+ s, copy \d+ s, train \d+ s", done.stdout.splitlines()[-1])
    assert not any(call.startswith("archive") for call in calls)


def rehearse(folder: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with stand-ins for its steps, which note their calls; returns these too. The run's card is that of
    ssp-lite."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/patchscan").write_text(STUB)
    (folder / "bin/patchscan").chmod(0o755)
    (folder / "bin/python").write_text(CHECKED.format(python=sys.executable))
    (folder / "bin/python").chmod(0o755)
    (folder / "RUN").mkdir(exist_ok=True)
    shutil.copy(ROOT / "model_store/ssp-lite/card.json", folder / "RUN")
    where = {name: str(folder / name) for name in ("RUN", "MODEL_STORE", "VERSIONS", "REPORT")}
    told = environment(folder, **{"DATA": str(folder), **where, **settings})
    told["PATH"] = f"{folder / 'bin'}:{told['PATH']}"
    done = subprocess.run(
        ["sh", ROOT / "training/job.sh", "tiny"], env=told, cwd=ROOT, capture_output=True, text=True, check=False
    )
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []
