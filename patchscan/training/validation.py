"""Measure the AUC on the seen generators' validation images, by which the checkpoint is chosen."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from patchscan.detector.models import ai_logit
from patchscan.detector.presets import to_tensor
from patchscan.training.batches import evaluation_loader
from patchscan.training.data import TrainingData
from patchscan.training.recipe import Recipe


def validation_aucs(
    model: nn.Module, data: TrainingData, recipe: Recipe, workers: int, before_batch: Callable[[], None]
) -> dict[str, float]:
    """Return the AUC on each seen generator's validation images, by the generator's name. `before_batch` is called
    before each batch, and may raise."""
    logits = _logits(model, data, recipe, workers, before_batch)
    return {
        str(generator): auc(rows.label.to_numpy(), logits[rows.index])
        for generator, rows in data.val.groupby("generator")
    }


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Return the share of pairs of an AI and a real image in which the AI image has the higher score; ties count half.
    label (n,) of 0 and 1, both present; score (n,). NaN where a score is NaN."""
    # Not scikit-learn's: importing it takes as long as importing torch.
    ranks = pd.Series(score).rank().to_numpy()
    return float((ranks[label == 1].mean() - ranks[label == 0].mean()) / len(ranks) + 0.5)


@torch.inference_mode()
def _logits(
    model: nn.Module, data: TrainingData, recipe: Recipe, workers: int, before_batch: Callable[[], None]
) -> np.ndarray:
    """One logit per validation image, AI positive, float64 (len(data.val),): the mean over its crops (see
    `CropDataset`)."""
    model.eval()
    device = next(model.parameters()).device
    logits = []
    for crops, _ in evaluation_loader(data.source, data.val, recipe, workers, device):
        before_batch()
        logits.append(ai_logit(model(to_tensor(crops.to(device)))).double().cpu())
    return torch.cat(logits).reshape(len(data.val), -1).mean(dim=1).numpy()
