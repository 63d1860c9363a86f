"""Some steps of a training, to be taken by one process or by several: python -m tests.training_steps FOLDER, started by
torchrun. What the number of processes may change is switched off: dropout, and batch statistics, which processes on
CPUs keep each for itself."""

import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

from patchscan.training.batches import EpochBatches
from patchscan.training.distributed import Ranks
from patchscan.training.learner import Learner
from patchscan.training.recipe import load_recipe

IMAGES, BATCH = 40, 8


@dataclass(frozen=True)
class Steps:
    """The mean loss of each step over all processes, and this process's weights after the last one."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def take_steps(ranks: Ranks) -> Steps:
    """Take the steps of one epoch over IMAGES images of noise, half of them coarser."""
    recipe = load_recipe("ssp-lite", batch_size=BATCH)
    batches = EpochBatches(IMAGES, BATCH, recipe.seed, ranks.rank, ranks.world)
    learner = Learner(recipe, ranks, batches.per_epoch, "fp32")
    learner.distribute()
    learner.model.eval()
    crops = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % 2
    crops[labels == 1] //= 2
    losses = [
        ranks.mean(learner.step(crops[items], labels[items].float(), number)) for number, items in enumerate(batches)
    ]
    return Steps(losses, learner.model.state_dict())


if __name__ == "__main__":
    # The first process begins later than torch's own limit for a collective would let the others wait: it validates.
    distributed_c10d.default_pg_timeout = timedelta(seconds=1)
    ranks = Ranks.join("cpu")
    if ranks.rank == 0:
        time.sleep(2)
    torch.save(asdict(take_steps(ranks)), Path(sys.argv[1]) / f"{ranks.rank}.pt")
