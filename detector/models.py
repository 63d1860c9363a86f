"""The architectures, and nothing but architecture: SimpleCNN, ResNet50, SSP and its light relative.

Every model takes normalised crops, float32 (n, 3, size, size), and returns raw outputs (n, 1) or (n, 2); `ai_logit`
turns either into the logit of P(AI).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from detector.srm import SRM


class SimpleCNN(nn.Module):
    """Four 3 x 3 convolutions (32, 64, 128, 256), each with ReLU and 2 x 2 max pooling, then FC 512, dropout, FC 2."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        blocks = [
            layer
            for before, after in pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        ]
        self.features = nn.Sequential(*blocks, nn.Flatten())  # (n, 256 * 14 * 14)
        self.hidden = nn.Sequential(nn.Linear(256 * 14 * 14, 512), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.fc = nn.Linear(512, 2)

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 224, 224) to features (n, 512)."""
        return self.hidden(self.features(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 224, 224) to (n, 2): real, AI."""
        return self.fc(self.penultimate(x))


class ResNet50(nn.Module):
    """torchvision's ResNet50, every layer trainable, dropout before the last layer."""

    def __init__(self, outputs: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        self.resnet = torchvision.models.resnet50(weights=None)
        self.resnet.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, outputs)

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to features (n, 2048)."""
        return self.resnet(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, outputs)."""
        return self.fc(self.dropout(self.penultimate(x)))


class SSP(nn.Module):
    """A Single Simple Patch (arXiv 2402.01123): the 32 x 32 patch enlarged to 256 x 256, SRM noise maps, ResNet50."""

    def __init__(self) -> None:
        super().__init__()
        self.srm = SRM()
        self.disc = ResNet50(outputs=1, dropout=0.0)

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to noise maps (n, 3, 256, 256)."""
        return self.srm(F.interpolate(x, size=(256, 256), mode="bilinear", align_corners=False))

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to features (n, 2048)."""
        return self.disc.penultimate(self.noise(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to (n, 1): the logit of P(AI)."""
        return self.disc(self.noise(x))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"simplecnn": SimpleCNN, "resnet50": ResNet50, "ssp": SSP}


def build(architecture: str) -> nn.Module:
    """An untrained model. Raises ValueError on an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")
    return ARCHITECTURES[architecture]()


def ai_logit(outputs: torch.Tensor) -> torch.Tensor:
    """Outputs (n, 1), or (n, 2) as real, AI, to the logit of P(AI), (n,)."""
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs[:, 1] - outputs[:, 0]
