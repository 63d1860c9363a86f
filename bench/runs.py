"""Run folders for the bench: the trained models, and untrained models, which are as fast as trained ones."""

from pathlib import Path

import torch

from patchscan.common.files import sha256_of
from patchscan.common.shipped import shipped
from patchscan.detector.card import WEIGHTS_FILE, Card
from patchscan.detector.models import build_network
from patchscan.training.checkpoint import write_weights
from patchscan.training.recipe import load_recipe


def run_folder(architecture: str, folder: Path) -> Path:
    """Return the folder of a trained model of `model_store`; otherwise write an untrained model with its recipe's
    preset below `folder`."""
    if architecture in ("ssp-lite", "starter"):
        return shipped("model_store") / architecture
    run = folder / architecture
    run.mkdir(parents=True)
    torch.manual_seed(0)
    write_weights(run, build_network(architecture).state_dict())
    Card(
        name=architecture,
        version="1.0",
        architecture=architecture,
        preset=load_recipe(architecture).preset,
        weights_sha256=sha256_of(run / WEIGHTS_FILE),
        warnings=["untrained: made to measure speed"],
    ).write(run)
    return run
