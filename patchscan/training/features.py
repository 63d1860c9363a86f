"""Save the penultimate features of validation images before and after training, for the report's pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from patchscan.common.files import atomic_write
from patchscan.detector.network import Network
from patchscan.detector.presets import to_tensor
from patchscan.training.batches import evaluation_loader
from patchscan.training.data import TrainingData
from patchscan.training.recipe import Recipe

FEATURE_IMAGES = 500


def feature_rows(data: TrainingData) -> pd.DataFrame:
    """Return about FEATURE_IMAGES rows at most, evenly spread over the validation images."""
    step = max(1, len(data.val) // FEATURE_IMAGES)
    return data.val.iloc[::step].reset_index(drop=True)


@torch.inference_mode()
def write_features(
    file: Path, model: Network, data: TrainingData, recipe: Recipe, workers: int, before_batch: Callable[[], None]
) -> None:
    """Write an .npz file: `features` float32 (n, width), `label` (n,) and `generator` (n,).

    The images are those of `feature_rows`; the first crop of each is used.
    """
    rows = feature_rows(data)
    model.eval()
    device = next(model.parameters()).device
    features = []
    for crops, _ in evaluation_loader(data.source, rows, recipe, workers, device):
        before_batch()
        pixels = to_tensor(crops[:: recipe.preset.count].to(device))
        features.append(model.penultimate(pixels).float().cpu().numpy())
    with atomic_write(file) as partial, partial.open("wb") as opened:
        np.savez_compressed(
            opened,
            features=np.concatenate(features),
            label=rows.label.to_numpy(),
            generator=rows.generator.to_numpy(dtype=str),
        )
