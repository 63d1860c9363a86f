"""One training step at a time: the model, its optimiser, and the averaged weights."""

import math
import time
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from patchscan.detector.device import Precision
from patchscan.detector.models import build_network
from patchscan.detector.presets import to_tensor
from patchscan.training.distributed import Ranks
from patchscan.training.pretrained import load_imagenet
from patchscan.training.recipe import Recipe

WARMUP_STEPS = 50
# A pass that takes this long is long enough to reckon the training's time from: a shorter one of few images spends much
# of it on what each pass does once, such as casting the weights.
MEASURED_S = 2.0


class Learner:
    """The model in training and its optimiser.

    `model` is trained; `averaged` is validated and saved: the moving average of its weights where the recipe asks for
    averaging, otherwise the model itself. `total_steps` is the number of steps of the recipe. With `precision` bf16,
    convolutions and linear layers compute in bfloat16 (torch.autocast); weights, optimiser and loss stay in float32.
    Call `distribute` after `load_state`, because that loads into the model that is not yet distributed.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, total_steps: int, precision: Precision):
        self.recipe, self.ranks, self.total_steps, self.precision = recipe, ranks, total_steps, precision
        torch.manual_seed(recipe.seed)
        self.model = build_network(recipe.architecture)
        load_imagenet(self.model, recipe.weights)
        self.model = self.model.to(ranks.device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = optimizer(self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.averaged = deepcopy(self.model) if recipe.averaging else self.model
        self._parallel: nn.Module = self.model

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which `load_state` reads."""
        return {
            "model": self.model.state_dict(),
            "kept": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a `state`; it may come from a run with another number of processes."""
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["kept"])
        self.optimizer.load_state_dict(state["optimizer"])

    def distribute(self) -> None:
        """Distribute the steps over all processes, if there are several."""
        if self.ranks.world == 1:
            return
        if self.ranks.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self._parallel = DistributedDataParallel(self.model)

    def autocast(self) -> torch.autocast:
        """A context in which the model computes in the training's precision."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def step(self, crops: torch.Tensor, labels: torch.Tensor, done: int) -> float:
        """Train on crops uint8 (n, size, size, 3) and labels float32 (n,), as step number `done`; returns the loss."""
        device = self.ranks.device
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(done)
        with self.autocast():
            outputs = self._parallel(to_tensor(crops.to(device, non_blocking=True)))
        loss = compute_loss(outputs.float(), labels.to(device, non_blocking=True), self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.optimizer.step()
        if self.recipe.averaging:
            self._update_average(done)
        return loss.item()

    def _learning_rate(self, done: int) -> float:
        if not self.recipe.cosine:
            return self.recipe.learning_rate
        share = done / self.total_steps
        return self.recipe.learning_rate * min(1.0, (done + 1) / WARMUP_STEPS) * math.cos(share * math.pi / 2) ** 2

    @torch.no_grad()
    def _update_average(self, done: int) -> None:
        """Move the averaged weights, batch-norm statistics included, towards the model's; faster in the first steps."""
        decay = min(self.recipe.averaging, (done + 1) / (done + 10))
        for average, new in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.dtype.is_floating_point:
                average.lerp_(new, 1 - decay)
            else:
                average.copy_(new)

    def measure_seconds(self, images: int) -> tuple[float, float]:
        """Estimate the seconds of one forward and backward pass over `images` images, and those of validating one
        image, a forward pass over its crops, from passes over blank ones. The model does not change."""
        self.model.eval()  # in training mode the pass would update the batch-norm statistics
        self._time_pass(1)  # warms up
        # A whole batch may take a minute on a CPU; a part of it that takes long enough to be timed tells as much.
        part, (forward, whole) = 1, self._time_pass(1)
        while part < images and whole < MEASURED_S:
            part = min(2 * part, images)
            forward, whole = self._time_pass(part)
        if whole < MEASURED_S:
            # The first pass over so many images reserved memory, which takes a GPU several times as long as the pass.
            forward, whole = self._time_pass(part)
        self.model.zero_grad(set_to_none=True)
        trained, scored = self.recipe.train_size, self.recipe.preset.size
        more_pixels = self.recipe.preset.count * scored**2 / (self.recipe.crops_per_image * trained**2)
        return whole * images / part, forward * more_pixels / part

    def _time_pass(self, images: int) -> tuple[float, float]:
        """The seconds of a forward pass over blank images, and of it and the backward pass."""
        size, count = self.recipe.train_size, images * self.recipe.crops_per_image
        start = time.monotonic()
        crops = torch.zeros(count, size, size, 3, dtype=torch.uint8, device=self.ranks.device)
        with self.autocast():
            outputs = self.model(to_tensor(crops))
        forward = self._time() - start
        compute_loss(outputs.float(), torch.zeros(count, device=self.ranks.device)).backward()
        return forward, self._time() - start

    def _time(self) -> float:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()


def compute_loss(outputs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean loss: BCE with logits for outputs (n, 1), cross entropy for (n, 2); labels float (n,), 1 is
    AI."""
    if outputs.shape[1] == 1:
        smoothed = labels * (1 - smoothing) + smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], smoothed)
    return nn.functional.cross_entropy(outputs, labels.long(), label_smoothing=smoothing)
