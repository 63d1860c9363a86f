"""The network architectures: SimpleCNN, ResNet50, SSP, SSP-lite, and ensembles of them and of EfficientNet-Lite0.

Every model takes normalised crops, float32 (n, 3, size, size), and returns raw outputs (n, 1) or (n, 2); `ai_logit`
turns either into the logit of P(AI).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from patchscan.detector.efficientnet import EfficientNetLite0
from patchscan.detector.network import Network
from patchscan.detector.presets import MAX_MEMBERS
from patchscan.detector.resnet import ResNet50Features
from patchscan.detector.srm import SRM, NoiseMaps


class SimpleCNN(Network):
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
        result: torch.Tensor = self.hidden(self.features(x))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 224, 224) to (n, 2): real, AI."""
        result: torch.Tensor = self.fc(self.penultimate(x))
        return result


class ResNet50(Network):
    """ResNet50, every layer trainable, dropout before the last layer."""

    def __init__(self, outputs: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        self.resnet = ResNet50Features()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, outputs)

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to features (n, 2048)."""
        result: torch.Tensor = self.resnet(x)
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, outputs)."""
        result: torch.Tensor = self.fc(self.dropout(self.penultimate(x)))
        return result


class SSP(Network):
    """A Single Simple Patch (arXiv 2402.01123): the 32 x 32 patch enlarged to 256 x 256, SRM noise maps, ResNet50."""

    def __init__(self) -> None:
        super().__init__()
        self.srm = SRM()
        self.disc = ResNet50(outputs=1, dropout=0.0)

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to noise maps (n, 3, 256, 256)."""
        result: torch.Tensor = self.srm(F.interpolate(x, size=(256, 256), mode="bilinear", align_corners=False))
        return result

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to features (n, 2048)."""
        return self.disc.penultimate(self.noise(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to (n, 1): the logit of P(AI)."""
        result: torch.Tensor = self.disc(self.noise(x))
        return result


class Residual(nn.Module):
    """A residual block: two 3 x 3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        same_shape = stride == 1 and before == after
        self.shortcut = (
            nn.Identity()
            if same_shape
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, before, H, W) to (n, after, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


class SSPLite(Network):
    """A small variant of SSP: noise maps of the 32 x 32 patch, not enlarged, into a ResNet of 78,753 parameters.

    Designed in this project, not in the paper. The logits of several patches of an image are averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.noise = NoiseMaps()
        self.stem = nn.Sequential(
            nn.Conv2d(12, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        pairs = pairwise((widths[0], *widths))
        self.body = nn.Sequential(
            *(Residual(before, after, stride=2 if stage else 1) for stage, (before, after) in enumerate(pairs))
        )
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(widths[-1], 1)

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to features (n, 64)."""
        result: torch.Tensor = self.body(self.stem(self.noise(x))).mean(dim=(2, 3))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, 32, 32) to (n, 1): the logit of P(AI)."""
        result: torch.Tensor = self.fc(self.dropout(self.penultimate(x)))
        return result


class Ensemble(nn.Module):
    """Several models combined: the mean of their calibrated logits, each logit / temperature + bias.

    Members of one preset all see the same crops, as many as an image has; `counts` is then 0. Members of several
    presets take the crops of an EnsemblePreset. The members' crop sizes, crop counts, temperatures and biases are
    buffers, so they are saved with the weights.
    """

    sizes: torch.Tensor
    counts: torch.Tensor
    temperatures: torch.Tensor
    biases: torch.Tensor

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("sizes", torch.zeros(len(members), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(len(members), dtype=torch.int64))
        self.register_buffer("temperatures", torch.ones(len(members)))
        self.register_buffer("biases", torch.zeros(len(members)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(crops, 3, S, S) to (crops, 1): the mean of the members, where they share the crops.

        Otherwise x is each image's crops member by member, and the outputs are scaled so that the plain mean over an
        image's crops is the mean over the members.
        """
        if not self.counts.any():
            return torch.stack([self._calibrated(number, x) for number in range(len(self.members))]).mean(dim=0)
        counts = self.counts.tolist()
        parts = x.unflatten(0, (-1, sum(counts))).split(counts, dim=1)  # per member: (images, its count, 3, S, S)
        outputs = []
        for number, part in enumerate(parts):
            size = int(self.sizes[number])
            logit = self._calibrated(number, part[..., :size, :size].flatten(0, 1)).view(part.shape[:2])
            outputs.append(logit * (sum(counts) / (len(counts) * counts[number])))
        return torch.cat(outputs, dim=1).flatten()[:, None]

    def _calibrated(self, number: int, crops: torch.Tensor) -> torch.Tensor:
        """A member's calibrated logits (n, 1) of crops (n, 3, size, size)."""
        logit = ai_logit(self.members[number](crops))[:, None]
        return logit / self.temperatures[number] + self.biases[number]


ARCHITECTURES: dict[str, Callable[[], Network]] = {
    "simplecnn": SimpleCNN,
    "resnet50": ResNet50,
    "ssp": SSP,
    "ssp-lite": SSPLite,
    "efficientnet-lite0": EfficientNetLite0,
}


def build_network(architecture: str) -> Network:
    """Build one untrained network. Raises ValueError on an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")
    return ARCHITECTURES[architecture]()


def build_model(architecture: str) -> nn.Module:
    """Build the model that a card names: one architecture, or up to MAX_MEMBERS joined by `+` as an Ensemble.

    Raises ValueError on an unknown architecture or too many members.
    """
    names = architecture.split("+")
    if len(names) > MAX_MEMBERS:
        raise ValueError(f"an ensemble has at most {MAX_MEMBERS} members, not {len(names)}")
    return build_network(names[0]) if len(names) == 1 else Ensemble([build_network(name) for name in names])


class NoInitialWeights(TorchFunctionMode):
    """Within this context, a network's weights are allocated but not drawn, for those who load others over them: to
    draw them takes longer than to build the rest."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = function in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if drawn or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def ai_logit(outputs: torch.Tensor) -> torch.Tensor:
    """Convert raw outputs, (n, 1) or (n, 2) as real, AI, to the logit of P(AI), (n,)."""
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs[:, 1] - outputs[:, 0]
