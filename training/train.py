"""Train one recipe: on a CPU, a GPU, or several of either, resumable at any moment.

    patchscan train ssp --data DATA --run runs/ssp                          one process, the GPU if there is one
    python -m training.launch --nproc-per-node 4 -m training.train -- ssp --data DATA --run ...

The checkpoint is chosen by the seen generators' validation split; unseen generators are never read here.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import dataset.index
from console import ProgressReport
from dataset.protocol import matched_version, protocol_of
from dataset.source import DataError, Source
from detector.card import WEIGHTS_FILE, Card
from detector.models import ai_logit, build
from detector.presets import to_tensor
from detector.weights import load_imagenet, read_safetensors, sha256_of
from evaluation.bias import audit
from training.batches import CropDataset, EpochBatches, collate, evaluation_loader, rows_of
from training.checkpoint import RunStore
from training.features import write_features
from training.processes import EXIT_INTERRUPTED, Interrupt, Ranks, leave_stopping_to_parent
from training.recipe import Recipe

CHECKPOINT_EVERY_S = 120.0
WARMUP_STEPS = 50


class Trainer:
    """The state of one run: model, optimiser, position, and the best validation so far."""

    def __init__(
        self,
        recipe: Recipe,
        data: str,
        run: str,
        index: Path | None,
        device: str | None,
        workers: int,
        protocol: Literal["raw", "matched"],
    ):
        self.recipe, self.workers = recipe, workers
        self.ranks = Ranks.join(device)
        if recipe.batch_size % self.ranks.world:
            raise DataError(f"batch_size {recipe.batch_size} cannot be shared by {self.ranks.world} processes")
        self.store = RunStore(run)
        if protocol == "matched":
            given, given_index = data, index
            data = str(self.ranks.first_then_all(lambda: matched_version(given, index=given_index)))
            index = index if data == given else None
        self.source = Source(data)
        self.board = SummaryWriter(str(self.store.folder / "tensorboard"))
        self.protocol = protocol_of(data)
        self.index = self.ranks.first_then_all(lambda: dataset.index.load_index(data, index))
        self.train_rows = rows_of(self.index, recipe.seen, "train")
        self.val_rows = rows_of(self.index, recipe.seen, "val")
        torch.manual_seed(recipe.seed)
        self.model = build(recipe.architecture)
        load_imagenet(self.model, recipe.weights)
        self.model = self.model.to(self.ranks.device).to(memory_format=torch.channels_last)
        self.batches = EpochBatches(
            len(self.train_rows), recipe.batch_size, recipe.seed, self.ranks.rank, self.ranks.world
        )
        optimizer = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = optimizer(self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        # What is validated and kept: the moving average of the weights, or the model itself.
        self.kept = deepcopy(self.model) if recipe.averaging else self.model
        self.epoch = self.step = 0
        self.best: dict[str, Any] = {"epoch": -1, "mean_auc": -1.0}
        self.waited_s = self.trained_s = 0.0
        self._resume()
        self.parallel = self._distributed()

    def _distributed(self) -> nn.Module:
        if self.ranks.world == 1:
            return self.model
        if self.ranks.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        return DistributedDataParallel(self.model)

    # -- resume ----------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        state = self.store.load_checkpoint()
        if state is None:
            return
        if state["recipe"] != self.recipe.model_dump_json() or state["data_digest"] != self.data_digest:
            raise DataError(
                f"{self.store.folder} holds a run of another recipe or other data: name a new --run folder, or go on "
                "with the recipe and data it was started with"
            )
        self.model.load_state_dict(state["model"])
        self.kept.load_state_dict(state["kept"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][self.ranks.rank] if self.ranks.rank < len(state["rng"]) else state["rng"][0])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.log("resume", epoch=self.epoch, step=self.step)

    def save_checkpoint(self) -> None:
        """All that a resumed run needs to end in the same weights."""
        states = [torch.get_rng_state()]
        if self.ranks.world > 1:
            gathered: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(gathered, states[0])
            states = gathered
        if self.ranks.rank:
            return
        self.store.save_checkpoint(
            {
                "recipe": self.recipe.model_dump_json(),
                "data_digest": self.data_digest,
                "model": self.model.state_dict(),
                "kept": self.kept.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": states,
                "epoch": self.epoch,
                "step": self.step,
                "best": self.best,
            }
        )

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end of the recipe, or to an interrupt (SystemExit 75). Returns the run folder."""
        interrupt = Interrupt()
        self._announce()
        while self.epoch < self.recipe.epochs:
            self._train_epoch(interrupt)
            last = self.epoch + 1 == self.recipe.epochs
            if self.ranks.rank == 0 and (last or (self.epoch + 1) % self.recipe.validate_every == 0):
                self._validate()
            self.epoch, self.step = self.epoch + 1, 0
            self.save_checkpoint()
        if self.ranks.rank == 0:
            self._finish()
        return self.store.folder

    def _train_epoch(self, interrupt: Interrupt) -> None:
        self.model.train()
        saved_at = time.monotonic()
        losses: list[float] = []
        label = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        with ProgressReport(label, self.batches.per_epoch, "batches") as progress:
            progress.advance(self.step)
            for crops, labels in self._timed(self._loader()):
                losses.append(self._train_step(crops, labels))
                self.step += 1
                progress.advance(notes=f"loss {np.mean(losses[-50:]):.4f}")
                if self.ranks.any(interrupt.asked):
                    self.save_checkpoint()
                    raise SystemExit(EXIT_INTERRUPTED)
                if self.ranks.any(time.monotonic() - saved_at > CHECKPOINT_EVERY_S):
                    self.save_checkpoint()
                    saved_at = time.monotonic()
        if losses:
            loss = self.ranks.mean(float(np.mean(losses)))
            self.log("epoch", epoch=self.epoch, loss=loss, **self._throughput(len(losses)))

    def _loader(self) -> DataLoader[tuple[torch.Tensor, int]]:
        self.batches.epoch, self.batches.start = self.epoch, self.step
        return DataLoader(
            CropDataset(self.source, self.train_rows, self.recipe, self.epoch),
            batch_sampler=self.batches,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=leave_stopping_to_parent,
            pin_memory=self.ranks.device.type == "cuda",
            # A generator of its own: the loader's draw must not move the model's random state, which a resume restores.
            generator=torch.Generator().manual_seed(0),
        )

    def _train_step(self, crops: torch.Tensor, labels: torch.Tensor) -> float:
        device = self.ranks.device
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = self.parallel(to_tensor(crops.to(device, non_blocking=True)))
        loss = loss_of(outputs.float(), labels.to(device, non_blocking=True), self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.recipe.averaging:
            self._average()
        return loss.item()

    @property
    def _steps_done(self) -> int:
        return self.epoch * self.batches.per_epoch + self.step

    def _learning_rate(self) -> float:
        if not self.recipe.cosine:
            return self.recipe.learning_rate
        share = self._steps_done / (self.recipe.epochs * self.batches.per_epoch)
        return (
            self.recipe.learning_rate
            * min(1.0, (self._steps_done + 1) / WARMUP_STEPS)
            * math.cos(share * math.pi / 2) ** 2
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Move the kept weights, batch-norm statistics included, towards the model's; faster in the first steps."""
        decay = min(self.recipe.averaging, (self._steps_done + 1) / (self._steps_done + 10))
        for kept, new in zip(self.kept.state_dict().values(), self.model.state_dict().values(), strict=True):
            if kept.dtype.is_floating_point:
                kept.lerp_(new, 1 - decay)
            else:
                kept.copy_(new)

    def _timed(self, loader: DataLoader[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.waited_s = self.trained_s = 0.0
        ready = time.monotonic()
        for batch in loader:
            start = time.monotonic()
            self.waited_s += start - ready
            yield batch
            ready = time.monotonic()
            self.trained_s += ready - start

    def _throughput(self, steps: int) -> dict[str, float]:
        total = self.waited_s + self.trained_s
        images = steps * self.recipe.batch_size
        return {"images_per_s": images / total, "waiting_share": self.waited_s / total}

    def _validate(self) -> None:
        logits = validation_logits(self.kept, self.source, self.val_rows, self.recipe, self.workers)
        aucs = {
            str(generator): float(roc_auc_score(rows.label, logits[rows.index]))
            for generator, rows in self.val_rows.groupby("generator")
        }
        mean = float(np.mean(list(aucs.values())))
        self.log("validation", epoch=self.epoch, mean_auc=mean, **{f"auc_{name}": auc for name, auc in aucs.items()})
        if mean > self.best["mean_auc"]:
            self.best = {"epoch": self.epoch, "mean_auc": mean}
            self.store.save_weights(WEIGHTS_FILE, self.kept.state_dict())
            self.store.push(WEIGHTS_FILE)

    # -- what a person reads ---------------------------------------------------------------------------------------

    @property
    def data_digest(self) -> str:
        """Names the images of the training run's generators, whatever else lies beside them."""
        return dataset.index.data_digest(pd.concat([self.train_rows, self.val_rows]))

    def _announce(self) -> None:
        step_s = probe_step_seconds(self.model, self.recipe, self.ranks, len(self.train_rows))
        remaining = (self.recipe.epochs - self.epoch) * self.batches.per_epoch - self.step
        self.log(
            "start",
            device=str(self.ranks.device),
            processes=self.ranks.world,
            data_digest=self.data_digest[:12],
            images=len(self.train_rows),
            parameters=sum(one.numel() for one in self.model.parameters()),
            planned_minutes=round(remaining * step_s / 60, 1),
        )
        if self.epoch == self.step == 0 and self.ranks.rank == 0:
            self._write_features("before")

    def _write_features(self, moment: str) -> None:
        file = self.store.folder / f"features_{moment}.npz"
        write_features(file, self.kept, self.source, self.val_rows, self.recipe, self.workers)

    def log(self, event: str, **values: Any) -> None:
        """One line for people on standard error, the same as JSON in log.jsonl, numbers to TensorBoard."""
        if self.ranks.rank:
            return
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"{event}:", *(f"{key}={value}" for key, value in shown.items()), file=sys.stderr, flush=True)
        with (self.store.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, **values}) + "\n")
        if "epoch" in values:
            for key, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{key}", value, values["epoch"])
            self.board.flush()

    def _finish(self) -> None:
        self.kept.load_state_dict(read_safetensors(self.store.folder / WEIGHTS_FILE))
        self._write_features("after")
        notice = [self.recipe.notice] if self.recipe.notice else []
        card = Card(
            name=self.recipe.name,
            version="1.0",
            architecture=self.recipe.architecture,
            preset=self.recipe.preset,
            weights_sha256=sha256_of(self.store.folder / WEIGHTS_FILE),
            training={
                "recipe": self.recipe.model_dump(),
                "seen": self.recipe.seen,
                "unseen": self.recipe.unseen,
                "data_digest": self.data_digest,
                "protocol": self.protocol,
                "train_images": len(self.train_rows),
                "val_images": len(self.val_rows),
                "best_epoch": self.best["epoch"] + 1,
                "selected_by": "mean AUC of the seen generators' validation split",
                "seen_val_mean_auc": self.best["mean_auc"],
            },
            warnings=[*notice, *audit(pd.concat([self.train_rows, self.val_rows])).warnings],
            environment=environment(),
        )
        card.write(self.store.folder)
        self.store.push()
        self.log("done", run=str(self.store.folder), best_epoch=self.best["epoch"] + 1, mean_auc=self.best["mean_auc"])


def loss_of(outputs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """BCE with logits for one output (n, 1), cross entropy for two (n, 2); labels float (n,), 1 is AI."""
    if outputs.shape[1] == 1:
        smoothed = labels * (1 - smoothing) + smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], smoothed)
    return nn.functional.cross_entropy(outputs, labels.long(), label_smoothing=smoothing)


@torch.inference_mode()
def validation_logits(model: nn.Module, source: Source, rows: pd.DataFrame, recipe: Recipe, workers: int) -> np.ndarray:
    """One logit an image, AI positive, float64 (len(rows),): the mean over its crops, as serving computes it."""
    model.eval()
    device = next(model.parameters()).device
    loader = evaluation_loader(source, rows, recipe, workers)
    logits = [ai_logit(model(to_tensor(crops.to(device)))).double().cpu() for crops, _ in loader]
    return torch.cat(logits).reshape(len(rows), -1).mean(dim=1).numpy()


def probe_step_seconds(model: nn.Module, recipe: Recipe, ranks: Ranks, rows: int) -> float:
    """Seconds of one forward and backward pass over a batch of `rows` images' data set, in evaluation mode so that
    nothing of the model moves."""
    model.eval()
    size, images = recipe.preset.size, max(1, min(recipe.batch_size, rows) // ranks.world)
    crops = torch.zeros(
        images * (recipe.train_crops or recipe.preset.count), size, size, 3, dtype=torch.uint8, device=ranks.device
    )
    times = []
    for _ in range(2):
        start = time.monotonic()
        loss_of(model(to_tensor(crops)), torch.zeros(len(crops), device=ranks.device)).backward()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    model.zero_grad(set_to_none=True)
    return min(times)


def environment() -> dict[str, str]:
    """Versions of what computed the weights, and the commit of this project where there is one."""
    import torchvision

    command = ["git", "rev-parse", "HEAD"]
    commit = os.environ.get("PATCHSCAN_COMMIT")  # the images name theirs: they hold neither git nor the repository
    if commit is None and shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "git_commit": commit or "unknown",
    }


def train(
    recipe: Recipe,
    data: str,
    run: str,
    *,
    index: Path | None = None,
    device: str | None = None,
    workers: int = 1,
    protocol: Literal["raw", "matched"] = "raw",
) -> Path:
    """Train `recipe` on `data` (a folder or s3:// URL in GenImage's layout), as it is or on its matched version, into
    the run `run`; resumes what is there.

    Returns the run folder with model.safetensors and card.json. Raises DataError, RecipeError, WeightsError;
    SystemExit(75) after SIGTERM or Ctrl-C, when the same call goes on from the checkpoint.
    """
    try:
        return Trainer(recipe, data, run, index, device, workers, protocol).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    from cli import main

    sys.argv.insert(1, "train")
    main()
