"""The starter's network in PyTorch, as the peers use it: with nothing of patchscan's scans around it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from patchscan.detector.card import WEIGHTS_FILE, Card
from patchscan.detector.models import ai_logit, build_network
from patchscan.detector.presets import Preset, to_tensor

Network = tuple[torch.nn.Module, Preset]


def load(run: Path) -> Network:
    """The network of a run folder, and the preset that says which views it scores."""
    card = Card.read(run)
    network = build_network(card.architecture).eval()
    network.load_state_dict(load_file(run / WEIGHTS_FILE))
    return network, card.preset


def score(network: Network, images: list[Image.Image]) -> list[float]:
    """Score a batch in one pass: the mean logit of each image's views."""
    module, preset = network
    views = [preset.crops(image, seed=0).pixels for image in images]
    logits = ai_logit(module(to_tensor(np.concatenate(views)))).split([len(one) for one in views])
    return [one.mean().sigmoid().item() for one in logits]
