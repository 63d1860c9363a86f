"""Crops as they were delivered, draws that balance classes and kinds, and extra folders; the same for the same seed."""

import io
import os
import shutil
import signal
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from patchscan.cli import app
from patchscan.common import processes
from patchscan.common.files import sha256_of
from patchscan.dataset.source import DataError
from patchscan.detector.answer import Answer
from patchscan.detector.card import Card
from patchscan.detector.detector import Detector
from patchscan.detector.device import DeviceError
from patchscan.training import distributed, learner, train
from patchscan.training.augment import deliver
from patchscan.training.batches import BalancedSampling, CropDataset, EpochBatches, LoaderDiedError, is_kind
from patchscan.training.checkpoint import RunStore, RunTakenError
from patchscan.training.data import TrainingData, check_names
from patchscan.training.distributed import Ranks
from patchscan.training.recipe import Delivery, Recipe, RecipeError, load_recipe
from patchscan.training.run_card import build_card
from patchscan.training.run_log import RunLog
from patchscan.training.train import Trainer
from tests.image_tree import picture, write
from tests.serving_kit import png

EVERYTHING = Delivery(size=32, plain=0, shrink=0.5, enlarge=0.5, sharpen=0.5, compress=1, twice=0.5)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 2**32 - 1))
def test_a_delivered_crop_has_its_size_whatever_the_image(height: int, width: int, seed: int) -> None:
    rgb = picture(seed % 5, 96, 96)[:height, :width]
    one, again = (deliver(rgb, EVERYTHING, np.random.RandomState(seed)) for _ in range(2))
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)


def test_a_plain_crop_is_a_part_of_the_image() -> None:
    rgb = picture(1, 60, 50)
    crop = deliver(rgb, Delivery(size=48, plain=1), np.random.RandomState(0))
    places = [(y, x) for y in range(60 - 47) for x in range(50 - 47)]
    assert any(np.array_equal(crop, rgb[y : y + 48, x : x + 48]) for y, x in places)


@pytest.mark.parametrize("step", ["shrink", "enlarge", "sharpen", "compress"])
def test_every_step_changes_pixels(step: str) -> None:
    nothing = Delivery(size=64, plain=0, shrink=0, enlarge=0, sharpen=0, compress=0)
    rgb = picture(1, 200, 200)
    plain, changed = (
        deliver(rgb, steps, np.random.RandomState(3)) for steps in (nothing, nothing.model_copy(update={step: 1.0}))
    )
    assert plain.shape == changed.shape
    assert not np.array_equal(plain, changed)


def table(**counts: tuple[int, int]) -> pd.DataFrame:
    """Rows of generators by name, each with so many fakes and real images."""
    rows = [
        (name, label) for name, pair in counts.items() for label, n in zip((1, 0), pair, strict=True) for _ in range(n)
    ]
    return pd.DataFrame(rows, columns=["generator", "label"])


ROWS = table(big=(400, 400), small=(100, 100), art=(0, 40), screens=(0, 10))


@pytest.mark.parametrize(("share", "of_art"), [(0.3, 0.2), (None, None)])
def test_half_is_real_and_generators_count_by_their_root(share: float | None, of_art: float | None) -> None:
    assert set(ROWS.generator[is_kind(ROWS)]) == {"art", "screens"}
    items = BalancedSampling(ROWS, share).draw(len(ROWS), np.random.RandomState(0))
    many = [BalancedSampling(ROWS, share).draw(len(ROWS), np.random.RandomState(seed)) for seed in range(40)]
    drawn = ROWS.iloc[np.concatenate(many) % len(ROWS)]
    assert len(items) == len(set(items.tolist())) == len(ROWS)
    assert drawn.label.mean() == pytest.approx(0.5, abs=1e-3)
    fakes, real = drawn[drawn.label == 1], drawn[drawn.label == 0]
    assert (fakes.generator == "big").mean() == pytest.approx(2 / 3, abs=0.02)
    kinds = real.generator.isin(["art", "screens"])
    roots = {name: count**0.5 for name, count in (("big", 400), ("small", 100), ("art", 40), ("screens", 10))}
    expected = share or (roots["art"] + roots["screens"]) / sum(roots.values())
    assert kinds.mean() == pytest.approx(expected, abs=0.02)
    assert (real[kinds].generator == "art").mean() == pytest.approx(2 / 3, abs=0.03)
    assert of_art is None or (real.generator == "art").mean() == pytest.approx(of_art, abs=0.02)


def test_a_resumed_epoch_goes_on_with_the_same_items() -> None:
    batches = EpochBatches(len(ROWS), 32, seed=1, sampling=BalancedSampling(ROWS, 0.3))
    batches.epoch = 2
    whole = list(batches)
    batches.start = 7
    assert list(batches) == whole[7:]
    batches.start, batches.epoch = 0, 3
    assert list(batches) != whole


RECIPE = """\
name: tiny
architecture: efficientnet-lite0
preset: {kind: patch, size: 64, rule: grid, count: 2}
seen: [one]
unseen: [other]
epochs: 1
batch_size: 8
learning_rate: 1.0e-3
flip: all
balanced: true
kinds_share: 0.5
delivery: {size: 48, plain: 0.5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return load_recipe(str(tmp_path / "tiny.yaml"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A data set of one generator, and a folder beside it with two kinds and the unseen generator."""
    data, extra = tmp_path / "data", tmp_path / "extra"
    for number in range(8):
        split = "train" if number < 6 else "val"
        write(data / "one" / split / "nature" / f"{number}.png", picture(number, 80, 80))
        write(data / "one" / split / "ai" / f"{number}.png", picture(number, 80, 80) // 16 * 16)
        for name, label in (("art", "nature"), ("screens", "nature"), ("other", "nature"), ("other", "ai")):
            write(extra / name / "val" / label / f"{number}.png", picture(100 + number, 80, 80))
    return str(data), str(extra)


def test_an_extra_folder_is_trained_on_but_its_unseen_generators(recipe: Recipe, folders: tuple[str, str]) -> None:
    data, extra = folders
    plain = TrainingData.load(recipe, data, None, "raw")
    joined = TrainingData.load(recipe, data, None, "raw", [extra])
    assert (len(plain.train), len(joined.train), len(joined.val)) == (12, 12 + 16, 4)
    assert set(joined.train.generator) == {"one", "art", "screens"}
    assert joined.digest != plain.digest
    images = CropDataset(joined.source, joined.train, recipe, epoch=0)
    assert [images[row][0].shape for row in range(len(images))] == [(1, 48, 48, 3)] * len(images)
    assert [images[row][1] for row in range(12, 28)] == [0] * 16


def test_what_an_extra_folder_adds_is_seen_and_its_val_images_are_told_of(
    recipe: Recipe, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A generator that was trained on stood among the unseen ones of reports."""
    data, extra = folders
    joined = TrainingData.load(recipe.model_copy(update={"unseen": []}), data, None, "raw", [extra])
    told = f"--extra {extra} has no train images: its 32 val images are trained on, and what is measured on them tells"
    assert told in capsys.readouterr().err
    (tmp_path / "weights").touch()
    card = build_card(recipe, joined, tmp_path / "weights", {"epoch": 0, "mean_auc": 0.5}, "fp32")
    assert card.training["seen"] == ["one", "other"]
    assert card.training["kinds"] == ["art", "screens"]
    assert card.training["recipe"]["seen"] == ["one"]
    TrainingData.load(recipe, data, None, "raw", [str(shutil.copytree(data, tmp_path / "another"))])
    write(Path(extra) / "other/train/ai/1.png", picture(1))  # of the unseen one: the others' val images stay val images
    (Path(extra) / "index.parquet").unlink()
    assert len(TrainingData.load(recipe, data, None, "raw", [extra]).train) == 12
    assert "no train images" not in capsys.readouterr().err


def test_a_folder_that_is_named_twice_is_refused(recipe: Recipe, folders: tuple[str, str]) -> None:
    data, extra = folders
    for others in ([data], [extra, f"{data}/../extra"]):
        with pytest.raises(DataError, match="name one folder twice"):
            TrainingData.load(recipe, data, None, "raw", others)


def test_a_name_that_is_nowhere_is_told_before_anything_is_read(folders: tuple[str, str]) -> None:
    """A misspelt one of --unseen was trained on."""
    data, extra = folders
    check_names(data, None, [extra], ["one"], ["other"])
    for seen, unseen, others, words in (
        (["one"], ["othre"], [extra], "--unseen: the data have no generator othre; there are art, one, other, screens"),
        (["noe"], [], [extra], "--seen: the data have no generator noe; there are one"),
        (["one"], ["other"], [], "--unseen: the data have no generator other; there are one"),
    ):
        with pytest.raises(DataError, match=words):
            check_names(data, None, others, seen, unseen)
    assert not (Path(data) / "index.parquet").exists()


def test_of_an_extra_data_set_the_train_images_are_taken(recipe: Recipe, folders: tuple[str, str]) -> None:
    """As of the data set itself: the others are kept for measuring."""
    another = str(shutil.copytree(folders[0], f"{folders[0]}-2"))
    joined = TrainingData.load(recipe, folders[0], None, "raw", [another])
    assert (len(joined.train), len(joined.val)) == (2 * 12, 4)


def test_val_images_that_are_trained_on_are_told(
    recipe: Recipe, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An index that a training builds tells of no leak."""
    one = Path(folders[0]) / "one"
    shutil.copy(one / "train/nature/0.png", one / "val/nature/copy.png")
    TrainingData.load(recipe, folders[0], None, "raw")
    assert "1 of 5 val images are also train images: validation" in capsys.readouterr().err


def test_copies_of_val_images_among_extra_ones_are_not_trained_on(
    recipe: Recipe, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = folders
    held_out = sorted(path for path in Path(data).rglob("val/*/*") if path.is_file())
    extra = tmp_path / "more" / "seen" / "train" / "nature"
    extra.mkdir(parents=True)
    for number, image in enumerate([*held_out, min(Path(data).rglob("train/nature/*"))]):
        shutil.copy(image, extra / f"{number}{image.suffix}")
    joined = TrainingData.load(recipe, data, None, "raw", [str(tmp_path / "more")])
    assert not set(joined.train.sha256) & {sha256_of(image) for image in held_out}
    assert len(joined.train) == 12 + 1
    assert f"{len(held_out)} images are also val images" in capsys.readouterr().err


def test_a_row_drawn_twice_in_an_epoch_gets_another_crop(recipe: Recipe, folders: tuple[str, str]) -> None:
    data = TrainingData.load(recipe, folders[0], None, "raw")
    images = CropDataset(data.source, data.train, recipe, epoch=0)
    first, again, next_epoch = (
        images[3][0],
        images[3 + len(images)][0],
        CropDataset(data.source, data.train, recipe, 1)[3][0],
    )
    assert (first == images[3][0]).all()
    assert not (first == again).all()
    assert not (first == next_epoch).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (RECIPE + "augment: {probability: 0.5}\n", "without augment"),
        (RECIPE.replace("balanced: true\n", ""), "kinds_share needs balanced"),
        (RECIPE.replace("plain: 0.5", "plan: 0.5"), "did you mean plain"),
        (RECIPE.replace("[one]", "[overall]"), "reports have a row overall of their own"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(tmp_path: Path, wrong: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(wrong)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "wrong.yaml"))


class StopAfter(Event):
    """Is set after so many steps and batches of validation images, as by a signal."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_an_interrupted_run_ends_in_the_same_weights_and_its_card_says_what_it_learned_from(
    recipe: Recipe,
    folders: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, extra = folders
    recipe = recipe.model_copy(update={"epochs": 2, "averaging": 0.9, "cosine": True, "max_gradient_norm": 1.0})

    def run(name: str, stop: StopAfter) -> None:
        monkeypatch.setattr(train, "Event", lambda: stop)
        train.train(recipe, data, str(tmp_path / name), device="cpu", workers=0, extra=[extra])

    run("whole", StopAfter(99))
    # In the features before training, of one batch; in the second step after them; in the validation after the third.
    places: list[tuple[int, tuple[int, int] | None]] = [(0, None), (2, (0, 2)), (1, (0, 3))]
    for left, saved in places:
        with pytest.raises(SystemExit, match="75"):
            run("stopped", StopAfter(left))
        assert capsys.readouterr().err.endswith("\npatchscan: interrupted; run the same command again\n")
        state = RunStore(str(tmp_path / "stopped")).load_checkpoint()
        assert (state and (state["epoch"], state["step"])) == saved
    run("stopped", StopAfter(99))
    card, resumed = (Card.read(tmp_path / name) for name in ("whole", "stopped"))
    assert resumed.weights_sha256 == card.weights_sha256
    assert card.training["kinds"] == ["art", "screens"]
    assert card.training["train_images"] == 28
    assert isinstance(Detector.load(tmp_path / "whole").score([png(1)])[0], Answer)


def test_a_training_in_the_background_of_a_script_ignores_ctrl_c(
    recipe: Recipe, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Any] = []

    def validate(*_: Any) -> dict[str, float]:
        handlers.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
        return {"one": 0.9}

    monkeypatch.setattr(train, "validation_aucs", validate)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the shell starts it
    try:
        train.train(recipe, folders[0], str(tmp_path / "run"), device="cpu", workers=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers[0] == signal.SIG_IGN
    assert callable(handlers[1])


def test_half_of_the_cpus_that_a_container_may_use_load_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(processes, "available_cpus", lambda: 6)
    monkeypatch.setattr(train, "train", lambda *_, **options: asked.update(options))
    assert CliRunner().invoke(app, ["train", "ssp", "--data", "data", "--run", "run"]).exit_code == 0
    assert asked["workers"] == 3


@pytest.mark.parametrize("found", ["in a step", "in validation"])
def test_a_loss_or_an_output_that_is_no_number_ends_the_run(
    found: str, recipe: Recipe, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found == "in a step":
        monkeypatch.setattr(learner, "compute_loss", lambda outputs, *_: outputs.sum() * float("nan"))
    else:
        monkeypatch.setattr(train, "validation_aucs", lambda *_: {"one": float("nan")})
    with pytest.raises(train.DivergedError, match="lower learning_rate"):
        train.train(recipe, folders[0], str(tmp_path / "run"), device="cpu", workers=0)


@pytest.mark.parametrize("phase", ["_training_crops", "_decode"])  # of the first epoch, of the features before it
def test_a_loader_process_that_is_killed_is_one_line(
    phase: str, recipe: Recipe, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CropDataset, phase, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LoaderDiedError, match="run the same command again, with fewer --workers") as died:
        train.train(recipe, folders[0], str(tmp_path / "run"), device="cpu", workers=1)
    assert died.value.exit_code == 75


def test_a_file_that_is_no_checkpoint_is_one_line(recipe: Recipe, folders: tuple[str, str], tmp_path: Path) -> None:
    run, whole = tmp_path / "run", io.BytesIO()
    run.mkdir()
    made = {"recipe": "{}", "data_digest": "", "rng": [], "epoch": 1, "step": 0, "best": {"epoch": 0, "mean_auc": 0.5}}
    torch.save(made, whole)
    others = [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", whole.getvalue()[:-30]]
    state: Any
    for state in ([], {}, {"state_dict": {}}, torch.zeros(3)):
        file = io.BytesIO()
        torch.save(state, file)
        others.append(file.getvalue())
    for content in (*others, whole.getvalue()):
        (run / "checkpoint.pt").write_bytes(content)
        words = r"lacks model\.safetensors" if content == whole.getvalue() else "checkpoint"
        with pytest.raises(DataError, match=f"{words}.* remove .*checkpoint.pt to begin this run anew"):
            train.train(recipe, folders[0], str(run), device="cpu", workers=0)
        assert (run / "checkpoint.pt").read_bytes() == content


def test_a_process_of_several_that_cannot_join_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError, match="RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        Ranks.join("cpu")
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "check_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"this machine has 1 GPUs, .* lower --nproc-per-node"):
        Ranks.join("cuda")


@pytest.mark.parametrize("bucket", [False, True])
def test_of_two_trainings_of_one_run_the_first_ends_at_its_next_checkpoint(
    bucket: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bucket:
        monkeypatch.setattr("patchscan.training.checkpoint.is_bucket", lambda _: True)
    first, second = RunStore(str(tmp_path)), RunStore(str(tmp_path))
    for store in (first, second):
        (store.folder / "log.jsonl").touch()
    first.own("first")
    first.save_checkpoint({"step": 1})
    second.own("second")
    with pytest.raises(RunTakenError, match=r"another training writes .*: give one of them another --run"):
        first.save_checkpoint({"step": 2})
    second.save_checkpoint({"step": 3})
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"step": 3}


@pytest.mark.parametrize("bucket", [False, True])
def test_of_two_trainings_the_first_replaces_no_file_of_the_second(
    bucket: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is at the end of an epoch, better than before, or at the end of all; checkpoints are written later."""
    if bucket:
        monkeypatch.setattr("patchscan.training.checkpoint.is_bucket", lambda _: True)
    monkeypatch.setattr("patchscan.training.train.validation_aucs", lambda *_: {"sd": 0.9})
    first, second = RunStore(str(tmp_path)), RunStore(str(tmp_path))
    first.own("first")
    second.own("second")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer: Any = object.__new__(Trainer)
    trainer.__dict__ |= {
        "store": first,
        "ranks": SimpleNamespace(device=torch.device("cuda")),
        "learner": SimpleNamespace(averaged=torch.nn.Linear(1, 1)),
        "log": SimpleNamespace(write=lambda *_, **__: None),
        "best": {"epoch": -1, "mean_auc": -1.0},
        **dict.fromkeys(("data", "recipe", "workers", "epoch"), 0),
    }
    for step in (trainer._validate, trainer._finish, *([lambda _: first.push()] if bucket else [])):
        with pytest.raises(RunTakenError):
            step(lambda: None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_process_that_goes_on_draws_the_curves_of_those_before_it(tmp_path: Path) -> None:
    """A run in a bucket has its log there; TensorBoard's files are uploaded at the end alone."""
    first = RunLog(tmp_path, 0)
    first.write("start", device="cpu")
    first.write("epoch", epoch=1, loss=0.5)
    shutil.rmtree(tmp_path / "tensorboard")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"time": 1, "eve\n')  # as a full disk leaves it
    RunLog(tmp_path, 0).write("epoch", epoch=2, loss=0.25)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("epoch/loss")] == [(1, 0.5), (2, 0.25)]


def test_a_batch_that_the_device_has_no_memory_for_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 7 has 70 GiB in use.")

    monkeypatch.setattr("patchscan.training.train.TrainingData.load", fill)
    with pytest.raises(
        DeviceError, match=r"too little memory for batch_size 32, .* \(CUDA out of memory.*2.00 GiB\.\)$"
    ):
        train.train(load_recipe("ssp"), "data", str(tmp_path / "run"), device="cpu")
