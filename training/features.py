"""What the model sees before and after training: penultimate features of validation images, kept for pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from detector.presets import to_tensor
from training.dataset import evaluation_loader

if TYPE_CHECKING:
    from training.train import Trainer

FEATURE_IMAGES = 500


@torch.inference_mode()
def write_features(trainer: Trainer, moment: str) -> None:
    """Write features_before.npz or features_after.npz into the run: `features` float32 (n, width), `label` (n,) and
    `generator` (n,), of at most 500 seen validation images spread over the split (the first crop of each)."""
    step = max(1, len(trainer.val_rows) // FEATURE_IMAGES)
    rows = trainer.val_rows.iloc[::step].reset_index(drop=True)
    trainer.kept.eval()
    features = []
    for crops, _ in evaluation_loader(trainer.source, rows, trainer.recipe, trainer.workers):
        pixels = to_tensor(crops[:: trainer.recipe.preset.count].to(trainer.ranks.device))
        features.append(trainer.kept.penultimate(pixels).float().cpu().numpy())
    np.savez_compressed(
        trainer.store.folder / f"features_{moment}.npz",
        features=np.concatenate(features),
        label=rows.label.to_numpy(),
        generator=rows.generator.to_numpy(dtype=str),
    )
