"""SSP's official method from bytes to a logit, reimplemented from its description, for comparison.

64 random crops through Pillow, each converted to int64 and its neighbours' differences summed; the crops sorted by that
sum; the first enlarged to 256 x 256; SRM and ResNet50 in eager PyTorch.
"""

import io
import random

import numpy as np
import torch
from PIL import Image

from patchscan.detector.patches import SMALL_IMAGE_SIDE

CANDIDATES, SIZE = 64, 32


def texture(crop: Image.Image) -> int:
    """The sum of absolute differences of neighbours: horizontal, vertical, both diagonals."""
    pixels = np.asarray(crop).astype(np.int64)
    horizontal = np.abs(pixels[:, :-1] - pixels[:, 1:]).sum()
    vertical = np.abs(pixels[:-1] - pixels[1:]).sum()
    falling = np.abs(pixels[:-1, :-1] - pixels[1:, 1:]).sum()
    rising = np.abs(pixels[1:, :-1] - pixels[:-1, 1:]).sum()
    return int(horizontal + vertical + falling + rising)


def simplest(data: bytes) -> Image.Image:
    """The least textured of 64 random crops of the decoded image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) < SIZE:
        image = image.resize((SMALL_IMAGE_SIDE, SMALL_IMAGE_SIDE))
    crops = []
    for _ in range(CANDIDATES):
        x, y = random.randint(0, image.width - SIZE), random.randint(0, image.height - SIZE)
        crops.append(image.crop((x, y, x + SIZE, y + SIZE)))
    return min(crops, key=texture)


@torch.inference_mode()
def logits(model: torch.nn.Module, images: list[bytes]) -> torch.Tensor:
    """Score a batch of encoded images with an SSP model. Returns float32 (n, 1)."""
    from torchvision.transforms import v2  # imported here because it takes seconds

    from patchscan.detector.presets import IMAGENET_MEAN, IMAGENET_STD

    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    outputs: torch.Tensor = model(torch.stack([transform(simplest(data)) for data in images]))
    return outputs
