"""Measure the training loader alone, and how long training steps wait for it, as `patchscan train` reports it."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from bench.images import write_tree
from bench.rounds import Recorder, Settings, alternate
from patchscan.dataset.index import build_index, load_index
from patchscan.dataset.source import DataSource
from patchscan.training.batches import CropDataset, EpochBatches, collate
from patchscan.training.data import select_rows
from patchscan.training.recipe import Recipe, load_recipe
from patchscan.training.train import train

WORKERS = (1, 2)
RECIPE = "ssp-lite"


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    loaders = [f"loader, {workers} workers" for workers in WORKERS]
    return [*loaders, f"training {RECIPE}, 1 worker", f"training {RECIPE}, 1 worker: waiting"]


def measure(settings: Settings, folder: Path) -> Recorder:
    """Measure images per second, and the share of each epoch spent waiting for the loader."""
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
    return recorder


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
