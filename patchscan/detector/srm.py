"""SRM noise filters: three fixed high-pass filters that leave an image's noise (Fridrich & Kodovsky, "Rich Models for
Steganalysis of Digital Images", IEEE TIFS 2012)."""

import torch
from torch import nn
from torch.nn import functional as F

from patchscan.detector.presets import IMAGENET_STD

KB = [[0, 0, 0, 0, 0], [0, -1, 2, -1, 0], [0, 2, -4, 2, 0], [0, -1, 2, -1, 0], [0, 0, 0, 0, 0]]
KV = [[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]]
HORIZONTAL = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, -2, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def srm_kernels() -> torch.Tensor:
    """Return KB / 4, KV / 12 and the horizontal second difference / 2, float32 (3, 5, 5)."""
    return torch.stack([torch.tensor(KB) / 4, torch.tensor(KV) / 12, torch.tensor(HORIZONTAL) / 2])


class NoiseMaps(nn.Module):
    """Noise maps of each channel: KB / 4, KV / 12 and second differences along both axes, in grey levels, clamped to
    +-8. No padding: it would leave a trace of the patch's border."""

    kernel: torch.Tensor
    grey_levels: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor(HORIZONTAL) / 2
        kernel = torch.stack([torch.tensor(KB) / 4, torch.tensor(KV) / 12, horizontal, horizontal.T])
        self.register_buffer("kernel", kernel[:, None], persistent=False)  # (4, 1, 5, 5)
        grey_levels = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255
        self.register_buffer("grey_levels", grey_levels, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (n, 3, H, W) to maps in -3..3, (n, 12, H - 4, W - 4), the four of each channel together."""
        n, channels, height, width = x.shape
        grey = (x * self.grey_levels).reshape(n * channels, 1, height, width)
        with torch.autocast(x.device.type, enabled=False):  # fp16 would round away what the filters look for
            maps = F.conv2d(grey, self.kernel).reshape(n, -1, height - 4, width - 4)
        return F.hardtanh(maps * (3 / 8), -3.0, 3.0)


class SRM(nn.Module):
    """Three noise maps, each filter summed over the three colour channels and clamped to +-3 (hardtanh)."""

    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", srm_kernels()[:, None].repeat(1, 3, 1, 1))  # (3, 3, 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, 3, H, W)."""
        with torch.autocast(x.device.type, enabled=False):  # as above
            return F.hardtanh(F.conv2d(x, self.kernel, padding=2), -3.0, 3.0)
