"""What the demo's two generators are: described apart from their code, which needs torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of generator: its encoder reduces the image by `factor`, a power of 2; its decoder enlarges by `up`."""

    name: str
    factor: int
    up: Literal["transposed", "nearest"]
    latent: int
    width: int = 16
