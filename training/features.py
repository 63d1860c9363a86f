"""What the model sees before and after training: penultimate features of validation images, kept for pictures."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dataset.source import Source
from detector.models import Network
from detector.presets import to_tensor
from training.batches import evaluation_loader
from training.recipe import Recipe

FEATURE_IMAGES = 500


@torch.inference_mode()
def write_features(
    file: Path, model: Network, source: Source, val_rows: pd.DataFrame, recipe: Recipe, workers: int
) -> None:
    """Write an .npz file: `features` float32 (n, width), `label` (n,) and `generator` (n,), of at most 500 of the
    validation images, spread over them (the first crop of each)."""
    step = max(1, len(val_rows) // FEATURE_IMAGES)
    rows = val_rows.iloc[::step].reset_index(drop=True)
    model.eval()
    device = next(model.parameters()).device
    features = []
    for crops, _ in evaluation_loader(source, rows, recipe, workers):
        pixels = to_tensor(crops[:: recipe.preset.count].to(device))
        features.append(model.penultimate(pixels).float().cpu().numpy())
    np.savez_compressed(
        file,
        features=np.concatenate(features),
        label=rows.label.to_numpy(),
        generator=rows.generator.to_numpy(dtype=str),
    )
