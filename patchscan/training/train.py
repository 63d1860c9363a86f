"""Train one recipe on CPUs or GPUs, in one or several processes; an interrupted run can be resumed.

    patchscan train ssp --data DATA --run runs/ssp        # one process, on the GPU if there is one
    python -m patchscan.training.launch --nproc-per-node 4 -m patchscan train ssp --data DATA --run runs/ssp

The checkpoint is chosen on the seen generators' validation split; unseen generators are never read.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from patchscan.common.console import ProgressReport, say, stop_on_signals, tell
from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.dataset.source import DataError
from patchscan.detector.card import CARD_FILE, WEIGHTS_FILE
from patchscan.detector.device import DeviceError, Precision, choose_precision
from patchscan.detector.onnx_export import write_graph
from patchscan.detector.weights import read_safetensors
from patchscan.training.batches import (
    BalancedSampling,
    CropDataset,
    EpochBatches,
    deaths_of_loaders_told,
    is_kind,
    training_loader,
)
from patchscan.training.checkpoint import RunStore
from patchscan.training.data import TrainingData
from patchscan.training.distributed import Ranks
from patchscan.training.features import feature_rows, write_features
from patchscan.training.learner import Learner
from patchscan.training.recipe import Recipe
from patchscan.training.run_card import build_card
from patchscan.training.run_log import LOG_FILE, LoaderTimer, RunLog
from patchscan.training.validation import validation_aucs

CHECKPOINT_EVERY_S = 120.0


class DivergedError(UserError):
    """The loss became NaN or infinite: the recipe cannot be trained as it is."""


def train(
    recipe: Recipe,
    data: str,
    run: str,
    *,
    index: Path | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    workers: int = 1,
    protocol: Literal["raw", "matched"] = "raw",
    extra: Sequence[str] = (),
) -> Path:
    """Train `recipe` on `data`, or on its matched version, and write the run to `run`. Resumes the run if it exists.

    data: a folder or s3:// URL in GenImage's layout. extra: folders in the same layout to train on as well, see
    `select_extra_rows`. run: a folder or s3:// URL. precision: see `choose_precision`. Returns the run folder with
    model.safetensors, card.json and model.onnx. Raises DataError, DeviceError, RecipeError, WeightsError,
    LoaderDiedError, RunTakenError; SystemExit(75) after SIGTERM or Ctrl-C, once a checkpoint is saved from which the
    call continues.
    """
    try:
        ranks = Ranks.join(device)
        chosen = choose_precision(precision, ranks.device)
        if recipe.batch_size % ranks.world:
            raise DataError(f"batch_size {recipe.batch_size} is not divisible by {ranks.world} processes")
        store = RunStore(run)
        images = ranks.rank_zero_first(lambda: TrainingData.load(recipe, data, index, protocol, extra))
        with deaths_of_loaders_told():
            return Trainer(recipe, ranks, chosen, store, images, workers).run()
    except SystemExit:
        if ranks.rank == 0:
            tell("interrupted; run the same command again")
        raise
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the device has too little memory for batch_size {recipe.batch_size}, or another program uses it: take a "
            f"smaller one in the recipe, or a larger device ({str(error).splitlines()[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Trainer:
    """One training run: the learner, its images, the progress (`epoch`, and `step` within it), the best validation
    result so far, and whether an earlier process has done it all (`is_done`)."""

    def __init__(
        self, recipe: Recipe, ranks: Ranks, precision: Precision, store: RunStore, data: TrainingData, workers: int
    ):
        self.recipe, self.ranks, self.store, self.data, self.workers = recipe, ranks, store, data, workers
        sampling = BalancedSampling(data.train, recipe.kinds_share) if recipe.balanced else None
        self.batches = EpochBatches(len(data.train), recipe.batch_size, recipe.seed, ranks.rank, ranks.world, sampling)
        self.learner = Learner(recipe, ranks, recipe.epochs * self.batches.per_epoch, precision)
        self.log = RunLog(store.folder, ranks.rank)
        self.epoch = self.step = 0
        self.is_done = False
        self.best: dict[str, Any] = {"epoch": -1, "mean_auc": -1.0}
        self._resume()
        # Several processes take torchrun's name for all: one that is cut off may not end the others' training.
        name = uuid.uuid4().hex if ranks.world == 1 else os.environ.get("TORCHELASTIC_RUN_ID")
        if ranks.rank == 0 and name:
            store.own(name)
        self.learner.distribute()

    def run(self) -> Path:
        """Train to the end of the recipe, or until interrupted (SystemExit 75). Returns the run folder. A run that is
        done stays as it is: its card may hold what an evaluation has measured since."""
        if self.is_done:
            if self.ranks.rank == 0:
                say(f"{self.store.url} is trained already, and stays as it is", error=True)
            return self.store.folder
        stop = Event()

        def before_batch() -> None:
            # Several processes wait for the first one meanwhile; were it to end, they would end with errors.
            if self.ranks.world == 1 and stop.is_set():
                raise SystemExit(EXIT_INTERRUPTED)

        with stop_on_signals(stop):
            self._begin(before_batch)
            while self.epoch < self.recipe.epochs:
                self._train_epoch(stop)
                if self.ranks.rank == 0 and self._is_validated(self.epoch):
                    self._validate(before_batch)
                self.epoch, self.step = self.epoch + 1, 0
                self._save_checkpoint()
            if self.ranks.rank == 0:
                self._finish(before_batch)
        return self.store.folder

    def _begin(self, before_batch: Callable[[], None]) -> None:
        """Log what begins, and in a new run save the features before the training."""
        self.log.write(
            "start",
            device=str(self.ranks.device),
            processes=self.ranks.world,
            precision=self.learner.precision,
            data_digest=self.data.digest[:12],
            images=len(self.data.train),
            images_of_kinds=int(is_kind(self.data.train).sum()),
            parameters=sum(parameter.numel() for parameter in self.learner.model.parameters()),
            planned_minutes=round(self._planned_seconds() / 60, 1),
        )
        if self._steps_done == 0 and self.ranks.rank == 0:
            self.store.push(self._write_features("before", before_batch))

    def _planned_seconds(self) -> float:
        """The time of the steps, validations and features that remain, if no step waits for its images."""
        images = max(1, min(self.recipe.batch_size, len(self.data.train)) // self.ranks.world)
        step_s, image_s = self.learner.measure_seconds(images)
        steps = self.learner.total_steps - self._steps_done
        validations = sum(self._is_validated(epoch) for epoch in range(self.epoch, self.recipe.epochs))
        moments = 1 if self._steps_done else 2  # of features, of one crop of each image
        crops_share = moments / self.recipe.preset.count
        scored = validations * len(self.data.val) + crops_share * len(feature_rows(self.data))
        return steps * step_s + scored * image_s

    def _is_validated(self, epoch: int) -> bool:
        return epoch + 1 == self.recipe.epochs or (epoch + 1) % self.recipe.validate_every == 0

    @property
    def _steps_done(self) -> int:
        return self.epoch * self.batches.per_epoch + self.step

    def _train_epoch(self, stop: Event) -> None:
        self.learner.model.train()
        self.batches.epoch, self.batches.start = self.epoch, self.step
        images = CropDataset(self.data.source, self.data.train, self.recipe, self.epoch)
        loader = training_loader(images, self.batches, self.workers, pin_memory=self.ranks.device.type == "cuda")
        timer, saved_at = LoaderTimer(), time.monotonic()
        losses: list[float] = []
        label = f"epoch {self.epoch + 1}/{self.recipe.epochs}"
        with ProgressReport(label, self.batches.per_epoch, "batches") as progress:
            progress.advance(self.step)
            for crops, labels in timer.iterate(loader):
                losses.append(self.learner.step(crops, labels, self._steps_done))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(
                        f"the loss is {losses[-1]} after {self._steps_done} steps: lower learning_rate or set "
                        "max_gradient_norm in the recipe, and name a new --run"
                    )
                self.step += 1
                progress.advance(notes=f"loss {np.mean(losses[-50:]):.4f}")
                if self.ranks.any(stop.is_set()):
                    self._save_checkpoint()
                    raise SystemExit(EXIT_INTERRUPTED)
                if self.ranks.any(time.monotonic() - saved_at > CHECKPOINT_EVERY_S):
                    self._save_checkpoint()
                    saved_at = time.monotonic()
        if losses:
            loss = self.ranks.mean(float(np.mean(losses)))
            throughput = timer.throughput(len(losses) * self.recipe.batch_size)
            self.log.write("epoch", epoch=self.epoch + 1, loss=loss, **throughput)

    def _validate(self, before_batch: Callable[[], None]) -> None:
        """Validate the averaged weights, and save them if they are the best so far. Where `before_batch` ends it, a
        checkpoint is saved of the moment before it."""
        random_state = torch.get_rng_state()  # the loader advances it
        try:
            # On a GPU it takes little of the time, and bfloat16 would give images equal scores.
            on_cpu = self.ranks.device.type == "cpu"
            with self.learner.autocast() if on_cpu else nullcontext():
                aucs = validation_aucs(self.learner.averaged, self.data, self.recipe, self.workers, before_batch)
        except SystemExit:
            torch.set_rng_state(random_state)
            self._save_checkpoint()
            raise
        mean = float(np.mean(list(aucs.values())))
        if math.isnan(mean):
            raise DivergedError(
                f"the model's outputs are not finite after epoch {self.epoch + 1}: lower learning_rate or set "
                "max_gradient_norm in the recipe, and name a new --run"
            )
        auc_fields = {f"auc_{generator}": auc for generator, auc in aucs.items()}
        self.log.write("validation", epoch=self.epoch + 1, mean_auc=mean, **auc_fields)
        if mean > self.best["mean_auc"]:
            self.best = {"epoch": self.epoch, "mean_auc": mean}
            self.store.save_weights(self.learner.averaged.state_dict())

    def _finish(self, before_batch: Callable[[], None]) -> None:
        folder = self.store.folder
        self.store.check_owner()
        self.learner.averaged.load_state_dict(read_safetensors(folder / WEIGHTS_FILE))
        self._write_features("after", before_batch)
        build_card(self.recipe, self.data, folder / WEIGHTS_FILE, self.best, self.learner.precision).write(folder)
        write_graph(folder)
        self.store.push()
        self.log.write("done", run=self.store.url, best_epoch=self.best["epoch"] + 1, mean_auc=self.best["mean_auc"])
        self.store.push(LOG_FILE)

    def _write_features(self, moment: str, before_batch: Callable[[], None]) -> str:
        """Write the features of this moment; returns the file's name."""
        file = self.store.folder / f"features_{moment}.npz"
        write_features(file, self.learner.averaged, self.data, self.recipe, self.workers, before_batch)
        return file.name

    def _save_checkpoint(self) -> None:
        """Save everything that a resumed run needs to end in the same weights."""
        rng_states = self.ranks.gather(torch.get_rng_state())
        if self.ranks.rank:
            return
        self.store.save_checkpoint(
            {
                "recipe": self.recipe.model_dump_json(),
                "data_digest": self.data.digest,
                "precision": self.learner.precision,
                **self.learner.state(),
                "rng": rng_states,
                "epoch": self.epoch,
                "step": self.step,
                "best": self.best,
            }
        )

    def _resume(self) -> None:
        state = self.store.load_checkpoint()
        if state is None:
            return
        if not self.recipe.is_that_of(state["recipe"]) or state["data_digest"] != self.data.digest:
            raise DataError(
                f"{self.store.folder} holds a run of another recipe or other data: choose a new --run folder, or use "
                "the recipe and data that the run was started with"
            )
        if (precision := state.get("precision", self.learner.precision)) != self.learner.precision:
            raise DataError(
                f"{self.store.folder} holds a run in {precision}: continue it with --precision {precision}, or choose "
                "another --run"
            )
        self.learner.load_state(state)
        rng_states = state["rng"]  # one per process; the run may now have more processes than when it was saved
        torch.set_rng_state(rng_states[self.ranks.rank] if self.ranks.rank < len(rng_states) else rng_states[0])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        has_card = (self.store.folder / CARD_FILE).exists()
        self.is_done = self.epoch == self.recipe.epochs and has_card and self.log.is_done()
        if not self.is_done:
            self.log.write("resume", epoch=min(self.epoch + 1, self.recipe.epochs), step=self.step)
