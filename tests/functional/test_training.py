"""Training can be stopped at any moment and ends in the same weights; it never reads an unseen generator."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from patchscan.detector.answer import Answer
from patchscan.detector.card import Card
from patchscan.detector.device import cpu_has_bf16
from patchscan.detector.engines import load_detector
from patchscan.detector.weights import read_safetensors
from patchscan.training.batches import evaluation_loader
from patchscan.training.data import TrainingData
from patchscan.training.distributed import Ranks
from patchscan.training.learner import Learner
from patchscan.training.recipe import load_recipe
from patchscan.training.train import Trainer
from patchscan.training.train import train as run_training
from tests.command import environment, patchscan, start_patchscan
from tests.image_tree import picture, write
from tests.training_steps import Steps, take_steps

pytestmark = pytest.mark.usefixtures("forked_commands")

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: tiny
architecture: ssp-lite
preset: {kind: patch, size: 32, rule: random, count: 4}
seen: [seen_one]
unseen: [unseen_one]
epochs: 3
batch_size: 8
learning_rate: 1.0e-3
flip: all
synthetic: 0.3
averaging: 0.9
cosine: true
augment: {probability: 0.5, jpeg_quality: [60, 95], blur_sigma: [0.3, 1.0], resize: [0.7, 1.3]}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seen generator whose images lack fine noise, indexed; an unseen one whose files are then taken away."""
    root = tmp_path_factory.mktemp("data")
    for generator, counts in {"seen_one": (16, 8), "unseen_one": (1, 1)}.items():
        for split, count in zip(("train", "val"), counts, strict=True):
            for number in range(count):
                real = picture(zlib.crc32(f"{generator}/{split}/{number}".encode()))
                write(root / generator / split / "nature" / f"{number}.png", real)
                write(root / generator / split / "ai" / f"{number}.png", real // 16 * 16)
    (root / "tiny.yaml").write_text(RECIPE)
    assert patchscan("index", root).returncode == 0
    shutil.rmtree(root / "unseen_one")
    return root


TWO_PROCESSES = ("--standalone", "--nproc-per-node", "2")
TRIES = ("--max-restarts", "20")  # as often as a Job's pods try


def train(data: Path, run: Path) -> list[str | Path]:
    return ["train", data / "tiny.yaml", "--data", data, "--run", run, "--device", "cpu", "--workers", "1"]


def succeed(*arguments: object) -> None:
    done = patchscan(*arguments)
    assert done.returncode == 0, done.stderr


def launch(options: Sequence[str], module: str, *arguments: object) -> list[str]:
    """A module run by several processes of this machine."""
    return ["python", "-m", "patchscan.training.launch", *options, "-m", module, *map(str, arguments)]


def log(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("finished")
    succeed(*train(data, run))
    return run


def stop_after_first_epoch(data: Path, run: Path, how: signal.Signals) -> int:
    process = start_patchscan(*train(data, run), stdout=None, stderr=None, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(entry["event"] == "validation" for entry in log(run)):
        assert process.poll() is None, "training ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.4)
    os.killpg(process.pid, how)  # as a terminal's Ctrl-C or a service manager does: loader processes included
    return process.wait(60)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_in_the_same_weights(
    data: Path, finished: Path, tmp_path: Path, how: signal.Signals
) -> None:
    assert stop_after_first_epoch(data, tmp_path, how) == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    succeed(*train(data, tmp_path))
    assert any(entry["event"] == "resume" for entry in log(tmp_path))
    expected, resumed = (read_safetensors(run / "model.safetensors") for run in (finished, tmp_path))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert Card.read(tmp_path).weights_sha256 == Card.read(finished).weights_sha256


def test_a_run_says_what_it_was_trained_on(data: Path, finished: Path) -> None:
    card = Card.read(finished)
    assert card.training["seen"] == ["seen_one"]
    assert card.training["unseen"] == ["unseen_one"]
    assert (card.training["train_images"], card.training["val_images"]) == (32, 16)
    start = log(finished)[0]
    assert start["event"] == "start"
    assert {"device", "data_digest", "parameters", "planned_minutes"} <= start.keys()
    assert sum(entry["event"] == "epoch" for entry in log(finished)) == 3
    assert list((finished / "tensorboard").iterdir())
    calibrated = replace(card, metrics={"raw": {"overall": {}}})
    calibrated.write(finished)
    again = patchscan(*train(data, finished))
    assert (again.returncode, again.stderr) == (0, f"{finished} is trained already, and stays as it is\n")
    assert Card.read(finished) == calibrated, "what an evaluation has written"


def test_the_planned_time_counts_steps_validations_and_features(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 epochs of 4 steps; 16 images validated after the second and the third, one of 4 crops of each before and after
    the training for the features."""
    monkeypatch.setattr(Learner, "measure_seconds", lambda _, images: (60.0 * images / 8, 6.0))
    monkeypatch.setattr(Trainer, "_write_features", lambda *_: sys.exit("it has been told"))
    with pytest.raises(SystemExit, match="told"):
        run_training(load_recipe(str(data / "tiny.yaml"), validate_every=2), str(data), str(tmp_path), device="cpu")
    assert log(tmp_path)[0]["planned_minutes"] == 12 + 2 * 1.6 + 2 * 0.4


def test_the_time_of_a_validation_is_reckoned_from_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many pixels as are scored: lite0 is trained on one crop of an image, and validated on four."""
    recipe = load_recipe("lite0", weights="none")
    monkeypatch.setattr(Learner, "_time_pass", lambda _, images: (1.0 * images, 3.0 * images))
    learner = Learner(recipe, Ranks(0, 1, torch.device("cpu")), 1, "fp32")
    assert learner.measure_seconds(32) == (3 * 32, 4 * 1.0)


def test_the_planned_minutes_do_not_count_what_a_first_pass_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100, the first pass over 32 images takes ten times as long as later ones."""
    seen = set[int]()

    def time_pass(_: Learner, images: int) -> tuple[float, float]:
        first = images not in seen
        seen.add(images)
        return (0.1, 0.4) if first else (0.01, 0.03)

    monkeypatch.setattr(Learner, "_time_pass", time_pass)
    learner = Learner(load_recipe("ssp-lite", weights="none"), Ranks(0, 1, torch.device("cpu")), 1, "fp32")
    assert learner.measure_seconds(32)[0] == 0.03


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU does not compute in bfloat16")
def test_a_cpu_trains_in_bfloat16_and_goes_on_in_nothing_else(data: Path, finished: Path, tmp_path: Path) -> None:
    succeed(*train(data, tmp_path), "--precision", "bf16")
    assert log(tmp_path)[0]["precision"] == Card.read(tmp_path).training["precision"] == "bf16"
    losses, whole = ([entry["loss"] for entry in log(run) if entry["event"] == "epoch"] for run in (tmp_path, finished))
    assert losses == pytest.approx(whole, abs=0.02)
    assert losses != whole
    refused = patchscan(*train(data, tmp_path))
    assert refused.returncode == 2
    assert "holds a run in bf16: continue it with --precision bf16" in refused.stderr


def test_the_run_folder_scores_as_validation_did(data: Path, finished: Path) -> None:
    detector = load_detector(finished)
    assert detector.engine == "onnx", "the training wrote no model.onnx"
    images = {kind: sorted((data / "seen_one" / "val" / kind).iterdir()) for kind in ("ai", "nature")}
    scores = {kind: detector.score([file.read_bytes() for file in images[kind]]) for kind in images}
    logits = {kind: [one.logit for one in scores[kind] if isinstance(one, Answer)] for kind in images}
    assert [len(logits[kind]) for kind in images] == [len(files) for files in images.values()]
    wins = [ai > real for ai in logits["ai"] for real in logits["nature"]]
    assert sum(wins) / len(wins) == pytest.approx(Card.read(finished).training["seen_val_mean_auc"], abs=0.02)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """And the second waits while the first validates, longer than torch waits by default (see training_steps)."""
    command = launch(TWO_PROCESSES, "tests.training_steps", tmp_path)
    subprocess.run(command, check=True, env=environment(), cwd=ROOT)
    alone = take_steps(Ranks(0, 1, torch.device("cpu")))
    first, second = (Steps(**torch.load(tmp_path / f"{rank}.pt")) for rank in range(2))
    assert len(set(alone.losses)) == len(alone.losses)
    assert first.losses == second.losses == pytest.approx(alone.losses, rel=1e-4)
    for name, weights in alone.weights.items():
        assert torch.equal(first.weights[name], second.weights[name]), name
        assert torch.allclose(first.weights[name], weights, atol=1e-4), name


def test_training_and_evaluation_take_either_protocol(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            real = picture(100 * count + number, 256, 256)
            write(data / "seen_one" / split / "nature" / f"{number}.jpg", real)
            write(data / "seen_one" / split / "ai" / f"{number}.png", real // 16 * 16)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("epochs: 3", "epochs: 1").replace("batch_size: 8", "batch_size: 4"))
    small = ["train", recipe, "--data", data, "--run", run, "--device", "cpu", "--protocol", "matched"]
    succeed(*small)
    assert Card.read(run).training["protocol"] == "matched"
    images = [f"{path.relative_to(data)},owner/set/{path.stem}" for path in data.rglob("val/*/*")]
    (data / "sources.csv").write_text("\n".join(["file,source", *images]))
    report = ["evaluate", "--run", run, "--data", data, "--protocol", "both", "--out", tmp_path / "report"]
    succeed(*report)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["protocols"] == ["raw", "matched"]
    assert content["models"][0]["calibrated_on"] == "matched"
    assert (tmp_path / "data-matched" / "seen_one" / "val" / "ai").is_dir()
    assert [one["sources_known"] for one in content["models"][0]["scoreboard"]] == [8, 8]
    (tmp_path / "sources.csv").write_text("\n".join(["file,source", *(f"data/{line}" for line in images)]))
    (data / "sources.csv").unlink()
    sets = ["--data", data, "--data", tmp_path / "data-matched"]
    succeed("evaluate", "--run", run, *sets, "--tier", "native", "--no-calibrate", "--out", tmp_path / "sets")
    of_sets = json.loads((tmp_path / "sets" / "report.json").read_text())
    assert of_sets["protocols"] == ["data", "data-matched"]
    assert (of_sets["data"]["name"], of_sets["data"]["images"]) == ("data", content["data"]["images"])
    assert [one["sources_known"] for one in of_sets["models"][0]["scoreboard"]] == [8, 8]
    assert (
        "| seen_one |" in (tmp_path / "sets" / "RESULTS_TABLE.md").read_text().partition("AUC, data-matched; 95 %")[2]
    )
    elsewhere = tmp_path / "elsewhere.parquet"
    (data / "index.parquet").rename(elsewhere)
    alone = ["--protocol", "matched", "--index", elsewhere, "--out", tmp_path / "alone"]
    succeed("evaluate", "--run", run, "--data", data, *alone)
    assert json.loads((tmp_path / "alone" / "report.json").read_text())["data"]["name"] == "data-matched"


def test_a_wrong_setting_of_several_processes_is_tried_once(data: Path, tmp_path: Path) -> None:
    command = launch([*TWO_PROCESSES, *TRIES], "patchscan", *train(data, tmp_path / "run"), "--extra", str(data))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2, done.stderr
    assert 1 <= done.stderr.count("--data and --extra name one folder twice") <= 2, done.stderr
    assert "attempts left" not in done.stderr
    assert "Traceback" not in done.stderr, "a process that waited for the first tells how its connection broke"


def test_several_processes_stop_in_a_checkpoint_and_another_number_goes_on_from_it(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = launch([*TWO_PROCESSES, *TRIES], "patchscan", *train(data, run))
    process = subprocess.Popen(command, env=environment())
    try:
        while not any(entry["event"] == "epoch" for entry in log(run)):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert (run / "checkpoint.pt").exists()
    assert not (run / "card.json").exists()
    assert log(run)[0]["processes"] == 2
    succeed(*train(data, run))  # in one process; in several: the test with two nodes
    assert any(entry["event"] == "resume" for entry in log(run))
    assert Card.read(run).name == "tiny"


def test_several_processes_end_once_another_training_writes_their_run(data: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    command = launch([*TWO_PROCESSES, *TRIES], "patchscan", *train(data, run))
    with said.open("w") as file, subprocess.Popen(command, env=environment(), stderr=file) as process:
        try:
            while not any(entry["event"] == "epoch" for entry in log(run)):
                assert process.poll() is None
                time.sleep(0.02)
            (run / "training-id").write_text("another's")
            assert process.wait(60) == 2
        finally:
            process.kill()
    assert "another training writes" in said.read_text()
    assert not (run / "card.json").exists()


def test_a_node_that_was_stopped_comes_back_and_all_go_on_together(data: Path, tmp_path: Path) -> None:
    """Two agents, as on two nodes: one is evicted, the other stops in the same checkpoint and waits for it."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    options += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "join_timeout=300"]
    command = launch([*options, *TRIES], "patchscan", *train(data, run))
    homes = [tmp_path / "node-0", tmp_path / "node-1"]
    for home in homes:
        home.mkdir()
    nodes = [subprocess.Popen(command, env=environment(), cwd=home) for home in homes]
    try:
        while not any(entry["event"] == "epoch" for entry in log(run)):
            assert [node.poll() for node in nodes] == [None, None]
            time.sleep(0.02)
        # The rendezvous lives with the agent that holds its port, on a cluster pod 0.
        other = 1 - homes.index(_home_of_listener(port))
        nodes[other].send_signal(signal.SIGTERM)
        assert nodes[other].wait(120) == 75
        nodes[other] = subprocess.Popen(command, env=environment(), cwd=homes[other])
        assert [node.wait(200) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert any(entry["event"] == "resume" for entry in log(run))
    assert Card.read(run).name == "tiny"


def test_a_loader_process_outlives_a_signal_from_its_first_moment(data: Path) -> None:
    """An eviction may reach the whole process group just when an epoch or a validation begins."""
    recipe = load_recipe(str(data / "tiny.yaml"))
    images = TrainingData.load(recipe, str(data), None, "raw")
    for _ in range(5):
        others = set(psutil.Process().children())
        batches = iter(evaluation_loader(images.source, images.val, recipe, 1, torch.device("cpu")))
        begun = set(psutil.Process().children()) - others
        assert begun
        for child in begun:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        assert sum(len(crops) for crops, _ in batches) == len(images.val) * recipe.preset.count


def test_a_loader_process_ends_with_a_training_that_is_killed_as_it_starts() -> None:
    """Where its parent was killed before torch began to watch it, torch's own watch would never end it."""
    script = """
import os, time
from torch.utils.data._utils import worker
from patchscan.training.batches import CropDataset, Loader
watch = worker.ManagerWatchdog.__init__
worker.ManagerWatchdog.__init__ = lambda self: (time.sleep(1), watch(self))[1]
held = iter(Loader(CropDataset.__new__(CropDataset), batch_sampler=[[0]], num_workers=1))
os._exit(75)
"""
    # Its output ends when the last process that holds it has ended.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr


def test_a_file_that_vanished_ends_a_training_in_one_line(data: Path, tmp_path: Path) -> None:
    """And at once, though its loader processes ignore the signal with which Python would end them."""
    lacking = tmp_path / "data"
    shutil.copytree(data, lacking)
    (lacking / "seen_one/train/ai/7.png").unlink()
    process = start_patchscan(*train(lacking, tmp_path / "run"), "--epochs", "1", "--workers", "2")
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    (line,) = [line for line in told.splitlines() if line.startswith("patchscan: ")]
    assert "seen_one/train/ai/7.png is gone" in line
    assert "run `patchscan index` again" in line
    assert "Traceback" not in told


def _home_of_listener(port: int) -> Path:
    """The working directory of the process that listens on a TCP port."""
    (pid,) = {one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port}
    return Path(psutil.Process(pid).cwd())


def test_another_recipe_does_not_overwrite_a_run(data: Path, finished: Path) -> None:
    done = patchscan(*train(data, finished), "--seed", "5")
    assert done.returncode == 2
    assert "choose a new --run folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_generators_are_named(data: Path, tmp_path: Path) -> None:
    done = patchscan(*train(data, tmp_path), "--seen", "midjourney")
    assert done.returncode == 2
    assert "--seen: the data have no generator midjourney; there are seen_one, unseen_one" in done.stderr
    done = patchscan(*train(data, tmp_path), "--unseen", "unseen_noe")
    assert done.returncode == 2
    assert "--unseen: the data have no generator unseen_noe; there are seen_one, unseen_one" in done.stderr
