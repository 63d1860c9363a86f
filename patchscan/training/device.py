"""Check the device that a training is to run on, in seconds, before anything is copied or read.

python -m patchscan.training.device cuda
"""

import sys

import torch

from patchscan.common.console import say
from patchscan.common.errors import UserError


class DeviceError(UserError):
    """The device named cannot compute; the message says why in one line."""


def check_device(device: str) -> None:
    """Compute one number on `device` (cpu, cuda, cuda:1). Raises DeviceError where that fails."""
    try:
        torch.ones(1, device=device).add(1).item()
    # What is raised depends on what is broken: the name, the build of torch, the driver, the card.
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"device {device} cannot be used: {reason}; on a GPU node check `nvidia-smi`, or train with --device cpu"
        ) from error


if __name__ == "__main__":
    try:
        check_device(sys.argv[1])
    except DeviceError as error:
        say(f"patchscan: {error}", error=True)
        sys.exit(error.exit_code)
