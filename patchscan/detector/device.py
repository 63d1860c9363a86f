"""The device that a model is to run on, checked in seconds, and the precision that a training computes in."""

from typing import Literal

import torch

from patchscan.common.errors import UserError

Precision = Literal["fp32", "bf16"]


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
            f"device {device} cannot be used: {reason}; on a GPU node check `nvidia-smi`, or use --device cpu"
        ) from error


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16: avx512_bf16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(asked: Precision | None, device: torch.device) -> Precision:
    """Return `asked`, or bf16 on a GPU and fp32 on a CPU. Raises DeviceError for bf16 on a CPU without instructions for
    it (avx512_bf16, AMX), which would take several times as long as fp32."""
    if asked == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise DeviceError(
            "this CPU does not compute in bfloat16 (lscpu lists neither avx512_bf16 nor amx_bf16): use --precision fp32"
        )
    return asked or ("bf16" if device.type == "cuda" else "fp32")
