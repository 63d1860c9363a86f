"""The base class of all network architectures."""

import torch
from torch import nn


class Network(nn.Module):
    """Base class of all architectures."""

    def penultimate(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised crops (n, 3, size, size) to the last layer's input, features (n, width)."""
        raise NotImplementedError
