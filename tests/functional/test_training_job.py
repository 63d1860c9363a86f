"""The script of every training Job, on a bucket: what it publishes, and how it ends where it cannot go on."""

import json
import os
import shutil
import signal
import subprocess
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
    fixed = {"DATA": "s3://data/set", "SEEN": "gan", "UNSEEN": "none", "EPOCHS": "2", "DEVICE": "cpu", "LOADERS": "0"}
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
    assert [
        step for step in ("check", "copy", "train", "evaluate", "archive", "publish") if f"{step} " not in last
    ] == []
    for name in ("RUN", "MODEL_STORE", "REPORT", "VERSIONS"):
        copy_tree(settings[name], str(tmp_path / "published" / name))
    assert NOT_CALIBRATED not in Card.read(tmp_path / "published/RUN").all_warnings
    assert (tmp_path / "published/MODEL_STORE/tiny.mar").exists()
    assert json.loads((tmp_path / "published/REPORT/report.json").read_text())["models"][0]["name"] == "tiny"
    assert len(list((tmp_path / "published/VERSIONS").glob("*/tiny.mar"))) == 1


def test_a_device_that_cannot_be_used_is_one_line_before_anything_is_copied(
    job: list[str | Path], tmp_path: Path
) -> None:
    settings = environment(tmp_path, DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(job, env=settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("patchscan: device cuda cannot be used: ")
    assert not (tmp_path / "set").exists()


STUB = """\
#!/bin/sh
echo "$*" >> "$WORK/calls"
case $1 in
  copy) mkdir -p "$3" ;;
  evaluate) mkdir -p "$WORK/report" ;;
  archive) mkdir -p "$WORK/store" && echo archive > "$WORK/store/tiny.mar" ;;
esac
"""


@pytest.mark.parametrize(
    ("bound", "code", "words"),
    [
        ("auc:seen:0.5", 0, ""),
        ("auc:seen:1", 3, "patchscan: not published: auc of seen is 0.9"),
        ("auc:seen:80", 2, "patchscan: MIN_METRIC auc:seen:80: write"),
        ("auc:sean:0.8", 2, "patchscan: MIN_METRIC: there will be no group sean; there are seen, unseen, overall, "),
    ],
)
def test_a_model_that_is_not_good_enough_is_not_published(bound: str, code: int, words: str, tmp_path: Path) -> None:
    """The steps are stand-ins that note their calls; the run's card is that of the starter detector."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/patchscan").write_text(STUB)
    (tmp_path / "bin/patchscan").chmod(0o755)
    (tmp_path / "RUN").mkdir()
    shutil.copy(ROOT / "model_store/ssp-lite/card.json", tmp_path / "RUN")
    where = {name: str(tmp_path / name) for name in ("RUN", "MODEL_STORE", "VERSIONS", "REPORT")}
    settings = environment(tmp_path, MIN_METRIC=bound, DATA=str(tmp_path), **where)
    settings["PATH"] = f"{tmp_path / 'bin'}:{settings['PATH']}"
    done = subprocess.run(
        ["sh", ROOT / "training/job.sh", "tiny"], env=settings, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert (f"copy {tmp_path}/report {where['REPORT']}" in calls) == (code != 2), "the report is there to look at"
    assert bool(calls) == (code != 2), "a wrong setting ends the Job before it trains"
    assert any(call.endswith(where["MODEL_STORE"]) for call in calls) == (code == 0)
