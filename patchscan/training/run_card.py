"""Build the card of a finished run: its training data, how the checkpoint was chosen, and the software versions."""

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from patchscan.common.files import sha256_of
from patchscan.dataset.audit import audit
from patchscan.detector.card import Card
from patchscan.detector.device import Precision
from patchscan.training.batches import is_kind
from patchscan.training.data import TrainingData
from patchscan.training.pretrained import describe_weights
from patchscan.training.recipe import Recipe


def build_card(recipe: Recipe, data: TrainingData, weights: Path, best: dict[str, Any], precision: Precision) -> Card:
    """Build the card of the file `weights`; `best` is its validation result: `epoch` (from 0) and `mean_auc`."""
    notice = [recipe.notice] if recipe.notice else []
    # A generator of an --extra folder, too: on a report of the unseen ones it would be taken for one of them.
    added = sorted(set(data.train.generator[data.train.label == 1]) - set(recipe.seen))
    paired = pd.concat([data.train[~is_kind(data.train)], data.val])  # the audit compares the classes of a generator
    return Card(
        name=recipe.name,
        version="1.0",
        architecture=recipe.architecture,
        preset=recipe.preset,
        weights_sha256=sha256_of(weights),
        training={
            "recipe": recipe.model_dump(),
            "seen": [*recipe.seen, *added],
            "unseen": recipe.unseen,
            "data_digest": data.digest,
            "protocol": data.protocol,
            "train_images": len(data.train),
            "val_images": len(data.val),
            "kinds": sorted(data.train.generator[is_kind(data.train)].unique()),
            "weights": describe_weights(recipe.architecture, recipe.weights),
            "precision": precision,
            "best_epoch": best["epoch"] + 1,
            "selected_by": "mean AUC of the seen generators' validation split",
            "seen_val_mean_auc": best["mean_auc"],
        },
        warnings=[*notice, *audit(paired).warnings],
        environment=environment(),
    )


def environment() -> dict[str, str]:
    """Return the versions of torch, torchvision and numpy, and this project's git commit or `unknown`."""
    commit = os.environ.get("PATCHSCAN_COMMIT")  # set in the container images, which hold neither git nor a repository
    if commit is None and (git := shutil.which("git")):
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "git_commit": commit or "unknown",
    }
