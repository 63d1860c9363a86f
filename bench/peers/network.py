"""The starter's network in PyTorch, as the peers use it: with nothing of patchscan's scans around it."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchscan.detector.card import WEIGHTS_FILE, Card
from patchscan.detector.models import ai_logit, build_network
from patchscan.detector.presets import Preset, to_tensor
from patchscan.detector.weights import read_safetensors

Network = tuple[torch.nn.Module, Preset]


def load(run: Path) -> Network:
    """The network of a run folder, and the preset that says which views it scores."""
    card = Card.read(run)
    network = build_network(card.architecture).eval()
    network.load_state_dict(read_safetensors(run / WEIGHTS_FILE))
    return network, card.preset


@torch.inference_mode()
def score(network: Network, bodies: list[bytes]) -> list[float]:
    """Decode a batch with Pillow and score it in one pass: p_ai from the mean logit of each image's views."""
    module, preset = network
    images = [Image.open(io.BytesIO(body)).convert("RGB") for body in bodies]
    views = [preset.crops(image, seed=0).pixels for image in images]
    logits = ai_logit(module(to_tensor(np.concatenate(views)))).split([len(one) for one in views])
    return [one.mean().sigmoid().item() for one in logits]
