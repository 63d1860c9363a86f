"""ImageNet weights of the two backbones, drawn at random."""

import torch

from patchscan.detector.efficientnet import BLOCKS
from patchscan.detector.resnet import ResNet50Features


def resnet50_state() -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of torchvision's file."""
    last = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    return ResNet50Features().state_dict() | last


def lite0_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of the package's file, as far as the trunk goes, and one layer above."""
    torch.manual_seed(seed)
    state = {"_conv_head.weight": torch.zeros(1280, 320, 1, 1)}

    def add(conv: str, norm: str, *shape: int) -> None:
        state[f"{conv}.weight"] = torch.randn(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
        values = {"weight": 0.5, "bias": 0.0, "running_mean": 0.0, "running_var": 0.5}
        state.update({f"{norm}.{name}": low + torch.rand(shape[0]) for name, low in values.items()})
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    for number, (expansion, kernel, _, before, after) in enumerate(BLOCKS):
        block, middle = f"_blocks.{number}.", before * expansion
        if expansion > 1:
            add(f"{block}_expand_conv", f"{block}_bn0", middle, before, 1, 1)
        add(f"{block}_depthwise_conv", f"{block}_bn1", middle, 1, kernel, kernel)
        add(f"{block}_project_conv", f"{block}_bn2", after, middle, 1, 1)
    return state
