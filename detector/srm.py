"""SRM noise filters: three fixed high-pass filters that leave an image's noise (Fridrich & Kodovsky, "Rich Models for
Steganalysis of Digital Images", IEEE TIFS 2012)."""

import torch
from torch import nn
from torch.nn import functional as F

KB = [[0, 0, 0, 0, 0], [0, -1, 2, -1, 0], [0, 2, -4, 2, 0], [0, -1, 2, -1, 0], [0, 0, 0, 0, 0]]
KV = [[-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1]]
HORIZONTAL = [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, -2, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def srm_kernels() -> torch.Tensor:
    """KB / 4, KV / 12 and the horizontal second difference / 2. Returns float32 (3, 5, 5)."""
    return torch.stack([torch.tensor(KB) / 4, torch.tensor(KV) / 12, torch.tensor(HORIZONTAL) / 2])


class SRM(nn.Module):
    """Three noise maps, each filter summed over the three colour channels and clamped to +-3 (hardtanh)."""

    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", srm_kernels()[:, None].repeat(1, 3, 1, 1))  # (3, 3, 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, 3, H, W)."""
        return F.hardtanh(F.conv2d(x, self.kernel, padding=2), -3.0, 3.0)
