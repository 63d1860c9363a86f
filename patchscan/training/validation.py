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


@torch.inference_mode()
def validation_aucs(
    model: nn.Module, data: TrainingData, recipe: Recipe, workers: int, before_batch: Callable[[], None]
) -> dict[str, float]:
    """Return the AUC on each seen generator's validation images, by the generator's name. The score of an image is its
    logit, the mean over its crops (see `CropDataset`). `before_batch` is called before each batch, and may raise."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for crops, _ in evaluation_loader(data.source, data.val, recipe, workers, device):
        before_batch()
        found.append(ai_logit(model(to_tensor(crops.to(device)))).double().cpu())
    logits = torch.cat(found).reshape(len(data.val), -1).mean(dim=1).numpy()
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
