"""Measure training steps against a bare pass of the network, the training loader alone, and how long steps wait for it,
as `patchscan train` reports it."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from bench.images import write_tree
from bench.rounds import Recorder, Settings, alternate
from patchscan.dataset.index import build_index, load_index
from patchscan.dataset.source import DataSource
from patchscan.detector.presets import to_tensor
from patchscan.training.batches import CropDataset, EpochBatches, collate
from patchscan.training.data import select_rows
from patchscan.training.distributed import Ranks
from patchscan.training.learner import Learner, compute_loss
from patchscan.training.recipe import Recipe, load_recipe
from patchscan.training.train import train

WORKERS = (1, 2)
RECIPE = "ssp-lite"


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    loaders = [f"loader, {workers} workers" for workers in WORKERS]
    steps = [_over_bare_pass(name) for name in settings.models]
    return [*loaders, f"training {RECIPE}, 1 worker", f"training {RECIPE}, 1 worker: waiting", *steps]


def _over_bare_pass(name: str) -> str:
    return f"training {name}: step / bare pass"


def measure(settings: Settings, folder: Path) -> Recorder:
    """Measure images per second, the share of each epoch spent waiting for the loader, and what a step takes beside
    its forward and backward pass."""
    recorder = Recorder("training")
    if not settings.trained:
        recorder.left_out("loader and training", "left out of this bench")
        return recorder
    data = folder / "data"
    write_tree(data, settings.trained // 2)
    build_index(data)
    recipe = load_recipe(
        RECIPE,
        seen=["made"],
        unseen=[],
        epochs=settings.rounds + 1,
        validate_every=settings.rounds + 1,
        batch_size=min(64, settings.trained),
    )
    contenders: dict[str, Callable[[], float]] = {
        f"loader, {workers} workers": partial(_loader_rate, data, recipe, workers) for workers in WORKERS
    }
    for name, rates in alternate(contenders, settings.rounds).items():
        recorder.add(name, "images/s", rates)
    run = train(recipe, str(data), str(folder / "run"), device="cpu", workers=1)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["event"] == "epoch"][1:]  # the first warms up
    recorder.add(f"training {RECIPE}, 1 worker", "images/s", [one["images_per_s"] for one in epochs])
    recorder.add(f"training {RECIPE}, 1 worker: waiting", "share", [one["waiting_share"] for one in epochs])
    measure_steps(settings, recorder)
    return recorder


def measure_steps(settings: Settings, recorder: Recorder) -> None:
    """Measure a whole step of each model, on a batch of its recipe, over a bare forward and backward pass on the same
    pixels."""
    for name in settings.models:
        recipe = load_recipe(name, seen=["made"], unseen=[], weights="none")
        learner = Learner(recipe, Ranks(0, 1, torch.device("cpu")), 1000, "fp32")
        learner.model.train()
        images = min(recipe.batch_size, settings.trained)
        count = images * recipe.crops_per_image
        crops = torch.randint(256, (count, recipe.train_size, recipe.train_size, 3), dtype=torch.uint8)
        labels = torch.arange(count) % 2 * 1.0
        contenders: dict[str, Callable[[], float]] = {
            "step": partial(_seconds, partial(learner.step, crops, labels, 0)),
            "bare pass": partial(_seconds, partial(_bare_pass, learner.model, to_tensor(crops), labels)),
        }
        values = alternate(contenders, settings.rounds)
        recorder.ratio(_over_bare_pass(name), values["step"], values["bare pass"], at_most=1.15)


def _bare_pass(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    compute_loss(model(pixels), labels).backward()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _loader_rate(data: Path, recipe: Recipe, workers: int) -> float:
    """Measure images per second over one epoch, without the loader's start."""
    rows = select_rows(load_index(data), recipe.seen, "train")
    # Small batches, because the first one, which is not counted, waits for the loader's processes to start.
    batches = EpochBatches(len(rows), 8, seed=0)
    dataset = CropDataset(DataSource(str(data)), rows, recipe, epoch=0)
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate))
    next(loader)
    began, count = time.perf_counter(), 0
    for crops, _ in loader:
        count += len(crops) // (recipe.train_crops or recipe.preset.count)
    return count / max(time.perf_counter() - began, 1e-9)
